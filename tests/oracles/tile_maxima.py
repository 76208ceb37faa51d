"""Keys of ``csrc/core/tile_maxima.h``, from logits."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F

from specrt import _C
from specrt.ops import DraftMaxima

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


class Sampling(NamedTuple):
    """What of a row's ``[8]`` words is asked for here."""

    temperature: float
    seed: int
    is_filtered: bool

    @classmethod
    def of(cls, words: Tensor, vocab: int) -> Sampling:
        top_p, temperature, min_p, *_, top_k, _, _, seed, _, _ = struct.unpack(
            "=d5f3iQ2q", struct.pack("=8q", *[int(word) for word in words])
        )
        return cls(temperature, seed, 0 < top_k < vocab or top_p < 1 or min_p > 0)


def with_noise(scores: Tensor, seed: int, position: int, token_map: Tensor | None = None) -> Tensor:
    """Of one row ``[V]``; what is NaN or +inf stays so."""
    tokens = torch.arange(len(scores)) if token_map is None else token_map.long()
    noise = torch.empty(int(tokens.max()) + 1)
    _C.gumbel_noise(seed, position % 2**64, 0, noise)
    return torch.where(scores < float("inf"), scores + noise[tokens], scores)


def scores_of(logits: Tensor, words: Tensor, position: int) -> Tensor:
    """Of one row ``[V]`` by the ``[8]`` words of its sampling."""
    sampling = Sampling.of(words, len(logits))
    if sampling.temperature == 0 or sampling.is_filtered:
        return logits
    return with_noise(logits / torch.tensor(sampling.temperature), sampling.seed, position)


def tile_maxima(logits: Tensor, sampling: Tensor, history_len: Tensor, depth: Tensor) -> Tensor:
    """As ``linear`` leaves them: ``logits [B * N, V]``, ``depth [B, N]``."""
    scores = torch.empty_like(logits)
    for m, row in enumerate(logits):
        b, n = divmod(m, depth.shape[1])
        scores[m] = scores_of(row, sampling[b], int(history_len[b]) + int(depth[b, n]))
    return keys_of(scores)


def masses_of(logits: Tensor) -> Tensor:
    """``[M, V]`` to ``[M, ceil(V / 64)]`` float32: each tile's mass relative to its best logit."""
    tiles = F.pad(logits, (0, -logits.shape[1] % TILE), value=-torch.inf).unflatten(1, (-1, TILE))
    below = (tiles - tiles.amax(-1, keepdim=True)).contiguous()
    exps = torch.empty(below.numel())
    _C.scalar_exponentials(below.view(-1), exps, torch.empty(below.numel(), dtype=torch.int64))
    first, second, third, fourth = exps.view(*tiles.shape[:2], 4, 16).unbind(2)
    lanes = (first + second) + (third + fourth)
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def draft_maxima(logits: Tensor, maxima: DraftMaxima) -> tuple[Tensor, Tensor]:
    """Keys and masses as ``linear`` leaves them of a draft head; masses of rows that sample are
    nobody's."""
    scores = logits.clone()
    batch = 0 if maxima.sampling is None else len(maxima.sampling)
    for m in range(len(logits) if batch else 0):
        b = m // (len(logits) // batch)
        assert maxima.sampling is not None and maxima.position is not None
        sampling = Sampling.of(maxima.sampling[b], logits.shape[1])
        if not sampling.temperature > 0:
            continue
        scores[m] /= torch.tensor(sampling.temperature)
        if not sampling.is_filtered:
            position = int(maxima.position[b]) + maxima.level
            scores[m] = with_noise(scores[m], sampling.seed, position, maxima.token_map)
    return keys_of(scores), masses_of(logits)
