"""Acceptance against the same job in torch: argmax or softmax/top-p pipeline, then a walk.

Only rows on the path cost the kernel anything; the torch pipeline processes every row first, as
engines do, because it cannot know the path, and leaves penalties out. The greedy path is the full
depth of a binary tree.
"""

from __future__ import annotations

import torch

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt.accept import accept
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import DraftTree

MODES = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top_p": SamplingParams(temperature=0.8, seed=1, top_p=0.95),
    "top_k": SamplingParams(temperature=0.8, seed=1, top_k=50),
    "min_p": SamplingParams(temperature=0.8, seed=1, min_p=0.05),
    "penalties": SamplingParams(repetition_penalty=1.1, presence_penalty=0.3),
}
HISTORY = torch.zeros(1, 1, dtype=torch.int32)
HISTORY_LEN = torch.ones(1, dtype=torch.int32)


def binary_tree(nodes: int, logits: torch.Tensor) -> DraftTree:
    """First children hold each node's likeliest token, second children the runner-up."""
    parents = torch.tensor([[-1] + [(j - 1) // 2 for j in range(1, nodes)]], dtype=torch.int32)
    best = logits[0].topk(2).indices
    tokens = [0] + [int(best[(j - 1) // 2, (j - 1) % 2]) for j in range(1, nodes)]
    zeros = torch.zeros(1, nodes, dtype=torch.int32)
    count = torch.tensor([nodes], dtype=torch.int32)
    return DraftTree(torch.tensor([tokens], dtype=torch.int32), parents, zeros, zeros.long(), count)


def torch_accept(tree: DraftTree, logits: torch.Tensor, params: SamplingParams) -> list[int]:
    rows = logits[0]
    if params.is_greedy:
        drawn = rows.argmax(-1).tolist()
    else:
        probs = (rows / params.temperature).softmax(-1)
        if params.top_k:
            least = probs.topk(params.top_k).values[:, -1:]
            probs = probs.masked_fill(probs < least, 0.0)
        if params.min_p > 0.0:
            probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0.0)
        if params.top_p < 1.0:
            ordered, index = probs.sort(dim=-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= params.top_p] = 0.0
            probs = torch.zeros_like(probs).scatter_(1, index, ordered)
        drawn = torch.multinomial(probs, 1)[:, 0].tolist()
    tokens, parents = tree.draft_tokens[0].tolist(), tree.parents[0].tolist()
    node, out = 0, []
    while True:
        out.append(drawn[node])
        children = (j for j in range(node + 1, len(tokens)) if parents[j] == node)
        node = next((j for j in children if tokens[j] == drawn[node]), -1)
        if node < 0:
            return out


def compare(
    tree: DraftTree, logits: torch.Tensor, params: SamplingParams, table: SamplingTable
) -> dict[str, float]:
    return measure_interleaved(
        {
            "specrt": lambda: accept(tree, logits, table, HISTORY, HISTORY_LEN),
            "torch": lambda: torch_accept(tree, logits, params),
        },
        warmup=1,
        min_time=0.03,
        rounds=3,
    )


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    rows: list[Row] = []
    for vocab in (4096,) if args.quick else (4096, 32000, 128256, 262144):
        for nodes in (1, 8) if args.quick else (1, 8, 60):
            generator = torch.Generator().manual_seed(vocab + nodes)
            logits = torch.randn(1, nodes, vocab, generator=generator) * 3
            tree = binary_tree(nodes, logits)
            for mode, params in MODES.items():
                table = SamplingTable.build([params], [1], vocab)
                result = accept(tree, logits, table, HISTORY, HISTORY_LEN)
                times = compare(tree, logits, params, table)
                rows.append(
                    {
                        "vocab": vocab,
                        "nodes": nodes,
                        "mode": mode,
                        "path": int(result.accept_length) + 1,
                        "specrt_us": times["specrt"] * 1e6,
                        "torch_us": times["torch"] * 1e6,
                        "ratio": ratio_to(times["torch"], times["specrt"]),
                    }
                )
    report("tree_accept", rows, save=args.save)


if __name__ == "__main__":
    main()
