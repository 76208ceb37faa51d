"""Attention to a sliding window, row by row: what a row sees is gathered, and nothing else read.

It also finds a row that would see a page which was given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.cache import SCRATCH_PAGE
from specrt.models.model import LlamaModel

Tensor = torch.Tensor


def window_of(models: Sequence[LlamaModel], k_cache: Tensor) -> int | None:
    """Of the layer of these models whose keys these are; None of another's."""
    for model in models:
        for cache in model._caches:
            for layer in range(model.config.num_layers):
                if cache.layer(layer)[0].data_ptr() == k_cache.data_ptr():
                    return model.config.form.layer(layer).window
    return None


def seen_by(arguments: tuple[Any, ...], window: int) -> list[tuple[int, int, Tensor]]:
    """Of each row that counts: its sequence, its place there, and the slots that it sees."""
    _, k_cache, _, *parts = arguments
    # (The copies are the host's.)
    table, kv_len, _, num_nodes, ancestors = (part.clone() for part in parts[:5])
    found = []
    for b, count in enumerate(num_nodes.tolist()):
        for i in range(count):
            words = [word % (1 << 64) for word in ancestors[b, i].tolist()]
            path = [j for j in range(64 * len(words)) if words[j // 64] >> j % 64 & 1]
            length = int(kv_len[b])
            slots = torch.tensor([*range(length), *(length + node for node in path)][-window:])
            assert (table[b][slots // k_cache.shape[1]] != SCRATCH_PAGE).all(), (b, i, slots)
            found.append((b, i, slots))
    return found


def attend(arguments: tuple[Any, ...], window: int) -> int:
    """As ``ops.tree_attention`` whose rows are in place already; how many slots were seen."""
    q, k_cache, v_cache, table, _, _, _, _, scale, out = arguments
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    bit, size, rows = one[None, None].long(), k_cache.shape[1], seen_by(arguments, window)
    out.zero_()
    for b, i, slots in rows:
        pages = table[b][slots // size].long()
        seen = [cache[pages, slots % size][None].contiguous() for cache in (k_cache, v_cache)]
        place = zero[None], one * (len(slots) - 1), zero, one, bit
        row, given = q[b : b + 1, i : i + 1], out[b : b + 1, i : i + 1]
        _C.tree_attention(row, *seen, *place, scale, given, *(None,) * 5, 0, 0, 0, 0, None)
    return sum(len(slots) for *_, slots in rows)


def stand_in(
    monkeypatch: pytest.MonkeyPatch,
    models: Sequence[LlamaModel],
    run: Callable[[Callable[[], None]], None] = lambda call: call(),
) -> list[int]:
    """Let layers with a window attend so, where the model does not ask for it; look after it where
    it does.

    Args:
        monkeypatch: until it is undone.
        models: whose.
        run: runs it; where launches are captured, later.

    Returns:
        How many slots all rows of such a layer have seen, launch by launch.
    """
    usual, num_seen = ops.tree_attention, list[int]()

    def tree_attention(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        table: Tensor,
        kv_len: Tensor,
        first_node: Tensor,
        num_nodes: Tensor,
        ancestors: Tensor,
        scale: float,
        out: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        given = q, k_cache, v_cache, table, kv_len, first_node, num_nodes, ancestors, scale
        assert out is not None
        if (window := window_of(models, k_cache)) is None:
            return usual(*given, out=out, **options)
        append, is_open = options.get("append"), options.get("is_open")
        if options.get("sliding_window") is not None:
            run(lambda: num_seen.append(sum(len(row[2]) for row in seen_by(given, window))))
            return usual(*given, out=out, **options)

        def call() -> None:
            if is_open is not None and not is_open.any():
                return
            if append is not None:
                rows = append.k, append.v, append.depth, kv_len, first_node, num_nodes, table
                _C.rope_append(q, *rows, append.cos_sin, k_cache, v_cache)
            num_seen.append(attend((*given, out), window))

        run(call)
        return out

    monkeypatch.setattr(ops, "tree_attention", tree_attention)
    return num_seen
