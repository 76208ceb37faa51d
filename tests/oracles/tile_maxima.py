"""Keys of ``csrc/core/tile_maxima.h``, from logits."""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F

from specrt import _C

Tensor = torch.Tensor
TILE = 64
_SIGN = -(2**63)


def keys_of(scores: Tensor) -> Tensor:
    """``[M, V]`` float32 to ``[M, ceil(V / 64)]`` int64, of the best of every 64."""
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, ~bits, bits | 2**31) & (2**32 - 1)
    tokens = torch.arange(scores.shape[1])
    keys = ordered << 32 | (~tokens & (2**32 - 1))
    keys = torch.where(scores < float("inf"), keys, -1)
    missing = F.pad(keys ^ _SIGN, (0, -scores.shape[1] % TILE), value=_SIGN)  # in signed order
    return missing.view(len(scores), -1, TILE).amax(-1) ^ _SIGN


def scores_of(logits: Tensor, sampling: Tensor, position: int) -> Tensor:
    """Of one row ``[V]`` by the ``[8]`` words of its sampling."""
    top_p, temperature, min_p, *_, top_k, _, _, seed, _, _ = struct.unpack(
        "=d5f3iQ2q", struct.pack("=8q", *[int(word) for word in sampling])
    )
    is_filtered = 0 < top_k < len(logits) or top_p < 1 or min_p > 0
    if temperature == 0 or is_filtered:
        return logits
    noise = torch.empty(len(logits))
    _C.gumbel_noise(seed, position % 2**64, 0, noise)
    scaled = logits / torch.tensor(temperature)
    return torch.where(scaled < float("inf"), scaled + noise, scaled)


def tile_maxima(logits: Tensor, sampling: Tensor, history_len: Tensor, depth: Tensor) -> Tensor:
    """As ``linear`` leaves them: ``logits [B * N, V]``, ``depth [B, N]``."""
    scores = torch.empty_like(logits)
    for m, row in enumerate(logits):
        b, n = divmod(m, depth.shape[1])
        scores[m] = scores_of(row, sampling[b], int(history_len[b]) + int(depth[b, n]))
    return keys_of(scores)
