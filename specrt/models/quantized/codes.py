"""Small unsigned integers out of words of 32 bits, and values of them by groups of columns."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes that lie one behind the other, lowest bits first, across the words of a row.

    Args:
        words: ``[R, W]`` int32.
        bits: of a code, 1..8.

    Returns:
        ``[R, W * 32 // bits]`` uint8.
    """
    if 8 % bits == 0:  # a code lies in one byte
        octets = words.contiguous().view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (octets[..., None] >> shifts & (1 << bits) - 1).flatten(1)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    first = torch.arange(0, words.shape[1] * 32 - bits + 1, bits)
    word, offset = first // 32, first % 32
    low, high = wide[:, word] >> offset, wide[:, word + 1] << (32 - offset)
    return ((low | high) & (1 << bits) - 1).to(torch.uint8)


def grouped_values(
    codes: torch.Tensor, zeros: torch.Tensor | int, scales: torch.Tensor, group_of: torch.Tensor
) -> torch.Tensor:
    """``(code - zero) * scale``, rounded once, to the scales' dtype: differences of codes are exact
    in any.

    Args:
        codes: ``[R, K]`` uint8.
        zeros: ``[R, G]`` uint8, or one for all.
        scales: ``[R, G]``.
        group_of: ``[K]`` int64: the group of each column, below G.
    """
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.to(torch.int16)[:, group_of]
    return codes.to(torch.int16).sub_(zeros).to(scales.dtype).mul_(scales[:, group_of])
