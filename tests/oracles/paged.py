"""Random trees and paged caches, and attention over them in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


def random_parents(num_nodes: int, generator: torch.Generator) -> list[int]:
    return [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, num_nodes)]


def lineage(parents: list[int], node: int) -> list[int]:
    """Nodes from the root down to ``node``."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def pack_bits(paths: list[list[int]], num_words: int) -> Tensor:
    rows = []
    for path in paths:
        words = [0] * num_words
        for j in path:
            words[j // 64] |= 1 << (j % 64)
        rows.append([w - (1 << 64) if w >> 63 else w for w in words])
    return torch.tensor(rows, dtype=torch.int64)


@dataclass
class Pages:
    """One sequence's slots scattered over pages; everything not written is NaN."""

    k: Tensor  # [P, page_size, Hkv, d]
    v: Tensor
    block_table: Tensor  # [max_pages]

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        size = self.k.shape[1]
        pages = self.block_table[slots // size].long()
        self.k[pages, slots % size] = k
        self.v[pages, slots % size] = v


def make_pages(
    num_slots: int,
    page_size: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Pages:
    num_pages = -(-num_slots // page_size)
    shape = (num_pages + 2, page_size, heads, head_dim)
    order = torch.randperm(num_pages + 2, generator=generator)[:num_pages]
    return Pages(
        torch.full(shape, float("nan"), dtype=dtype),
        torch.full(shape, float("nan"), dtype=dtype),
        order.to(torch.int32),
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, cap: float | None = None
) -> Tensor:
    """One node: q ``[Hq, d]`` over keys and values ``[S, Hkv, d]``, computed in ``dtype``."""
    group = q.shape[0] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, 1)
    values = v.to(dtype).repeat_interleave(group, 1)
    scores = torch.einsum("hd,shd->hs", q.to(dtype), keys) * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    return torch.einsum("hs,shd->hd", scores.softmax(-1), values)
