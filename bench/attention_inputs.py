"""A tree over a paged prefix: what tree attention and its contenders are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specrt import ops


def tree_mask(nodes: int) -> torch.Tensor:
    """``[N, N]`` bool, row i the ancestors of node i and itself, of a binary tree."""
    mask = torch.eye(nodes, dtype=torch.bool)
    for i in range(1, nodes):
        mask[i] |= mask[(i - 1) // 2]
    return mask


def ancestor_bits(mask: torch.Tensor) -> torch.Tensor:
    """``[N, W]`` int64, the rows of :func:`tree_mask` as unsigned bits, 64 a word."""
    words = []
    for start in range(0, mask.shape[1], 64):
        part = mask[:, start : start + 64].long()
        words.append((part << torch.arange(part.shape[1])).sum(dim=1))
    return torch.stack(words, dim=1)


@dataclass(frozen=True)
class Heads:
    """How many, and how long."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Shape:
    """Sequences that all have the same prefix and the same tree."""

    heads: Heads
    batch: int
    prefix: int
    nodes: int
    page_size: int

    @property
    def total(self) -> int:
        """Slots of a sequence in use."""
        return self.prefix + self.nodes

    @property
    def num_pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.total // self.page_size)


class Indices:
    """What is the same for every set of queries and caches of a shape; pages lie anywhere."""

    def __init__(self, shape: Shape, device: str) -> None:
        def repeated(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.expand(shape.batch, *tensor.shape).contiguous().to(device)

        pages = torch.randperm(shape.batch * shape.num_pages).int()
        self.tree = tree_mask(shape.nodes)
        self.table = pages.view(shape.batch, shape.num_pages).to(device)
        self.kv_len = repeated(torch.tensor(shape.prefix, dtype=torch.int32))
        self.first_node = repeated(torch.tensor(0, dtype=torch.int32))
        self.num_nodes = repeated(torch.tensor(shape.nodes, dtype=torch.int32))
        self.ancestors = repeated(ancestor_bits(self.tree))
        prefix = torch.ones(shape.nodes, shape.prefix, dtype=torch.bool)
        self.mask = torch.cat([prefix, self.tree], dim=1).to(device)
        """``[N, prefix + N]`` bool."""


class Tensors:
    """Random queries and caches, and room for the answer."""

    def __init__(
        self, shape: Shape, device: str, q_dtype: torch.dtype, cache_dtype: torch.dtype
    ) -> None:
        heads = shape.heads
        rows = (shape.batch, shape.nodes, heads.num_heads, heads.head_dim)
        pages = (shape.batch * shape.num_pages, shape.page_size, heads.num_kv_heads, heads.head_dim)
        self.q = torch.randn(rows, device=device, dtype=q_dtype)
        self.k_cache, self.v_cache = (
            torch.randn(pages, device=device, dtype=cache_dtype) for _ in range(2)
        )
        self.out = torch.full_like(self.q, float("nan"))

    def gathered(self, shape: Shape, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values out of their pages, heads first: ``[B, Hkv, prefix + N, d]`` each."""
        keys, values = (
            cache[table.long()].flatten(1, 2)[:, : shape.total].transpose(1, 2).contiguous()
            for cache in (self.k_cache, self.v_cache)
        )
        return keys, values


def attend(tensors: Tensors, indices: Indices, scale: float, **more: Any) -> torch.Tensor:
    """``ops.tree_attention`` over them; ``more`` as it takes it."""
    return ops.tree_attention(
        tensors.q,
        tensors.k_cache,
        tensors.v_cache,
        indices.table,
        indices.kv_len,
        indices.first_node,
        indices.num_nodes,
        indices.ancestors,
        scale,
        **more,
    )
