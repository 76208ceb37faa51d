"""The entry of FSPAD and EAGLE-1/2 among the kinds of drafters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from specrt.draft.kind import DrafterRequest, Kind

if TYPE_CHECKING:
    from specrt.draft.base import Drafter
    from specrt.draft.fspad.layer import DraftLayer
    from specrt.models.model import LlamaModel


def _matches(directory: Path) -> bool:
    from specrt.draft.fspad.checkpoint import is_draft_checkpoint

    return is_draft_checkpoint(directory)


def _load(request: DrafterRequest) -> Drafter:
    from specrt.draft.fspad.drafter import FspadDrafter

    options = request.options
    return FspadDrafter(
        _draft_layer(request.checkpoint, request.target, options.fold),
        is_coupled=options.is_coupled,
        control=options.control,
    )


def _draft_layer(directory: Path, target: LlamaModel, is_folded: bool | None) -> DraftLayer:
    from specrt.draft.fspad.checkpoint import read_checkpoint
    from specrt.draft.fspad.layer import DraftLayer, fold, folding_pays, pack_weights
    from specrt.draft.fspad.official import settle_head

    config, tensors = read_checkpoint(directory, target.config)
    # It drafts on the CPU wherever the target is.
    embed, head = target.weights.embed.cpu(), target.weights.lm_head.cpu()
    settle_head(directory, tensors, head)
    # Rotary positions must reach as far as the target's, whatever a drafter's config says.
    reach = max(config.layer.max_positions, target.config.max_positions)
    config = replace(config, layer=replace(config.layer, max_positions=reach))
    weights = pack_weights(config, tensors, embed, head, config.layer.dtype)
    if is_folded is None:
        is_folded = folding_pays(weights, target.weights.arena.nbytes)
    return DraftLayer(config, fold(weights) if is_folded else weights, rope=target.rope)


FSPAD = Kind("fspad", "an FSPAD or EAGLE-1/2 drafter", _load, _matches, has_control=True)
