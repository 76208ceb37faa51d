"""Matrices of AWQ, GPTQ and compressed-tensors: codes of a few bits in words of 32.

N outputs, K inputs, G groups of inputs. Values are those of the formats' own dequantisers, to the
bit: AutoAWQ's ``dequantize_gemm``, GPTQModel's ``dequantize_weight``, compressed-tensors'
``PackedQuantizationCompressor.decompress``.
"""

from __future__ import annotations

import math

import torch

from specrt.config.quantization import Scheme
from specrt.models.quantized.codes import grouped_values, unpack
from specrt.models.quantized.parts import SCALES, Parts, StoredMatrix

_WORD = 32
_WORDS = (torch.int32,)
_INDEXES = (torch.int32, torch.int64)
# Where output 0, 1, .. 7 of eight lie in a word of AWQ's, in fours of bits from the lowest on.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


class _GroupedMatrix(StoredMatrix):
    """What the three have in common: a scale and, as a rule, a zero point a group of columns."""

    def _settle_groups(self, owner: str, scale: str, num_columns: int, num_groups: int) -> None:
        """Check that the group size which the configuration names is the one that was used."""
        size = self.scheme.group_size or num_columns
        if math.ceil(num_columns / size) != num_groups:
            raise self.parts.fault(
                scale,
                f"expected {math.ceil(num_columns / size)} groups of {size} columns "
                f"(quantization_config, {num_columns} columns of {self.parts.key(owner)}), "
                f"got {num_groups}",
            )

    def _group_of(self, index: str, num_columns: int, num_groups: int) -> torch.Tensor:
        """``[K]`` int64: the group of each column."""
        if not self.parts.has(index):
            size = self.scheme.group_size or num_columns
            return torch.arange(num_columns) // size
        group_of = self.parts.tensor(index).to(torch.int64)
        if not bool(((group_of >= 0) & (group_of < num_groups)).all()):
            raise self.parts.fault(index, f"expected groups 0..{num_groups - 1}, got others")
        return group_of


class AwqMatrix(_GroupedMatrix):
    """``qweight [K, N / 8]``, ``qzeros [G, N / 8]``, ``scales [G, N]``, outputs of eights in an
    order of their own."""

    main, others = "qweight", ("qzeros", "scales")

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        num_inputs, num_words = _matrix_shape(parts, "qweight")
        num_outputs = num_words * _WORD // scheme.bits
        num_groups = _matrix_shape(parts, "scales", "qweight")[0]
        self.dtype = parts.check("scales", "qweight", SCALES, (num_groups, num_outputs))
        parts.check("qzeros", "qweight", _WORDS, (num_groups, num_words))
        self._settle_groups("qweight", "scales", num_inputs, num_groups)
        self.shape = num_outputs, num_inputs

    def rows(self, start: int, stop: int) -> torch.Tensor:
        first, last = start // 8, math.ceil(stop / 8)
        rows = slice(start - first * 8, stop - first * 8)

        def codes(end: str) -> torch.Tensor:
            fours = unpack(self.parts.tensor(end)[:, first:last], self.scheme.bits)
            ordered: torch.Tensor = fours.unflatten(1, (-1, 8))[..., _AWQ_PLACES].flatten(1)
            return ordered[:, rows].T.contiguous()

        scales = self.parts.tensor("scales")[:, start:stop].T
        num_inputs = self.shape[1]
        group_of = torch.arange(num_inputs) // (self.scheme.group_size or num_inputs)
        return grouped_values(codes("qweight"), codes("qzeros"), scales, group_of)


class GptqMatrix(_GroupedMatrix):
    """``qweight [K * bits / 32, N]``, ``qzeros [G, N * bits / 32]``, ``scales [G, N]`` and, where
    columns are not in the order of their groups, ``g_idx [K]``."""

    main, others = "qweight", ("qzeros", "scales", "g_idx")

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        num_words, num_outputs = _matrix_shape(parts, "qweight")
        num_inputs = num_words * _WORD // scheme.bits
        if parts.has("g_idx"):
            parts.check("g_idx", "qweight", _INDEXES, (num_inputs,), why=f" ({scheme.bits} bits)")
        num_groups = _matrix_shape(parts, "scales", "qweight")[0]
        self.dtype = parts.check("scales", "qweight", SCALES, (num_groups, num_outputs))
        zero_words = math.ceil(num_outputs * scheme.bits / _WORD)
        parts.check("qzeros", "qweight", _WORDS, (num_groups, zero_words))
        self._settle_groups("qweight", "scales", num_inputs, num_groups)
        self.shape = num_outputs, num_inputs

    def rows(self, start: int, stop: int) -> torch.Tensor:
        codes = unpack(self.parts.tensor("qweight")[:, start:stop].T, self.scheme.bits)
        scales = self.parts.tensor("scales")[:, start:stop].T
        group_of = self._group_of("g_idx", self.shape[1], scales.shape[1])
        return grouped_values(codes, self._zeros()[:, start:stop].T, scales, group_of)

    def _zeros(self) -> torch.Tensor:
        """``[G, N]`` uint8."""
        words, bits = self.parts.tensor("qzeros"), self.scheme.bits
        if not self.scheme.has_offset:
            return unpack(words, bits)
        if _WORD % bits:
            return unpack(words, bits) + 1 & (1 << bits) - 1
        # One was taken from words as a whole, borrowing from the next code below 0.
        ones = sum(1 << first for first in range(0, _WORD, bits))
        return unpack((words.to(torch.int64) + ones).to(torch.int32), bits)


class PackQuantizedMatrix(_GroupedMatrix):
    """``weight_packed [N, K * bits / 32]``, ``weight_scale [N, G]``, ``weight_shape [2]`` and,
    where they are there, ``weight_zero_point`` and ``weight_g_idx [K]``. Codes are more by
    ``2 ** (bits - 1)`` than what they stand for."""

    main = "weight_packed"
    others = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        num_outputs, num_words = _matrix_shape(parts, "weight_packed")
        parts.check("weight_shape", "weight_packed", (*_INDEXES, torch.int16), (2,))
        rows, num_inputs = parts.tensor("weight_shape").tolist()
        if rows != num_outputs or math.ceil(num_inputs * scheme.bits / _WORD) != num_words:
            raise parts.fault(
                "weight_packed",
                f"expected {scheme.bits} bits of {[rows, num_inputs]} (weight_shape), "
                f"got {[num_outputs, num_words]} words",
            )
        info = parts.info("weight_scale", "weight_packed")
        num_groups = info.shape[-1] if len(info.shape) == 2 else 1
        shapes = [(num_outputs, num_groups), *([(num_outputs,)] if num_groups == 1 else [])]
        self.dtype = parts.check("weight_scale", "weight_packed", SCALES, *shapes)
        self._settle_groups("weight_packed", "weight_scale", num_inputs, num_groups)
        if not scheme.is_symmetric:
            self._check_zeros(num_outputs, num_groups)
        if parts.has("weight_g_idx"):
            parts.check("weight_g_idx", "weight_packed", _INDEXES, (num_inputs,))
        self.shape = num_outputs, num_inputs

    def _check_zeros(self, num_outputs: int, num_groups: int) -> None:
        words = math.ceil(num_outputs * self.scheme.bits / _WORD), num_groups
        shapes = words, (num_outputs, num_groups)
        self.parts.check("weight_zero_point", "weight_packed", (torch.int32, torch.int8), *shapes)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        num_inputs, bits = self.shape[1], self.scheme.bits
        codes = unpack(self.parts.tensor("weight_packed")[start:stop], bits)[:, :num_inputs]
        scales = self.parts.tensor("weight_scale")[start:stop].reshape(stop - start, -1)
        zeros: torch.Tensor | int = 1 << bits - 1
        if not self.scheme.is_symmetric:
            zeros = self._zeros(start, stop)
        return grouped_values(codes, zeros, scales, self._groups(scales.shape[1]))

    def _zeros(self, start: int, stop: int) -> torch.Tensor:
        """``[stop - start, G]``, as codes are stored."""
        stored, bits = self.parts.tensor("weight_zero_point"), self.scheme.bits
        if stored.dtype == torch.int8:  # before these were packed too
            return stored[start:stop].to(torch.int16) + (1 << bits - 1)
        return unpack(stored.T, bits)[:, start:stop].T

    def _groups(self, num_groups: int) -> torch.Tensor:
        group_of = self.parts.has("weight_g_idx") and self.parts.tensor("weight_g_idx")
        if isinstance(group_of, torch.Tensor) and bool((group_of == -1).any()):  # not yet known
            return torch.arange(self.shape[1]) // (self.scheme.group_size or self.shape[1])
        return self._group_of("weight_g_idx", self.shape[1], num_groups)


def _matrix_shape(parts: Parts, end: str, owner: str = "") -> tuple[int, int]:
    shape = parts.info(end, owner or end).shape
    if len(shape) != 2:
        raise parts.fault(end, f"expected two dimensions, got {list(shape)}")
    return shape[0], shape[1]
