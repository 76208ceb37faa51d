"""Rotary embedding of a tree's rows, and the append of their keys and values to the cache."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "rope_append(Tensor(a!) q, Tensor k, Tensor v, Tensor depth, Tensor kv_len, Tensor first_node,"
    " Tensor num_nodes, Tensor block_table, Tensor cos_sin, Tensor(b!) k_cache, Tensor(c!) v_cache)"
    " -> ()",
    _C.rope_append,
)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    depth: torch.Tensor,
    kv_len: torch.Tensor,
    first_node: torch.Tensor,
    num_nodes: torch.Tensor,
    block_table: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Rope ``q`` in place; write roped keys, and values, to the slots of their tree nodes.

    Row i of sequence b is tree node ``first_node[b] + i``, at position ``kv_len[b] + depth[b, i]``
    and slot ``kv_len[b] + first_node[b] + i``. Rows at ``num_nodes[b]`` and beyond, and slots past
    the block table, are left alone. Counts are read when the kernel runs, not when it is captured.
    Computed in float32 and rounded once, so the CPU and a GPU give the same bits. Contents out of
    range reach no other memory: a position or page that there is not is the last one.

    Args:
        q: ``[B, N, Hq, d]`` float32, bfloat16 or float16, d even and at most 256; strided, roped in
            place.
        k: ``[B, N, Hkv, d]`` of q's dtype, strided.
        v: like ``k``.
        depth: ``[B, N]`` int32, distance from the root.
        kv_len: ``[B]`` int32, committed slots.
        first_node: ``[B]`` int32.
        num_nodes: ``[B]`` int32, rows of this call that are nodes.
        block_table: ``[B, max_pages]`` int32.
        cos_sin: ``[max_positions, d]`` float32 from ``specrt.models.rope.rope_table``.
        k_cache: ``[P, page_size, Hkv, d]`` float32, bfloat16 or float16, contiguous.
        v_cache: like ``k_cache``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    kernel = torch.ops.specrt.rope_append if torch.compiler.is_compiling() else _C.rope_append
    kernel(q, k, v, depth, kv_len, first_node, num_nodes, block_table, cos_sin, k_cache, v_cache)
