"""The entry of smaller models among the kinds of drafters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specrt.draft.kind import DrafterRequest, Kind

if TYPE_CHECKING:
    from specrt.config import ModelConfig
    from specrt.draft.base import Drafter


def _matches(directory: Path) -> bool:
    """Asked last: what is no drafter's checkpoint is a model, or refused for what it lacks."""
    return True


def _check(directory: Path, target: ModelConfig, target_path: Path | None) -> None:
    from specrt.config import ModelConfig
    from specrt.draft.fspad.official import open_drafter, refuse_other_kinds
    from specrt.draft.small_model.vocabulary import check_vocabulary

    refuse_other_kinds(open_drafter(directory))
    own = ModelConfig.from_directory(directory)
    check_vocabulary(directory, own.vocab_size, target_path, target.vocab_size)


def _load(request: DrafterRequest) -> Drafter:
    from dataclasses import replace

    from specrt.config import ModelConfig
    from specrt.draft.small_model.drafter import SmallModelDrafter
    from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
    from specrt.models.loader import load_weights
    from specrt.models.model import LlamaModel
    from specrt.models.placement import check_sizes, choose_dtype, choose_head_dim, place_weights
    from specrt.tree import MAX_NODES

    directory, target = request.checkpoint, request.target
    _check(directory, target.config, request.target_path)
    config = ModelConfig.from_directory(directory)
    chosen = choose_dtype(config, request.dtype, target.device.place)
    head_dim = choose_head_dim(config, target.device.place)
    check_sizes(replace(config, head_dim=head_dim), MAX_NODES, target.device.place)
    packing = target.weights.packing
    loaded = load_weights(directory, config, chosen, head_dim=head_dim, packing=packing)
    weights = place_weights(loaded, target.device)
    model = LlamaModel(config, weights, target.device, ropes=target.ropes)
    chosen_kind = DeviceSmallModelDrafter if target.device.is_gpu else SmallModelDrafter
    return chosen_kind(model, vocab_size=target.config.vocab_size)


SMALL_MODEL = Kind(
    "small-model", "a smaller model of the same tokenizer", _load, _matches, check=_check
)
