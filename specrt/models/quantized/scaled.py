"""Matrices of float8 or int8, a number a value, and their scales.

N outputs, K inputs. Values are those of compressed-tensors' ``NaiveQuantizationCompressor`` and of
transformers' ``Fp8Dequantize``, to the bit.
"""

from __future__ import annotations

import math

import torch

from specrt.config.quantization import Scheme
from specrt.models.quantized.parts import SCALES, Parts, StoredMatrix

NUMBERS = (torch.float8_e4m3fn, torch.int8)
"""What values are stored as."""
SCALE_NAMES = ("weight_scale", "weight_scale_inv")
"""Of which there is one; both are factors."""


class ScaledMatrix(StoredMatrix):
    """``weight [N, K]`` and a factor for all of it, for a row, a group of a row's columns or a
    block; of int8 a zero point, too, where the scheme is not symmetric."""

    main = "weight"
    others = (*SCALE_NAMES, "weight_zero_point")

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        info = parts.info("weight", "weight")
        if len(info.shape) != 2:
            raise parts.fault("weight", f"expected two dimensions, got {list(info.shape)}")
        self.shape = num_rows, num_columns = info.shape[0], info.shape[1]
        self._scale = next((name for name in SCALE_NAMES if parts.has(name)), SCALE_NAMES[0])
        shapes, why = _scale_shapes(scheme, num_rows, num_columns)
        stored = parts.check(self._scale, "weight", SCALES, *shapes, why=why)
        self.dtype = torch.float32 if scheme.is_rounded_once else stored
        self._has_zeros = not scheme.is_symmetric and parts.has("weight_zero_point")
        if self._has_zeros:
            parts.check("weight_zero_point", "weight", (torch.int8, stored), *shapes)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        values = self.parts.tensor("weight")[start:stop].to(self.dtype)
        if self._has_zeros:
            values = values - self._factors("weight_zero_point", start, stop)
        return values * self._factors(self._scale, start, stop)

    def _factors(self, end: str, start: int, stop: int) -> torch.Tensor:
        """``[1, 1]``, ``[R, 1]`` or ``[R, K]`` of ``dtype``, of R rows."""
        stored, scheme = self.parts.tensor(end).to(self.dtype), self.scheme
        if stored.numel() == 1:
            return stored.reshape(1, 1)
        if scheme.block is not None:
            of_rows = stored[torch.arange(start, stop) // scheme.block[0]]
            return of_rows.repeat_interleave(scheme.block[1], 1)[:, : self.shape[1]]
        rows = stored[start:stop].reshape(stop - start, -1)
        return rows if scheme.group_size is None else rows.repeat_interleave(scheme.group_size, 1)


def _scale_shapes(
    scheme: Scheme, num_rows: int, num_columns: int
) -> tuple[list[tuple[int, ...]], str]:
    """What shapes scales may have, and where that is from."""
    if scheme.block is not None:
        blocks = math.ceil(num_rows / scheme.block[0]), math.ceil(num_columns / scheme.block[1])
        return [blocks], f" (blocks of {list(scheme.block)})"
    if scheme.group_size is not None:
        return [
            (num_rows, math.ceil(num_columns / scheme.group_size))
        ], f" (groups of {scheme.group_size} columns)"
    return [(), (1,), (1, 1), (num_rows,), (num_rows, 1)], ""
