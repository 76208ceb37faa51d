"""Finds a row that sees, of a layer with a sliding window, a page which was given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.cache import SCRATCH_PAGE

Tensor = torch.Tensor


def check(k_cache: Tensor, parts: tuple[Tensor, ...], window: int) -> None:
    """Of each row that counts: the slots that it sees lie on pages of its sequence's."""
    # (The copies are the host's.)
    table, kv_len, _, num_nodes, ancestors = (part.clone() for part in parts)
    for b, count in enumerate(num_nodes.tolist()):
        for i in range(count):
            words = [word % (1 << 64) for word in ancestors[b, i].tolist()]
            path = [j for j in range(64 * len(words)) if words[j // 64] >> j % 64 & 1]
            length = int(kv_len[b])
            slots = torch.tensor([*range(length), *(length + node for node in path)][-window:])
            assert (table[b][slots // k_cache.shape[1]] != SCRATCH_PAGE).all(), (b, i, slots)


def watch(
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Callable[[], None]], None] = lambda call: call(),
) -> None:
    """Look after all launches of ``ops.tree_attention``.

    Args:
        monkeypatch: until it is undone.
        run: looks; where launches are captured, later.
    """
    usual = ops.tree_attention

    def tree_attention(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **options: Any
    ) -> Any:
        window, is_open = options.get("sliding_window"), options.get("is_open")

        def look() -> None:
            if is_open is None or is_open.any():
                check(k_cache, rest[:5], window)

        if window is not None:
            run(look)
        return usual(q, k_cache, v_cache, *rest, **options)

    monkeypatch.setattr(ops, "tree_attention", tree_attention)
