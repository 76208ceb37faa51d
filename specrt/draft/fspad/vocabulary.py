"""Which tokens a drafter proposes: lists of the most frequent ones.

V vocabulary of the target, R tokens that are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from specrt.draft.fspad.checkpoint import TOKEN_IDS, DraftConfig
from specrt.types import CheckpointError

HotTokens = str | os.PathLike[str] | Sequence[int]
"""Token ids, most frequent first, or a file of them."""


def keep_tokens(
    config: DraftConfig,
    tensors: Mapping[str, torch.Tensor],
    tokens: HotTokens,
    size: int | None = None,
) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Let a drafter propose the tokens of a list only; its text stays the target's own.

    Args:
        config: the drafter's; one that was reduced before may be reduced anew.
        tensors: its tensors; they are shared with the result.
        tokens: ids, or a file: JSON (``.json``), or what ``torch.save`` wrote (``.pt``), as the
            lists of FR-Spec and SGLang are; a list or a tensor of them.
        size: R, the first so many of the list; None: all.

    Returns:
        The configuration, and the tensors with ``TOKEN_IDS [R]`` int32, increasing.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
        ValueError: the list has no token, one twice, one that is not in 0..V-1, or fewer than
            ``size``.
    """
    vocab_size = config.layer.vocab_size
    name, given = "hot_tokens", tokens
    if isinstance(given, str | os.PathLike):
        name, given = str(given), _read(Path(given))
    ids = _flat(given)
    if ids is None:
        raise ValueError(f"{name}: expected a list of token ids, got {_told(given)}")
    if size is not None and not 1 <= size <= len(ids):
        raise ValueError(f"{name}: expected at least {max(size, 1)} token ids, got {len(ids)}")
    kept = sorted(ids[:size])
    if not kept or kept[0] < 0 or kept[-1] >= vocab_size:
        got = f"{kept[0]}..{kept[-1]}" if kept else "none"
        raise ValueError(f"{name}: expected token ids in 0..{vocab_size - 1}, got {got}")
    twice = next((token for token, after in pairwise(kept) if token == after), None)
    if twice is not None:
        raise ValueError(f"{name}: expected each token once, got {twice} twice")
    changed = {**tensors, TOKEN_IDS: torch.tensor(kept, dtype=torch.int32)}
    return replace(config, draft_vocab_size=len(kept)), changed


def _flat(given: Any) -> list[int] | None:
    """Whole numbers, or None."""
    if isinstance(given, torch.Tensor):
        is_list = given.dim() == 1 and given.layout == torch.strided and not given.is_meta
        given = given.tolist() if is_list and not given.is_quantized else None
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return None
    return list(given) if all(type(token) is int for token in given) else None


def _told(given: Any) -> str:
    """What came in place of a list of ids: its kind, and of a list the first item that is none."""
    if isinstance(given, torch.Tensor):
        return f"a tensor {list(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return type(given).__name__
    other = next(token for token in given if type(token) is not int)
    return f"{other!r} in it"


def _read(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        if file.suffix == ".json":
            return json.loads(file.read_bytes())
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle makes its reader raise anything
        raise CheckpointError(
            f"{file}: expected a list of token ids, as JSON (.json) or by torch.save (.pt)"
        ) from error
