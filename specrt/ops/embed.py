"""Rows of an embedding by token."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register("embed(Tensor tokens, Tensor table, Tensor(a!) out) -> ()", _C.embed)


def embed(
    tokens: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``out[i] = table[tokens[i]]``; a token that the table lacks counts as the nearest one.

    Args:
        tokens: ``[M]`` int32.
        table: ``[V, H]`` float32, bfloat16 or float16; rows may be strided.
        out: ``[M, H]`` of the same dtype, or of another of them, to which values are converted
            (16 bits to float32 exactly, any other way rounded once); rows may be strided. Made if
            not given.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or ``out`` shares memory with an
            input; the argument is named.
    """
    if out is None:
        out = table.new_empty(*tokens.shape[:1], *table.shape[1:])
    if torch.compiler.is_compiling():
        torch.ops.specrt.embed(tokens, table, out)
    else:
        _C.embed(tokens, table, out)
    return out
