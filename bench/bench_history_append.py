"""Histories, stops and reports of a round against the same on the host, in Python and in numpy.

Columns: B sequences that accepted all of N tokens; the call through Python, and the kernel alone,
launched as a graph; Python's integers, read and written back, and numpy, all sequences at once;
how much the better of these takes for one call of ours.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt.ops import history_append
from specrt.ops.graph import CpuGraph
from specrt.ops.history_append import HEADER_SIZE, Ending, ReportWord, report_size

SLOTS, LENGTH, STOPS = 1024, 500, 4


class Rounds:
    """``batch`` sequences at the end of a round; nothing stops them."""

    def __init__(self, batch: int, nodes: int) -> None:
        node = torch.arange(nodes, dtype=torch.int32).repeat(batch, 1)
        full = torch.full((batch,), nodes, dtype=torch.int32)
        self.size = nodes
        self.tokens, self.logprobs = 3 * node, torch.randn(batch, nodes)
        self.given = (full, node, node.clone(), full - 1, self.tokens, self.logprobs)
        self.stop_ids = torch.arange(-STOPS, 0, dtype=torch.int32).repeat(batch, 1)
        self.max_len = torch.full_like(full, SLOTS)
        self.history = torch.zeros(batch, SLOTS, dtype=torch.int32)
        self.history_len = torch.full_like(full, LENGTH)
        self.roots, self.num_path = torch.zeros(2, batch, dtype=torch.int32)
        self.report = torch.zeros(batch, report_size(nodes, True), dtype=torch.int32)
        self._length, self._before = (
            memoryview(lengths.numpy()) for lengths in (self.history_len, self.history_len.clone())
        )

    def out(self) -> tuple[torch.Tensor, ...]:
        return self.history, self.history_len, self.roots, self.num_path, self.report

    def reset(self) -> None:
        """Part of what is measured: 0.1 us."""
        self._length[:] = self._before

    def ours(self) -> None:
        self.reset()
        history_append(*self.given, self.stop_ids, self.max_len, *self.out())

    def in_python(self) -> None:
        self.reset()
        counts, depth, path, accepted, tokens = (t.tolist() for t in self.given[:5])
        logprobs = self.logprobs.view(torch.int32).tolist()
        stop_ids, most, roots = self.stop_ids.tolist(), self.max_len.tolist(), self.roots.tolist()
        lengths, reports = self.history_len.tolist(), []
        for b, count in enumerate(accepted):
            taken, ending, start = [], Ending(0), lengths[b]
            for token in tokens[b][: count + 1]:
                if start + len(taken) >= most[b]:
                    break
                taken.append(token)
                if token in stop_ids[b]:
                    ending |= Ending.STOP_TOKEN
                    break
            if start + len(taken) >= most[b]:
                ending |= Ending.MAX_LEN
            self.history[b, start : start + len(taken)] = torch.tensor(taken, dtype=torch.int32)
            lengths[b] += len(taken)
            roots[b] = taken[-1]
            self.num_path[b] = len(taken)
            header = [counts[b], max(depth[b][: counts[b]]), count, len(taken), int(ending)]
            padding = [0] * (HEADER_SIZE - len(header))
            reports.append([*header, *padding, *tokens[b], *path[b], *logprobs[b]])
        self.history_len.copy_(torch.tensor(lengths))
        self.roots.copy_(torch.tensor(roots))
        self.report.copy_(torch.tensor(reports))

    def in_numpy(self) -> None:
        self.reset()
        counts, depth, path, accepted, tokens = (t.numpy() for t in self.given[:5])
        history, lengths, roots, num_path, rows = (t.numpy() for t in self.out())
        node, batch = np.arange(self.size), np.arange(len(counts))
        is_stop = (tokens[:, :, None] == self.stop_ids.numpy()[:, None]).any(2)
        room = self.max_len.numpy() - lengths
        stopped = np.cumsum(is_stop, axis=1) - is_stop
        takes = (node < np.minimum(accepted + 1, room)[:, None]) & (stopped == 0)
        taken = takes.sum(1)
        row, entry = np.nonzero(takes)
        history[row, lengths[row] + entry] = tokens[row, entry]
        lengths += taken.astype(np.int32)
        roots[:] = np.where(taken > 0, tokens[batch, taken - 1], roots)
        num_path[:] = taken
        rows[:] = 0
        rows[:, ReportWord.NUM_NODES] = counts
        rows[:, ReportWord.DEEPEST] = np.where(node < counts[:, None], depth, 0).max(1)
        rows[:, ReportWord.ACCEPT_LENGTH] = accepted
        rows[:, ReportWord.NUM_TAKEN] = taken
        rows[:, ReportWord.ENDING] = (takes & is_stop).any(1) + Ending.MAX_LEN * (taken == room)
        is_told, size = node <= accepted[:, None], self.size
        columns = rows[:, HEADER_SIZE:].reshape(len(rows), 3, size)
        columns[:, 0] = np.where(is_told, tokens, -1)
        columns[:, 1] = np.where(is_told, path, -1)
        columns[:, 2] = np.where(is_told, self.logprobs.numpy(), np.nan).view(np.int32)


def one_row(batch: int, nodes: int) -> Row:
    rounds = Rounds(batch, nodes)
    graph = CpuGraph.capture(
        lambda: history_append(*rounds.given, rounds.stop_ids, rounds.max_len, *rounds.out())
    )

    def kernel() -> None:
        rounds.reset()
        graph.launch()

    rounds.ours()
    expected = [t.clone() for t in rounds.out()]
    for other in (rounds.in_python, rounds.in_numpy):
        rounds.report.fill_(-77)
        other()
        assert all(map(torch.equal, rounds.out(), expected))
    times = measure_interleaved(
        {
            "specrt": rounds.ours,
            "kernel": kernel,
            "python": rounds.in_python,
            "numpy": rounds.in_numpy,
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
    report("history_append", [one_row(b, n) for b in batches for n in sizes], save=args.save)


if __name__ == "__main__":
    main()
