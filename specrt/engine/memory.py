"""A GPU's memory: what a target needs of it, and how many pages of keys and values get the rest.

There a cache is a pool of a fixed size: captured launches hold its address, and growing would need
old and new pages at once. So it is sized when an engine is made, by what is free then.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch

from specrt.cache import KVCache
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import CachingDrafter, Drafter, PrefixDrafter
from specrt.models.layouts import matrix_shapes
from specrt.models.model import LlamaModel
from specrt.models.prefill import GPU_PIECE
from specrt.models.step import GpuScratch, Workspace
from specrt.pages import PageGroup, page_groups
from specrt.reuse import power_of_two
from specrt.tree import MAX_NODES

PAGE_SIZE = 64
"""Tokens of a page of an engine's cache."""
MARGIN = 1 << 30
"""Bytes left to CUDA's libraries and graphs, to attention's and acceptance's workspaces (of some 15
MB for each size of trees, 128 MB for pieces of prompts), to drafters' buffers and to tables that
grow with the texts."""

_KEPT_TOKENS, _KEPT_BYTES = 1 << 16, 1 << 30  # where nobody says how many

_NOWHERE = Device(torch.device("meta"))


class Limits(Protocol):
    """What of :class:`~specrt.engine.limits.EngineLimits` takes memory."""

    @property
    def max_batch(self) -> int:
        """Sequences of a step."""

    @property
    def max_nodes(self) -> int:
        """Rows of each."""

    @property
    def prefill_chunk(self) -> int:
        """Tokens of prompts between two rounds."""

    @property
    def max_cached_tokens(self) -> int | None:
        """Tokens whose keys and values are held; None: as many as there is room for."""

    @property
    def max_shared_tokens(self) -> int | None:
        """Tokens that are kept while no sequence holds them; None: as many as suit."""


def size_check(
    config: ModelConfig, dtype: torch.dtype, limits: Limits, device: Device
) -> Callable[[int], None]:
    """What tells, of the bytes of a target's weights, whether an engine fits on a device.

    It needs room for the weights, for what steps compute in, and for the pages of
    ``max_cached_tokens``, or of the least that is of use: one tree of ``max_nodes`` and a page of
    text before it.

    Args:
        config: the target's, heads as its kernels run them.
        dtype: of its weights and cache.
        limits: the engine's.
        device: where to; on the CPU memory is known by trying.

    Returns:
        A function that raises MemoryError, naming what is needed and what is free.
    """

    def check(weights: int) -> None:
        if not device.is_gpu:
            return
        sizes = _Sizes(page_groups(config, dtype, PAGE_SIZE), config, limits)
        parts = {"weights": weights, "KV cache": sizes.bytes_of(_least_pages(limits))}
        parts["workspace"] = workspace_bytes(config, dtype, limits)
        free, total = device.free_memory()
        if sum(parts.values()) > free:
            raise _no_room(parts, (free, total), limits, device)

    return check


def make_cache(target: LlamaModel, drafter: Drafter, limits: Limits) -> KVCache:
    """The cache of an engine: on a GPU all of its pages, as many as are asked for or fit.

    With ``max_cached_tokens`` they are exactly that. Else they are what the free memory holds
    besides :func:`workspace_bytes` and as many pages of the drafter's own cache, and no more than
    ``max_batch`` sequences of the longest text could use. Of layers that see a window they are
    never more than that.

    Raises:
        MemoryError: there is no room for ``max_cached_tokens``, or for the least that is of use.
    """
    cache = target.new_cache(PAGE_SIZE, max_pages=_asked_pages(limits))
    if target.device.is_gpu:
        _fix(cache, target, drafter, limits)
    return cache


def share_beginnings(cache: KVCache, limits: Limits) -> None:
    """Let an engine's sequences share what they begin with, of its target or its drafter.

    Where the number of pages is fixed or limited, all may be kept: they are given up when they are
    needed. Else what is kept takes memory, and so it is bounded.
    """
    most = limits.max_shared_tokens
    if most is None and cache.max_pages is None:
        most = min(_KEPT_TOKENS, _KEPT_BYTES // cache.page_bytes * cache.page_size)
    cache.share(most)


def shared_cache(drafter: Drafter) -> KVCache | None:
    """A drafter's own, if of equal beginnings it needs only one."""
    if isinstance(drafter, PrefixDrafter) and isinstance(drafter, CachingDrafter):
        return drafter.cache if isinstance(drafter.cache, KVCache) else None
    return None


def workspace_bytes(config: ModelConfig, dtype: torch.dtype, limits: Limits) -> int:
    """Bytes that steps of an engine compute in on a GPU.

    Activations of ``max_batch * max_nodes`` rows or a piece of a prompt, logits of the former, and
    the rotary table, twice, for larger buffers are made before the smaller ones go; the workspace
    of ``linear``; and :data:`MARGIN`.
    """
    logit_rows = power_of_two(limits.max_batch * limits.max_nodes)
    piece = min(GPU_PIECE, limits.prefill_chunk)  # of a prompt
    rows = max(logit_rows, power_of_two(piece), MAX_NODES)
    is_interleaved = config.form.is_gated_by_silu
    work = Workspace.make(config, rows, logit_rows, dtype, _NOWHERE, is_interleaved=is_interleaved)
    tensors = [getattr(work, field.name) for field in fields(work)]
    buffers = sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))
    rope = (config.max_positions + MAX_NODES) * config.head_dim * torch.float32.itemsize
    linear = GpuScratch(config, matrix_shapes(config), _NOWHERE).linear
    return 2 * (buffers + rope) + linear.nbytes + MARGIN


@dataclass(frozen=True)
class _Sizes:
    """How many pages a cache has of each group, by how many it has of layers without a window."""

    groups: Sequence[PageGroup]
    config: ModelConfig
    limits: Limits
    num_again: int = 0
    """As of :class:`KVCache`."""

    def of(self, num_pages: int) -> list[int]:
        """As many of each group, but no more of a windowed one than ``max_batch`` can use."""
        return [
            num_pages if group.window is None else min(num_pages, self._most_of(group))
            for group in self.groups
        ]

    def bytes_of(self, num_pages: int) -> int:
        """Of these, and of the pages for scratch."""
        counts = zip(self.groups, self.of(num_pages), strict=True)
        return sum((count + 1) * group.page_bytes for group, count in counts)

    @property
    def most(self) -> int:
        """Pages that ``max_batch`` sequences of the longest text can use."""
        has_full = self.groups[0].window is None  # that comes first
        return self._most_of(self.groups[0 if has_full else -1])

    def _most_of(self, group: PageGroup) -> int:
        limits = self.limits
        longest = self.config.max_positions + limits.max_nodes
        # Two rounds are under way, and a drafter may look further ahead; one chunk of prompts is.
        rows = 3 * limits.max_nodes + self.num_again
        prompts = 0 if group.window is None else -(-limits.prefill_chunk // PAGE_SIZE)
        return limits.max_batch * group.num_pages_at_once(longest, rows) + prompts


def _fix(cache: KVCache, target: LlamaModel, drafter: Drafter, limits: Limits) -> None:
    config = replace(target.config, head_dim=cache.kv.shape[-1])
    caches = [cache, *_caches_of(drafter, target.device)]
    sizes = [_Sizes(one.groups, config, limits, one.num_again) for one in caches]

    def bytes_of(num_pages: int) -> int:
        return sum(each.bytes_of(num_pages) for each in sizes)

    workspace = workspace_bytes(config, target.dtype, limits)
    free, total = target.device.free_memory()
    least, asked, room = _least_pages(limits), _asked_pages(limits), free - workspace
    if bytes_of(least) > room:
        parts = {"KV cache": bytes_of(least), "workspace": workspace}
        raise _no_room(parts, (free, total), limits, target.device)
    most = range(sizes[0].most + 1)
    num_pages = asked or bisect_right(most, room, key=bytes_of) - 1
    for one, each in zip(caches, sizes, strict=True):
        one.fix(*each.of(num_pages))
    logging.getLogger("specrt").info(
        "KV cache: room for %s tokens, %s of %s free on %s (of %s)",
        " and ".join(str(count * PAGE_SIZE) for count in sizes[0].of(num_pages)),
        _size(bytes_of(num_pages)), _size(free), target.device, _size(total),
    )  # fmt: skip


def _caches_of(drafter: Drafter, device: Device) -> list[KVCache]:
    """A drafter's own, if it takes memory of the target's device."""
    cache = drafter.cache if isinstance(drafter, CachingDrafter) else None
    if not isinstance(cache, KVCache) or not cache.device.is_gpu:
        return []
    return [cache] if cache.device.place == device.place else []


def _asked_pages(limits: Limits) -> int | None:
    most = limits.max_cached_tokens
    return None if most is None else -(-most // PAGE_SIZE)


def _least_pages(limits: Limits) -> int:
    return _asked_pages(limits) or 1 + -(-limits.max_nodes // PAGE_SIZE)


def _no_room(
    parts: dict[str, int], memory: tuple[int, int], limits: Limits, device: Device
) -> MemoryError:
    """What is said where the sum of ``parts`` is more than is free; ``memory`` is that and all."""
    named = " + ".join(f"{name} {_size(size)}" for name, size in parts.items())
    free, total = map(_size, memory)
    smaller = "max_batch or max_nodes" if limits.max_cached_tokens is None else "max_cached_tokens"
    return MemoryError(
        f"no room on {device}: needed {_size(sum(parts.values()))} ({named}), free {free} of "
        f"{total}; a smaller {smaller} needs less, device='cpu' nothing of it"
    )


def _size(num_bytes: int) -> str:
    if num_bytes >= 1 << 30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
