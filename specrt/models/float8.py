"""Matrices of one byte a weight, made of wider ones: half the bytes, for who may round.

N outputs, K inputs.
"""

from __future__ import annotations

import torch

from specrt.device import Device
from specrt.ops import Float8Matrix

COLUMNS_IN_TURN = 16
"""Of which a GPU's kernel takes two eights by turns, as a thread multiplies them."""
_LARGEST = 448.0  # of e4m3
_ROWS = 1024  # converted at a time


def float8_matrix(matrix: torch.Tensor, device: Device) -> Float8Matrix:
    """Round a matrix to e4m3, each row by a scale of its own: its largest value becomes 448.

    Rounded to nearest, ties to even. A row with NaN or infinite values gets a scale of NaN, and so
    does every result of it.

    Args:
        matrix: ``[N, K]``, where ``device`` is.
        device: what multiplies by it.

    Raises:
        ValueError: on a GPU, K is no multiple of 16.
    """
    num_columns = matrix.shape[1]
    if device.is_gpu and num_columns % COLUMNS_IN_TURN:
        raise ValueError(
            f"float8: expected matrices of a multiple of {COLUMNS_IN_TURN} columns on CUDA, got "
            f"[{len(matrix)}, {num_columns}]"
        )
    values = device.empty(*matrix.shape, dtype=torch.float8_e4m3fn)
    scale = device.empty(len(matrix))
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        values[rows], scale[rows] = _rounded(matrix[rows].float())
    return Float8Matrix(in_turn(values) if device.is_gpu else values, scale)


def in_turn(values: torch.Tensor) -> torch.Tensor:
    """Columns 0, 8, 1, 9, .. 7, 15 of each sixteen, as a GPU's kernel takes bytes ``[N, K]``."""
    eights = values.unflatten(1, (-1, 2, COLUMNS_IN_TURN // 2))
    turned: torch.Tensor = eights.transpose(2, 3).reshape(values.shape)
    return turned


def in_order(values: torch.Tensor) -> torch.Tensor:
    """What :func:`in_turn` was given."""
    pairs = values.unflatten(1, (-1, COLUMNS_IN_TURN // 2, 2))
    ordered: torch.Tensor = pairs.transpose(2, 3).reshape(values.shape)
    return ordered


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = rows.abs().amax(1)
    # A row of zeros, or nearly, gets the least scale there is; no quotient is above 448.
    scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    is_good = largest.isfinite()
    quotients = (rows / scale[:, None]).clamp(-_LARGEST, _LARGEST)
    values = torch.where(is_good[:, None], quotients, 0).to(torch.float8_e4m3fn)
    return values, torch.where(is_good, scale, torch.nan)
