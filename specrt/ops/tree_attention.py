"""Row-invariant attention of tree nodes over the paged prefix and their ancestors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from specrt import _C
from specrt.ops import registry
from specrt.ops.rope_append import rope_append

registry.register(
    "tree_attention(Tensor q, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor block_table,"
    " Tensor kv_len, Tensor first_node, Tensor num_nodes, Tensor ancestors, float scale,"
    " Tensor(a!) out, Tensor(b!)? workspace, Tensor? k, Tensor? v, Tensor? depth, Tensor? cos_sin,"
    " int num_warps, int blocks_per_sm, int window, int num_sinks, Tensor? is_open,"
    " int sliding_window, float cap) -> ()",
    _C.tree_attention,
)


@dataclass(frozen=True)
class Append:
    """What :func:`specrt.ops.rope_append` would have rotated and appended before."""

    k: torch.Tensor
    """``[B, N, Hkv, d]`` in q's type, strided; on a GPU rows lie at multiples of 16 bytes."""
    v: torch.Tensor
    """Like ``k``."""
    depth: torch.Tensor
    """``[B, N]`` int32, distance from the root."""
    cos_sin: torch.Tensor
    """``[max_positions, d]`` float32 from ``specrt.models.rope.rope_table``."""


@dataclass(frozen=True)
class AttentionPlan:
    """How a launch of :func:`tree_attention` is laid out on a GPU; the CPU needs no plan.

    Every plan gives the same bits, so it is chosen for speed alone. With both fields 0 it is the
    one that was measured (``csrc/tree_attention/variants.h``), where none was, by rule.
    """

    num_warps: int = 0
    """Of a block of threads, with 16 rows each: 4 or 8. 0: 4 for up to 64 rows a KV head."""
    blocks_per_sm: int = 0
    """Sequences are split until each SM has so many blocks, 1 to 16, as far as they are long
    enough. 0: as many as run at a time, 1 or 2."""


_ALL = 2**31  # more slots than there are


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_len: torch.Tensor,
    first_node: torch.Tensor,
    num_nodes: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    append: Append | None = None,
    plan: AttentionPlan | None = None,
    window: int | None = None,
    num_sinks: int = 0,
    is_open: torch.Tensor | None = None,
    sliding_window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """``softmax(scale * q k^T) v`` over slots 0..kv_len-1, then the slots of the row's ancestors.

    There are two windows. A model's, ``sliding_window``, goes with the row: its own key, at the
    position ``kv_len`` + how many nodes are above it, and those before it at a distance below
    ``sliding_window`` are seen, committed or not. A drafter's, ``window``, is of the sequence: only
    slots below ``num_sinks`` and from ``kv_len - window`` on are seen of those that are committed,
    and count as if they were all there are. A long prefix costs what a short one does.

    A row's bits depend on its query, the sequence of its visible keys and, with
    ``sliding_window``, the first one's position alone: not on how much of that sequence is
    committed, the other rows, the pages, the threads or the instruction set.
    Contents out of range reach no other memory: counts are clamped, a page that the cache lacks is
    its last.

    Args:
        q: ``[B, N, Hq, d]`` float32, bfloat16 or float16, strided; N at most 128, d a multiple of
            16 up to 256. On a GPU: bfloat16 or float16, d one of 64, 80, 96 and 128.
        k_cache: ``[P, page_size, Hkv, d]`` float32, bfloat16 or float16 (on a GPU: q's type),
            contiguous; Hkv divides Hq. Slots that no row sees are never read, but for those
            between the first slots of rows' sliding windows, which reach no result.
        v_cache: like ``k_cache``.
        block_table: ``[B, max_pages]`` int32.
        kv_len: ``[B]`` int32, committed slots.
        first_node: ``[B]`` int32, the tree node of row 0.
        num_nodes: ``[B]`` int32, rows of this call that are nodes; the rest of ``out`` is zeroed.
        ancestors: ``[B, N, W]`` int64 as unsigned bits, W at most 2: bit j of row i means tree node
            j is the row's node or above it.
        scale: usually ``d ** -0.5``.
        out: like ``q``; made if not given.
        workspace: on a GPU, float32, at least :func:`tree_attention_workspace`, zeroed when it was
            made; launches of any shapes may share it, one after another. Made if not given.
        append: ``q`` is not rotated yet, and the rows' keys and values are these. On a GPU that is
            part of the launch; on the CPU ``rope_append`` runs first, and rotates ``q`` in place.
        plan: on a GPU, another layout of the launch than the one chosen for the shape.
        window: committed slots that are seen, the last ones, at least 1; None: all.
        num_sinks: and the first ones that are seen besides; of no meaning without a window.
        is_open: ``[B]`` int32. If all are 0 nothing is read or written, but for ``rope_append`` on
            the CPU. None: all are open.
        sliding_window: positions that a row sees, the last one its own, at least 1; None: all. Not
            together with ``window``.
        cap: c > 0: scores s, scaled, become ``c * tanh(s / c)`` (Gemma 2, arXiv 2408.00118, 2.3).

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or there is no such plan; the
            argument is named.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if workspace is None and registry.is_on_gpu(q):
        batch, num_nodes_max, num_heads, head_dim = q.shape
        max_len = block_table.shape[1] * k_cache.shape[1]
        floats = tree_attention_workspace(
            batch, num_heads, k_cache.shape[2], head_dim, num_nodes_max,
            max_len if window is None else min(max_len, window + num_sinks), q.device, plan,
            sliding_window,
        )  # fmt: skip
        workspace = torch.zeros(floats, device=q.device)
    if append is not None and not registry.is_on_gpu(q):
        rope_append(
            q, append.k, append.v, append.depth, kv_len, first_node, num_nodes, block_table,
            append.cos_sin, k_cache, v_cache,
        )  # fmt: skip
        append = None
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 slot, got {window}")
    _check(sliding_window, cap, window)
    new = (append.k, append.v, append.depth, append.cos_sin) if append else (None,) * 4
    is_compiling = torch.compiler.is_compiling()
    kernel = torch.ops.specrt.tree_attention if is_compiling else _C.tree_attention
    kernel(
        q, k_cache, v_cache, block_table, kv_len, first_node, num_nodes, ancestors, scale, out,
        workspace, *new, *_choice(plan), min(window or 0, _ALL), min(num_sinks, _ALL), is_open,
        min(sliding_window or 0, _ALL), cap or 0.0,
    )  # fmt: skip
    return out


def tree_attention_workspace(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_nodes: int,
    max_len: int,
    device: torch.device | int,
    plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
) -> int:
    """Floats of ``workspace`` that :func:`tree_attention` needs on a GPU.

    Args:
        batch: B.
        num_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: d.
        num_nodes: N.
        max_len: slots of a sequence's pages, ``block_table.shape[1] * page_size``; with a window no
            more than ``window + num_sinks``.
        device: the tensors', or a GPU's index. One that names no GPU means the current one.
        plan: what :func:`tree_attention` will be given.
        sliding_window: likewise. Layers of several windows may share the largest workspace.

    Raises:
        ValueError: the heads cannot be grouped, or there is no such plan or window.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads ({num_heads}), got {num_kv_heads}"
        )
    group = num_heads // num_kv_heads
    _check(sliding_window)
    index, window = _gpu_index(device), min(sliding_window or 0, _ALL)
    sizes = batch, num_kv_heads, group, num_nodes, head_dim, max_len
    return int(_C.tree_attention_workspace(index, *sizes, *_choice(plan), window))


def _check(sliding_window: int | None, cap: float | None = None, window: int | None = None) -> None:
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: expected at least 1 position, got {sliding_window}")
    if sliding_window is not None and window is not None:
        raise ValueError(f"sliding_window: expected None beside a window, got {sliding_window}")
    if cap is not None and not 0.0 < cap < math.inf:
        raise ValueError(f"cap: expected a number above 0, got {cap}")


def _gpu_index(device: torch.device | int) -> int:
    """-1 where none is named."""
    if isinstance(device, int):
        return device
    return device.index if device.type == "cuda" and device.index is not None else -1


def _choice(plan: AttentionPlan | None) -> tuple[int, int]:
    return (plan.num_warps, plan.blocks_per_sm) if plan else (0, 0)
