"""FSPAD's ``feature_sample`` against the same expression in torch, plain and folded.

Ours runs as the engine runs it, as a captured graph. Torch's activations have the weights'
dtype, and its folded expression reads the same tables. ``share`` is of the weight-streaming limit:
the time of ``linear`` with one row over the very matrices that this form multiplies by, in the same
turns, over the time of ours; beyond a few rows the arithmetic takes longer than the reading.
``plain/ours`` is what folding gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt import ops
from specrt.ops.graph import CpuGraph

ROWS = (1, 4, 10, 40)
FORMS = ("plain", "folded")
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """What feature sampling sees of a model."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype: torch.dtype


SHAPES = {
    "builtin float32": Shape(256, 704, 4096, torch.float32),
    "builtin bfloat16": Shape(256, 704, 4096, torch.bfloat16),
    "Vicuna-7B bfloat16": Shape(4096, 11008, 32000, torch.bfloat16),
}


def table(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows to be picked from; a few hundred different ones, repeated, are soon made."""
    different = torch.randn(min(num_rows, 250), width).to(dtype)
    return different.repeat(num_rows // len(different) + 1, 1)[:num_rows]


class Sampler:
    """The weights of one shape, plain or with both foldings."""

    def __init__(self, shape: Shape, folded: bool) -> None:
        hidden, wide, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.empty(rows, columns, dtype=shape.dtype).normal_(std=columns**-0.5)

        self.shape = shape
        self.norm = torch.ones(hidden)
        self.up, self.down = matrix(wide, hidden), matrix(hidden, wide)
        self.embed = None if folded else table(vocab, hidden, shape.dtype)
        self.fc = matrix(hidden, hidden if folded else 2 * hidden)
        self.fc_bias = None if folded else torch.zeros(hidden)
        self.gate = None if folded else matrix(wide, hidden)
        self.token_fc = table(vocab, hidden, shape.dtype) if folded else None
        self.token_gate = table(vocab, wide, shape.dtype) if folded else None
        self._captured: list[Callable[[], None]] = []  # hold what the graphs point to
        self.matrices = [w for w in (self.fc, self.gate, self.up, self.down) if w is not None]

    def ours(self, num_rows: int) -> Callable[[], None]:
        """One call, captured."""
        shape = self.shape
        size = ops.feature_sample_workspace(shape.hidden_size, shape.intermediate_size)
        workspace, out = torch.empty(num_rows, size), torch.empty(num_rows, shape.hidden_size)
        tokens, source, features = self._inputs(num_rows)

        def call() -> None:
            ops.feature_sample(
                tokens,
                source,
                features,
                self.embed,
                self.fc,
                self.fc_bias,
                self.norm,
                self.gate,
                self.up,
                self.down,
                self.token_fc,
                self.token_gate,
                eps=EPS,
                workspace=workspace,
                out=out,
            )

        return self._capture(call)

    def torch(self, num_rows: int) -> Callable[[], torch.Tensor]:
        """The formula."""
        dtype = self.shape.dtype
        tokens, source, features = self._inputs(num_rows)
        features, norm = features.to(dtype), self.norm.to(dtype)
        bias = None if self.fc_bias is None else self.fc_bias.to(dtype)

        def call() -> torch.Tensor:
            f = features[source]
            if self.token_fc is not None and self.token_gate is not None:
                h = self.token_fc[tokens] + F.linear(f, self.fc)
                gate = self.token_gate[tokens]
            else:
                assert self.embed is not None
                assert self.gate is not None
                e = self.embed[tokens]
                h = F.linear(torch.cat([e, f], -1), self.fc, bias)
                gate = F.linear(e, self.gate)
            up = F.linear(F.rms_norm(h, h.shape[-1:], norm, EPS), self.up)
            return h + F.linear(F.silu(gate) * up, self.down)

        return call

    def stream(self) -> Callable[[], None]:
        """One row through the matrices, which is as fast as they can be read."""
        calls = [(torch.randn(1, w.shape[1]), w, torch.empty(1, len(w))) for w in self.matrices]

        def call() -> None:
            for x, weight, out in calls:
                ops.linear(x, weight, out=out)

        return self._capture(call)

    def _capture(self, call: Callable[[], None]) -> Callable[[], None]:
        self._captured.append(call)
        return CpuGraph.capture(call).launch

    def _inputs(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Different tokens, and their parents' features, as at a frontier of a draft tree."""
        tokens = torch.randperm(self.shape.vocab_size)[:num_rows].int()
        return tokens, torch.arange(num_rows).int() // 3, torch.randn(num_rows, self.fc.shape[0])


def bench(name: str, counts: Sequence[int], rounds: int) -> list[Row]:
    """One line for each form and number of rows; all are timed in turn."""
    samplers = {form: Sampler(SHAPES[name], form == "folded") for form in FORMS}
    contenders: dict[str, Callable[[], object]] = {}
    for form, sampler in samplers.items():
        contenders[f"stream {form}"] = sampler.stream()
        for count in counts:
            contenders[f"ours {form} {count}"] = sampler.ours(count)
            contenders[f"torch {form} {count}"] = sampler.torch(count)
    seconds = measure_interleaved(contenders, warmup=1, min_time=0, rounds=rounds)
    rows: list[Row] = []
    for form, sampler in samplers.items():
        num_bytes = sum(matrix.nbytes for matrix in sampler.matrices)
        for count in counts:
            ours, torchs = seconds[f"ours {form} {count}"], seconds[f"torch {form} {count}"]
            rows.append(
                {
                    "shape": name,
                    "form": form,
                    "rows": count,
                    "weights_MB": num_bytes / 1e6,
                    "ms": 1e3 * ours,
                    "GB/s": num_bytes / ours / 1e9,
                    "share": ratio_to(seconds[f"stream {form}"], ours),
                    "torch_ms": 1e3 * torchs,
                    "torch/ours": ratio_to(torchs, ours),
                    "plain/ours": ratio_to(seconds[f"ours plain {count}"], ours),
                }
            )
    return rows


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    rows: list[Row] = []
    for name in list(SHAPES)[:2] if args.quick else SHAPES:
        counts, rounds = ((1, 10), 3) if args.quick else (ROWS, 9 if "Vicuna" in name else 60)
        rows += bench(name, counts, rounds)
    report("feature_sample", rows, save=args.save)


if __name__ == "__main__":
    main()
