"""What a pass of a target over a chain of N nodes costs, in passes of one node.

``ms`` is the least CPU time of the process in ``--rounds`` turns, all sizes in turn, so that other
work on the machine shows little; with more than one thread it counts them all. ``cost`` is by the
pass of one node: what a round that drafts N - 1 tokens must win.

``--kinds``: ``own`` (as the checkpoint has its weights), ``int8``, ``rounded`` and ``split`` (its
weights as bfloat16, by rows of one part or of two).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.harness import Row, parser, report, start
from specrt import load
from specrt.cache import CacheBatch
from specrt.models.model import LlamaModel
from specrt.tree import Settler, TreeBuilder, stack

NODES = (1, 2, 4, 6, 8, 12, 16, 32)
KINDS: dict[str, dict[str, str]] = {
    "own": {},
    "int8": {"quantize": "int8"},
    "rounded": {"quantize": "none", "dtype": "bfloat16", "activations": "bfloat16"},
    "split": {"quantize": "none", "dtype": "bfloat16", "activations": "split"},
}
"""What :func:`specrt.load` is asked for."""


def passes(model: LlamaModel, counts: Sequence[int], prefix: int) -> dict[int, Callable[[], Any]]:
    """A pass over a chain of each number of nodes behind so many tokens, which commits nothing."""
    room = prefix + max(counts)
    cache = model.new_cache(max_pages=2 + room // 64)
    batch = CacheBatch(cache, [cache.open(room)])
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (room,), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in model.extend(ids[:prefix], batch):
        pass
    root = torch.tensor(ids[prefix : prefix + 1], dtype=torch.int32)

    def one(count: int) -> Callable[[], Any]:
        chain = TreeBuilder(root.item())
        chain.add_path(ids[prefix + 1 : prefix + count], count)
        most = torch.tensor([count], dtype=torch.int32)
        tree = Settler(vocab).settle(stack([chain]), root, most, count)
        return lambda: model.forward(tree, batch)

    return {count: one(count) for count in counts}


def least_seconds(contenders: Mapping[int, Callable[[], Any]], rounds: int) -> dict[int, float]:
    """The least CPU time of each in so many turns, behind two that are not counted."""
    least = dict.fromkeys(contenders, float("inf"))
    for turn in range(2 + rounds):
        for count, run in contenders.items():
            begin = time.process_time()
            run()
            if turn >= 2:
                least[count] = min(least[count], time.process_time() - begin)
    return least


def rows_of(target: str, kind: str, counts: Sequence[int], prefix: int, rounds: int) -> list[Row]:
    """A line for each number of nodes."""
    engine = load(target, progress=False, **KINDS[kind])  # type: ignore[arg-type]
    seconds = least_seconds(passes(engine.target, counts, prefix), rounds)
    return [
        {"kind": kind, "nodes": count, "ms": 1e3 * taken, "cost": taken / seconds[counts[0]]}
        for count, taken in seconds.items()
    ]


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--target", help="as specrt.load takes it; default: smollm2, of smoke runs builtin")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--nodes", type=int, nargs="+", help="default: 1 to 32")
    add("--prefix", type=int, default=200, help="tokens in front of the chain")
    add("--rounds", type=int, help="turns; default: 12")
    args = start(arguments)
    torch.set_num_threads(args.threads or 1)
    counts = args.nodes or ((1, 4) if args.quick else NODES)
    rounds = args.rounds or (2 if args.quick else 12)
    target = args.target or ("builtin" if args.quick else "smollm2")
    rows: list[Row] = []
    for kind in args.kinds:
        rows += rows_of(target, kind, counts, args.prefix, rounds)
    report("chain", rows, save=args.save)


if __name__ == "__main__":
    main()
