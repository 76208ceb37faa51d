"""Rows of an embedding by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specrt import _C
from specrt.ops.matrix import PackedMatrix, layout_of, values_of
from specrt.ops.registry import register

register(
    "embed(Tensor tokens, Tensor table, Tensor(a!) out, Tensor(b!)? ids, Tensor? is_open,"
    " int[] layout, float scale, Tensor? positions, Tensor? depth, Tensor? kv_len, int offset)"
    " -> ()",
    _C.embed,
)


@dataclass(frozen=True)
class EmbedPositions:
    """A learned table of positions, and where M = B N rows of tokens stand."""

    table: torch.Tensor
    """``[P, H]`` float32, bfloat16 or float16; rows may be strided."""
    depth: torch.Tensor
    """``[B, N]`` int32"""
    kv_len: torch.Tensor
    """``[B]`` int32: row ``b N + i`` takes row ``kv_len[b] + depth[b, i] + offset`` of the table,
    or the nearest that there is."""
    offset: int


def embed(
    tokens: torch.Tensor,
    table: torch.Tensor | PackedMatrix,
    out: torch.Tensor | None = None,
    *,
    ids: torch.Tensor | None = None,
    is_open: torch.Tensor | None = None,
    scale: float = 1.0,
    positions: EmbedPositions | None = None,
) -> torch.Tensor:
    """``out[i] = table[tokens[i]]``; a token that the table lacks counts as the nearest one.

    With a scale or positions ``table[tokens[i]] * scale + positions[i]``, in float32, rounded once.

    Args:
        tokens: ``[M]`` int32, may be strided.
        table: ``[V, H]`` float32, bfloat16 or float16; rows may be strided. On the CPU also a
            packed matrix, with ``out`` float32: values as they are multiplied.
        out: ``[M, H]`` of the same dtype, or of another of them, to which values are converted
            (16 bits to float32 exactly, any other way rounded once); rows may be strided. Made if
            not given.
        ids: ``[M]`` int32, may be strided, written: which row of the table each is; -1 if none is
            taken. None: nobody asks.
        is_open: ``[B]`` int32 flags of sequences, whatever the rows. If all of them are 0 no row is
            taken, and ``out`` stays as it is.
        scale: of the table's values.
        positions: what is added to them; None: nothing.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or what is written shares
            memory with another argument; the argument is named.
    """
    if out is None:
        dtype = table.dtype if isinstance(table, torch.Tensor) else torch.float32
        out = tokens.new_empty(*tokens.shape[:1], *table.shape[1:], dtype=dtype)
    placed: tuple[torch.Tensor | int | None, ...] = None, None, None, 0
    if positions is not None:
        placed = positions.table, positions.depth, positions.kv_len, positions.offset
    given = tokens, values_of(table), out, ids, is_open, layout_of(table), scale, *placed
    if torch.compiler.is_compiling():
        torch.ops.specrt.embed(*given)
    else:
        _C.embed(*given)
    return out
