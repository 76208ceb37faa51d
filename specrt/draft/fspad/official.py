"""The authors' layouts of one-layer drafters: what they are told by, and what only looks like one.

An official ``config.json`` is the target's and says nothing of the drafter, so the tensors tell the
kind. Others have repackaged these checkpoints: with keys under ``model.``, or with a copy of the
target's head.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

from specrt.config.quantization import stored_quantization
from specrt.models.checkpoint import Checkpoint, TensorInfo
from specrt.models.layouts import is_rounded_copy
from specrt.models.quantized.checkpoint import QuantizedCheckpoint, has_codes
from specrt.types import CheckpointError

HEAD = "lm_head.weight"
LAYER = "layers.0."
_PREFIX = "model."
_OTHERS = {
    "EAGLE-3": r"midlayer\.|d2t$|t2d$|layers\.0\.hidden_norm\.",
    "Medusa": r"medusa_heads?\.|blocks\.\d+\.layers\.|\d+\.\d+\.linear\.",
    "MLP speculator": r"(speculator\.)?(emb|proj|head|ln)\.\d+\.weight$",
    "MTP": r"mtp\.|.*\b(enorm|hnorm|eh_proj)\.weight$",
}
"""Drafters of other kinds, by the start of a key."""


def open_drafter(path: str | os.PathLike[str]) -> Checkpoint:
    """A drafter's checkpoint by the authors' names: without a ``model.`` before them.

    Quantised matrices are read as their values. An official ``config.json`` may say how the
    target's are stored, so the tensors tell whether there are any.

    Raises:
        CheckpointError: as for a checkpoint, quantised or not, or a tensor is there with and
            without the prefix.
    """
    checkpoint = Checkpoint(path)
    if has_codes(checkpoint):
        quantization = stored_quantization(checkpoint.directory)
        if quantization is not None:
            checkpoint = QuantizedCheckpoint(checkpoint, quantization)
    infos = dict(checkpoint.infos)
    checkpoint.infos.clear()
    for key, info in infos.items():
        name = key.removeprefix(_PREFIX)
        if name in checkpoint.infos:
            raise CheckpointError(f"{info.file}: {name} is there twice, once under {_PREFIX}")
        checkpoint.infos[name] = info
    return checkpoint


def other_kind(infos: Mapping[str, TensorInfo]) -> str | None:
    """What a checkpoint is if it is a drafter of a known kind that is not run here."""
    for kind, pattern in _OTHERS.items():
        if any(re.match(pattern, key) for key in infos):
            return kind
    fc = infos.get("fc.weight")
    # EAGLE-3 reads three of the target's layers.
    return "EAGLE-3" if fc is not None and fc.shape[1:] == (3 * fc.shape[0],) else None


def refuse_other_kinds(checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError that names the kind, where :func:`other_kind` knows it."""
    kind = other_kind(checkpoint.infos)
    if kind is not None:
        raise CheckpointError(f"{checkpoint.directory}: {kind} drafters are not supported yet")


def official_flags(checkpoint: Checkpoint) -> tuple[bool, bool]:
    """Whether a drafter samples features, and whether its output is split.

    Raises:
        CheckpointError: it is of another kind; the message names it.
    """
    infos, directory = checkpoint.infos, checkpoint.directory
    refuse_other_kinds(checkpoint)
    down = infos.get(f"{LAYER}mlp.down_proj.weight")
    norm = infos.get(f"{LAYER}post_attention_layernorm.weight")
    is_sampled = "fc.fc.weight" in infos
    if down is None or norm is None or not (is_sampled or "fc.weight" in infos):
        raise CheckpointError(
            f"{directory}: no FSPAD or EAGLE drafter (expected fc.weight or "
            f"fc.fc.weight and {LAYER}mlp.down_proj.weight)"
        )
    for key in infos:
        if re.match(r"layers\.[1-9]", key):
            raise CheckpointError(f"{directory}: a drafter of several layers ({key}), expected one")
        if re.search(r"(^|\.|input_layer|q_|k_)norm\.weight$", key):
            raise CheckpointError(
                f"{directory}: a drafter with norms that FSPAD and EAGLE-1/2 do not have ({key})"
            )
    return is_sampled, down.shape[:1] == (2 * norm.shape[0],)


def settle_head(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], head: torch.Tensor | None
) -> None:
    """Leave out a copy of the target's ``head [V, H]``, whose own is used.

    Args:
        path: the drafter's, for the message.
        tensors: its tensors; changed.
        head: the target's; None: not as its checkpoint has it, and any copy passes.

    Raises:
        CheckpointError: the copy differs by more than rounding.
    """
    copy = tensors.pop(HEAD, None)
    if copy is not None and head is not None and not is_rounded_copy(copy, head):
        raise CheckpointError(
            f"{path}: {HEAD}: differs from the target's; FSPAD and EAGLE-1/2 draft with the "
            "target's own head"
        )
