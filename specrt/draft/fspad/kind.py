"""The entry of FSPAD and EAGLE-1/2 among the kinds of drafters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from specrt.draft.kind import DrafterOptions, DrafterRequest, Kind

if TYPE_CHECKING:
    import torch

    from specrt.config import ModelConfig
    from specrt.draft.base import Drafter
    from specrt.draft.fspad.checkpoint import DraftConfig
    from specrt.draft.fspad.layer import DraftLayer
    from specrt.draft.fspad.weights import DraftWeights
    from specrt.models.model import LlamaModel


def _matches(directory: Path) -> bool:
    from specrt.draft.fspad.checkpoint import is_draft_checkpoint

    return is_draft_checkpoint(directory)


def _check(directory: Path, target: ModelConfig, target_path: Path | None) -> None:
    from specrt.draft.fspad.checkpoint import check_fit

    check_fit(directory, target)


def _load(request: DrafterRequest) -> Drafter:
    from specrt.draft.fspad.drafter import FspadDrafter
    from specrt.draft.fspad.on_device import DeviceFspadDrafter

    options = request.options
    kind = DeviceFspadDrafter if request.target.device.is_gpu else FspadDrafter
    return kind(
        _draft_layer(request.checkpoint, request.target, options),
        is_coupled=options.is_coupled,
        control=options.control,
    )


def _draft_layer(directory: Path, target: LlamaModel, options: DrafterOptions) -> DraftLayer:
    from torch import OutOfMemoryError

    from specrt.draft.fspad.checkpoint import read_checkpoint
    from specrt.draft.fspad.layer import DraftLayer
    from specrt.draft.fspad.official import HEAD, settle_head
    from specrt.draft.fspad.vocabulary import keep_tokens
    from specrt.draft.made_for import note_adapter

    config, tensors = read_checkpoint(directory, target.config)
    if config.target_fingerprint is not None:  # official ones do not say
        note_adapter(directory, config.target_adapter, target.weights.adapter)
    if HEAD in tensors:
        settle_head(directory, tensors, _exact_head(target))
    if options.hot_tokens is not None:
        config, tensors = keep_tokens(config, tensors, options.hot_tokens)
    # Rotary positions must reach as far as the target's, whatever a drafter's config says.
    reach = max(config.layer.max_positions, target.config.max_positions)
    config = replace(config, layer=replace(config.layer, max_positions=reach))
    try:
        weights = _placed(config, tensors, target, options)
        return DraftLayer(
            config,
            weights,
            target.device,
            target.ropes,
            options.window,
            target_form=target.config.form,
        )
    except OutOfMemoryError as error:
        raise MemoryError(f"no memory for the drafter on {target.device}: {directory}") from error


def _placed(
    config: DraftConfig,
    tensors: Mapping[str, torch.Tensor],
    target: LlamaModel,
    options: DrafterOptions,
) -> DraftWeights:
    """Weights where the target's are. A GPU's kernels take rows and matrices of one type."""
    from specrt.draft.fspad.weights import fold, folding_pays, narrow, pack_weights, packed

    device, dtype = target.device, config.layer.dtype
    if device.is_gpu:
        dtype = target.dtype
    embed, head = target.weights.embed, target.weights.lm_head
    weights = pack_weights(
        config, tensors, embed, head, dtype, device, head_bias=target.weights.head_bias
    )
    is_folded = options.fold
    if is_folded is None:
        is_folded = folding_pays(weights, target.weights.arena.nbytes)
    if is_folded:
        weights = fold(weights, device)
    if options.weights is not None:
        return narrow(weights, device)
    return packed(weights, target.weights.packing.of_drafters(head))


def _exact_head(target: LlamaModel) -> torch.Tensor | None:
    """On the host; None where it is not what it was rounded from."""
    from specrt.models.dense import dense
    from specrt.ops import MatrixKind, PackedMatrix

    head = target.weights.lm_head
    if not isinstance(head, PackedMatrix):
        return target.device.read(head)
    is_exact = head.kind in (MatrixKind.BF16_SPLIT, MatrixKind.BF16_ROUNDED)
    return dense(head).bfloat16() if is_exact else None


FSPAD = Kind(
    "fspad",
    "an FSPAD or EAGLE-1/2 drafter",
    _load,
    _matches,
    has_control=True,
    has_narrowing=True,
    check=_check,
)
