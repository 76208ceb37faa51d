"""Growing draft trees against torch: log_softmax, topk a node, topk of the children; then rerank.

Columns: R logits of F nodes (1 at the root's level, else K), or C candidates of which N stay.
Torch's coupled ranking draws its own noise, as it has no counter-based one.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.harness import Row, against_torch, parser, report, start
from specrt.ops import tree_expand, tree_rerank
from specrt.ops.tree_build import expand_workspace_size
from specrt.sampling import SamplingParams, sampling_row

TEMPERATURE = 0.8
NODES, TOP_K = 60, 10  # of the reranked tree


PLAIN = None, None
COUPLED = (
    sampling_row(SamplingParams(temperature=TEMPERATURE, seed=1), 1)[None],
    torch.tensor([7], dtype=torch.int32),
)


class Level:
    """One level's buffers: a frontier of ``width`` nodes, K children each."""

    def __init__(self, rows: int, width: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(rows + width)
        self.level = 0 if width == 1 else 1
        self.top_k = top_k
        self.logits = torch.randn(1, width, rows, generator=generator) * 3
        self.scores = torch.zeros(1, width)
        ints = torch.zeros(6, 1, top_k + top_k * top_k, dtype=torch.int32)
        self.read = (self.scores, ints[0, :, :width], torch.zeros(1, width, 2, dtype=torch.int64))
        self.pool = (ints[1], ints[2], torch.zeros(1, ints.shape[2]))
        self.written = (
            ints[3, :, :top_k],
            torch.zeros(1, top_k),
            ints[4, :, :top_k],
            ints[5, :, :top_k],
            torch.zeros(1, top_k, 2, dtype=torch.int64),
        )
        self.workspace = torch.empty(torch.get_num_threads(), expand_workspace_size(rows))

    def ours(self, sampling: torch.Tensor | None, position: torch.Tensor | None) -> None:
        tree_expand(
            self.logits,
            *self.read,
            None,
            sampling,
            position,
            self.level,
            self.workspace,
            *self.pool,
            *self.written,
        )

    def torch_plain(self) -> tuple[torch.Tensor, ...]:
        best = self.logits[0].log_softmax(-1).topk(self.top_k)
        scores = (best.values + self.scores[0, :, None]).view(-1)
        chosen = scores.topk(self.top_k)
        return best.indices.view(-1)[chosen.indices], chosen.values, chosen.indices // self.top_k

    def torch_coupled(self) -> tuple[torch.Tensor, ...]:
        law = (self.logits[0] / TEMPERATURE).log_softmax(-1)
        best = law.sub_(torch.empty_like(law).exponential_().log_()).topk(self.top_k)
        scores = (best.values.log_softmax(-1) + self.scores[0, :, None]).view(-1)
        chosen = scores.topk(self.top_k)
        return best.indices.view(-1)[chosen.indices], chosen.values, chosen.indices // self.top_k


class Rerank:
    """A pool of ``depth`` levels below the root's children."""

    def __init__(self, depth: int) -> None:
        generator = torch.Generator().manual_seed(depth)
        group = TOP_K * TOP_K
        size = TOP_K + depth * group
        self.tokens = torch.zeros(1, size, dtype=torch.int32)
        self.parents = torch.full((1, size), -1, dtype=torch.int32)
        self.scores = -torch.randn(1, size, generator=generator).abs_()
        above = slice(0, TOP_K)
        for first in range(TOP_K, size, group):
            here = slice(first, first + group)
            best = self.scores[0, above].topk(TOP_K).indices + above.start
            self.parents[0, here] = best.repeat_interleave(TOP_K).int()
            self.scores[0, here] += self.scores[0, self.parents[0, here].long()]
            above = here
        ints = torch.zeros(2, 1, NODES, dtype=torch.int32)
        self.root = torch.zeros(1, dtype=torch.int32)
        self.written = (
            *ints,
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, NODES),
        )

    def ours(self) -> None:
        size = self.tokens.shape[1]
        pool = (self.tokens, self.parents, self.scores)
        tree_rerank(*pool, size, self.root, *self.written)

    def torch_rerank(self) -> tuple[torch.Tensor, ...]:
        index = self.scores[0].topk(NODES - 1).indices.sort().values
        above = self.parents[0][index]
        parents = torch.searchsorted(index, above) + 1
        parents[above < 0] = 0
        return self.tokens[0][index], parents


def expand_rows(size: int, width: int, top_k: int) -> list[Row]:
    level = Level(size, width, top_k)
    facts = {"size": size, "nodes": width, "K": top_k}
    return [
        against_torch(partial(level.ours, *PLAIN), level.torch_plain, op="expand", **facts),
        against_torch(partial(level.ours, *COUPLED), level.torch_coupled, op="coupled", **facts),
    ]


def rerank_row(depth: int) -> Row:
    rerank = Rerank(depth)
    facts = {"size": rerank.tokens.shape[1], "nodes": NODES, "K": TOP_K}
    return against_torch(rerank.ours, rerank.torch_rerank, op="rerank", **facts)


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    widths = ((1, 10), (10, 10)) if args.quick else ((1, 4), (4, 4), (1, 10), (10, 10))
    rows: list[Row] = []
    for size in (1024,) if args.quick else (1024, 4096, 32000, 128256):
        for width, top_k in widths:
            rows += expand_rows(size, width, top_k)
    rows += [rerank_row(depth) for depth in ((2,) if args.quick else (2, 5, 8))]
    report("tree_build", rows, save=args.save)


if __name__ == "__main__":
    main()
