"""Settling drafts against the same on the host in Python, node by node and all nodes at once.

Columns: B trees of N nodes; the call through Python, and the kernel alone, launched as a graph;
Python's integers (as ``specrt.tree`` has them), and numpy, which doubles what is known of ancestors
round by round; how much the better of these takes for one call of ours.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt.ops import tree_settle
from specrt.ops.graph import CpuGraph

VOCAB = 32000


class Drafts:
    """``batch`` trees of ``nodes`` nodes, each with up to three children."""

    def __init__(self, batch: int, nodes: int) -> None:
        node = torch.arange(nodes, dtype=torch.int32)
        self.given = (
            (node * 3).repeat(batch, 1),
            ((node - 1) // 3).repeat(batch, 1),
            *torch.full((3, batch), nodes, dtype=torch.int32),
        )
        self.out = (
            *torch.zeros(3, batch, nodes, dtype=torch.int32),
            torch.zeros(batch, nodes, -(-nodes // 64), dtype=torch.int64),
            torch.zeros(batch, dtype=torch.int32),
        )

    def ours(self) -> None:
        tree_settle(*self.given, VOCAB, *self.out)

    def in_python(self) -> list[list[int]]:
        tokens, parents, counts, roots, most = (tensor.tolist() for tensor in self.given)
        bits = []
        for b in range(len(roots)):
            depth, above = [0], [1]
            for node in range(1, min(counts[b], most[b], len(tokens[b]))):
                parent = parents[b][node]
                if not (0 <= parent < node and 0 <= tokens[b][node] < VOCAB):
                    break
                depth.append(depth[parent] + 1)
                above.append(above[parent] | 1 << node)
            bits.append(above)
        return bits

    def in_numpy(self) -> tuple[np.ndarray, ...]:
        tokens, parents, counts, roots, most = (tensor.numpy() for tensor in self.given)
        nodes = tokens.shape[1]
        node = np.arange(nodes)
        stands = (tokens >= 0) & (tokens < VOCAB) & (parents >= 0) & (parents < node)
        stands &= node < np.minimum(counts, most)[:, None]
        stands[:, 0] = True
        kept = np.logical_and.accumulate(stands, axis=1)
        up = np.where(kept, parents, 0)
        up[:, 0] = 0
        known = np.broadcast_to(np.eye(nodes, dtype=bool), (len(up), nodes, nodes))
        for _ in range(nodes.bit_length()):
            known = known | np.take_along_axis(known, up[:, :, None], 1)
            up = np.take_along_axis(up, up, 1)
        known = known & kept[:, :, None]
        settled = np.where(kept, tokens, 0)
        settled[:, 0] = roots
        above = np.where(kept, parents, 0)
        above[:, 0] = -1
        bits = np.packbits(known, axis=2, bitorder="little")
        padded = np.pad(bits, ((0, 0), (0, 0), (0, -bits.shape[2] % 8)))
        depth = (known.sum(2) - kept).astype(np.int32)
        return settled, above, depth, padded.view(np.int64), kept.sum(1, dtype=np.int32)


def one_row(batch: int, nodes: int) -> Row:
    drafts = Drafts(batch, nodes)
    graph = CpuGraph.capture(drafts.ours)
    drafts.ours()
    for ours, other in zip(drafts.out, drafts.in_numpy(), strict=True):
        assert np.array_equal(ours.numpy(), other)
    times = measure_interleaved(
        {
            "specrt": drafts.ours,
            "kernel": graph.launch,
            "python": drafts.in_python,
            "numpy": drafts.in_numpy,
        },
        warmup=2,
        min_time=0.03,
        rounds=5,
    )
    return {
        "batch": batch,
        "nodes": nodes,
        "specrt_us": times["specrt"] * 1e6,
        "kernel_us": times["kernel"] * 1e6,
        "python_us": times["python"] * 1e6,
        "numpy_us": times["numpy"] * 1e6,
        "ratio": ratio_to(min(times["python"], times["numpy"]), times["specrt"]),
    }


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    sizes = (8, 64) if args.quick else (1, 8, 32, 64, 128)
    batches = (1,) if args.quick else (1, 8, 32)
    report("tree_settle", [one_row(b, n) for b in batches for n in sizes], save=args.save)


if __name__ == "__main__":
    main()
