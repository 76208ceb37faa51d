"""Rows of an embedding by token."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "embed(Tensor tokens, Tensor table, Tensor(a!) out, Tensor(b!)? ids, Tensor? is_open) -> ()",
    _C.embed,
)


def embed(
    tokens: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    ids: torch.Tensor | None = None,
    is_open: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out[i] = table[tokens[i]]``; a token that the table lacks counts as the nearest one.

    Args:
        tokens: ``[M]`` int32, may be strided.
        table: ``[V, H]`` float32, bfloat16 or float16; rows may be strided.
        out: ``[M, H]`` of the same dtype, or of another of them, to which values are converted
            (16 bits to float32 exactly, any other way rounded once); rows may be strided. Made if
            not given.
        ids: ``[M]`` int32, may be strided, written: which row of the table each is; -1 if none is
            taken. None: nobody asks.
        is_open: ``[B]`` int32 flags of sequences, whatever the rows. If all of them are 0 no row is
            taken, and ``out`` stays as it is.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or what is written shares
            memory with another argument; the argument is named.
    """
    if out is None:
        out = table.new_empty(*tokens.shape[:1], *table.shape[1:])
    if torch.compiler.is_compiling():
        torch.ops.specrt.embed(tokens, table, out, ids, is_open)
    else:
        _C.embed(tokens, table, out, ids, is_open)
    return out
