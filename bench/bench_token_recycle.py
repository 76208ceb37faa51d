"""Token Recycling's two steps against numpy and torch.

Rows: ``propose`` fills a template of N nodes for each of B sequences, against one gather a level in
numpy (as ``specrt/draft/recycle/drafter.py`` has it); ``learn`` takes the 8 best of N rows of V
logits each, against ``torch.topk``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt import ops
from specrt.draft.recycle.template import NUM_RANKS, make_template


def ints(*shape: int, most: int) -> torch.Tensor:
    return torch.randint(0, most, shape, dtype=torch.int32)


def timed(ways: Mapping[str, Callable[[], object]], other: str, **sizes: object) -> Row:
    times = measure_interleaved(dict(ways), warmup=2, min_time=0.03, rounds=5)
    return {
        **sizes,
        "specrt_us": 1e6 * times["specrt"],
        f"{other}_us": 1e6 * times[other],
        "ratio": ratio_to(times[other], times["specrt"]),
    }


def propose(batch: int, nodes: int, vocab: int) -> Row:
    template = make_template(nodes, 12, 128)
    tables, roots = ints(batch, vocab, NUM_RANKS, most=vocab), ints(batch, most=vocab)
    slots, tokens = torch.arange(batch, dtype=torch.int32), ints(batch, nodes, most=1)
    shape = (torch.from_numpy(part).int() for part in (template.parents, template.ranks))
    given = (tables, slots, roots, *shape, tokens)
    known, found = tables.numpy(), np.zeros((batch, nodes), dtype=np.int32)

    def in_numpy() -> np.ndarray:
        found[:, 0] = roots.numpy()
        for level in template.levels:
            above = found[:, template.parents[level]]
            found[:, level] = known[np.arange(batch)[:, None], above, template.ranks[level]]
        return found

    ops.recycle_propose(*given)
    assert np.array_equal(tokens.numpy(), in_numpy())
    ways = {"specrt": lambda: ops.recycle_propose(*given), "numpy": in_numpy}
    return timed(ways, "numpy", batch=batch, nodes=nodes, vocab=vocab)


def learn(batch: int, nodes: int, vocab: int) -> Row:
    logits, tokens = torch.randn(batch, nodes, vocab), ints(batch, nodes, most=1)
    tokens += torch.arange(nodes, dtype=torch.int32)
    counts, slots = ints(batch, most=1) + nodes, torch.arange(batch, dtype=torch.int32)
    tables = ints(batch, vocab, NUM_RANKS, most=vocab)
    is_own = ints(batch, vocab, most=1)
    path, accept_length = ints(batch, nodes, most=1), ints(batch, most=1)
    given = (logits, tokens, counts, path, accept_length, slots, tables, is_own)
    ops.recycle_learn(*given)
    assert torch.equal(tables[:, :nodes], logits.topk(NUM_RANKS, dim=2).indices.int())
    ways = {
        "specrt": lambda: ops.recycle_learn(*given),
        "topk": lambda: logits.topk(NUM_RANKS, dim=2).indices,
    }
    return timed(ways, "topk", batch=batch, nodes=nodes, vocab=vocab)


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    sizes = [(1, 8), (1, 64)] if args.quick else [(1, 8), (1, 64), (8, 16)]
    vocabs = (32_000,) if args.quick else (32_000, 128_256)
    rows = [
        {"op": name} | one(*size, vocab)
        for name, one in (("propose", propose), ("learn", learn))
        for vocab in vocabs
        for size in sizes
    ]
    report("token_recycle", rows, save=args.save)


if __name__ == "__main__":
    main()
