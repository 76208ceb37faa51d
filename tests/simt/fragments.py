"""Matrices as the registers of a warp have them, and what ``mma`` makes of them."""

from __future__ import annotations

import torch

from tests.simt import _simt


def pairs(x: torch.Tensor) -> torch.Tensor:
    """Two 16-bit elements a 32-bit word, the lower index in the lower half."""
    return x.contiguous().view(torch.int32)


def fragments(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
    """Registers of mma.m16n8k16: PTX ISA, "Matrix fragments for mma.m16n8k16", formula by formula.

    a ``[16, 16]``, b ``[16, 8]``, c ``[16, 8]``.
    """
    mine = [torch.empty(32, 8, dtype=a.dtype), torch.empty(32, 4, dtype=a.dtype)]
    rows = torch.empty(32, 4)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group if (0 <= i < 2 or 4 <= i < 6) else group + 8
            column = in_group * 2 + (i & 1) + (0 if i < 4 else 8)
            mine[0][lane, i] = a[row, column]
        for i in range(4):
            mine[1][lane, i] = b[in_group * 2 + (i & 1) + (0 if i < 2 else 8), group]
            rows[lane, i] = c[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
    return {"a": pairs(mine[0]), "b": pairs(mine[1]), "c": rows}


def matrix_of(rows: torch.Tensor) -> torch.Tensor:
    out = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            row = lane >> 2 if i < 2 else (lane >> 2) + 8
            out[row, lane % 4 * 2 + (i & 1)] = rows[lane, i]
    return out


def multiplied(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, kernel: str | None = None
) -> torch.Tensor:
    """c + a b, by one mma for each 16 columns of a and rows of b, in order."""
    kernel = kernel or ("multiply_bf16" if a.dtype == torch.bfloat16 else "multiply_f16")
    for start in range(0, a.shape[1], 16):
        tensors = fragments(a[:, start : start + 16], b[start : start + 16], c)
        _simt.run_probe(kernel, tensors, [1])
        c = matrix_of(tensors["c"])
    return c


def same(out: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal to the bit, or NaN in both."""
    integer = {2: torch.int16, 4: torch.int32}[out.element_size()]
    is_equal = out.view(integer) == want.view(integer)
    return bool((is_equal | (out.isnan() & want.isnan())).all())
