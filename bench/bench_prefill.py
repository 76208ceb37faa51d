"""Prompts by the rows of a piece: what a prompt's pass takes, and whether its bits stay.

One prompt over a target of random weights, in memory, beside ``transformers`` on the same weights
(one pass, the logits of the last row): on the CPU layers of ``--shapes``; with ``--device cuda`` a
model of Llama-3-8B's shape, made there. Columns: rows of a piece at the most; milliseconds and
tokens a second; the products' FLOP a second, as if all were made (of the last layer ours makes keys
and values alone, which shows where there are few layers); ``ratio``, how often the time fits into
that of 128 rows a piece; whether keys and values are those of 128 rows a piece, to the bit; our
time over that of ``transformers``.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch

from bench import gpu
from bench.gpu import OURS
from bench.gpu_report import Measured, WrongResultError, run_bench
from bench.harness import Row, measure_interleaved, parser, report, start
from bench.limits import Ceilings
from bench.random_target import (
    SPECS,
    Spec,
    hf_config,
    packed,
    random_weights,
    transformers_twin,
)
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.models.loader import Weights
from specrt.models.model import LlamaModel
from specrt.models.prefill import Prompts
from specrt.ops import MatrixKind

TRANSFORMERS = "transformers"
LEAST = 128
SIZES = (LEAST, 256, 512, 1024, 2048)
_REPEATS = 5
_SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
)
SHAPES = {
    "small": (1024, 2816, 16, 4, 4),
    "llama-1b": (2048, 8192, 32, 8, 16),
    "qwen-0.5b": (896, 4864, 14, 2, 24),
    "builtin": (256, 704, 4, 2, 24),
}
"""By name, ``_SIZES``: Llama-3.2-1B's, Qwen2.5-0.5B's (without biases) and the bundled target's."""
_FORMS = {"split": MatrixKind.BF16_SPLIT, "rounded": MatrixKind.BF16_ROUNDED}
"""Of bfloat16 weights that are packed, by what is made of rows."""


class Target:
    """A model and a prompt.

    Args:
        config: the model's.
        weights: its own.
        num_tokens: of the prompt.
    """

    def __init__(self, config: ModelConfig, weights: Weights, num_tokens: int) -> None:
        self._model = LlamaModel(config, weights)
        self.device = self._model.device
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, (num_tokens,), generator=generator).tolist()
        matrices = [m for one in weights.layers for m in (one.qkv, one.o, one.gate_up, one.down)]
        self.flop = 2 * num_tokens * sum(math.prod(matrix.shape) for matrix in matrices)
        self._cache = self._model.new_cache(max_pages=2 + num_tokens // 64)

    def run(self, rows: int) -> torch.Tensor:
        """Run the prompt in pieces of so many rows; its keys and values ``[L, 2, n, Hkv, d]``."""
        self._model.prompts = Prompts(self.device, rows)
        sequence = self._cache.open(len(self.ids))
        for _ in self._model.extend(self.ids, CacheBatch(self._cache, [sequence])):
            pass
        self._cache.close(sequence)
        pages = -(-len(self.ids) // self._cache.page_size)
        return self._cache.kv[:, :, 1 : 1 + pages].flatten(2, 3)[:, :, : len(self.ids)]

    @cached_property
    def expected(self) -> torch.Tensor:
        """What any size of pieces must leave."""
        return self.run(LEAST).clone()

    def row(self, rows: int, seconds: float, least_seconds: float, contender: str = OURS) -> Row:
        """Of a size of pieces, or of another contender's one pass.

        Args:
            rows: of a piece.
            seconds: that the prompt took.
            least_seconds: that it takes in pieces of 128.
            contender: whose pass it is.
        """
        equal = None
        if contender == OURS:
            is_equal = torch.equal(self.run(rows), self.expected)
            equal = "all bits" if is_equal else "other bits"
        return {
            "contender": contender,
            "rows": rows,
            "ms": 1e3 * seconds,
            "tokens/s": len(self.ids) / seconds,
            "TFLOP/s": self.flop / seconds / 1e12,
            "ratio": least_seconds / seconds,
            "equal": equal,
            "x transformers": None,
        }


# --- on the CPU -------------------------------------------------------------------------------


def cpu_config(args: argparse.Namespace) -> dict[str, object]:
    """The content of a ``config.json``: of the shape and the number of layers asked for."""
    described = _SMALL | dict(zip(_SIZES, SHAPES[args.shapes], strict=True))
    if args.quick:
        described |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        described |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if args.layers:
        described["num_hidden_layers"] = args.layers
    return described


def on_cpu(args: argparse.Namespace) -> None:
    """Sizes and ``transformers`` in turn."""
    described, rows = cpu_config(args), []
    config = ModelConfig.from_dict(described)
    dtypes = [torch.float32] * (args.shapes == "small") + [torch.bfloat16] * (not args.quick)
    for dtype in dtypes or [torch.bfloat16]:
        weights = random_weights(config, "cpu", dtype)
        num_tokens = args.prompt or (256 if args.quick else 512)
        targets = {"rows": Target(config, weights, num_tokens)}
        if dtype == torch.bfloat16:
            for name, kind in _FORMS.items():
                targets[name] = Target(config, packed(weights, kind), num_tokens)
        ways = [(form, size) for form in targets for size in SIZES[:3]]
        contenders: dict[str, Callable[[], object]] = {
            f"{form} {size}": functools.partial(targets[form].run, size) for form, size in ways
        }
        if find_spec(TRANSFORMERS) is not None:
            contenders[TRANSFORMERS] = their_pass(described, weights, targets["rows"].ids)
        taken = measure_interleaved(
            contenders,
            warmup=1,
            min_time=0.05 if args.quick else 1.0,
            rounds=1 if args.quick else 6,
        )
        theirs = taken.get(TRANSFORMERS)
        facts: Row = {"dtype": str(dtype).removeprefix("torch.")}
        for form, size in ways:
            seconds = taken[f"{form} {size}"]
            row = targets[form].row(size, seconds, taken[f"{form} {LEAST}"])
            row["x transformers"] = seconds / theirs if theirs else None
            rows.append(facts | {"weights": form} | row)
        if theirs:
            one = targets["rows"]
            row = one.row(num_tokens, theirs, taken[f"rows {LEAST}"], TRANSFORMERS)
            rows.append(facts | {"weights": "rows"} | row)
    report("prefill", rows, save=args.save)


def their_pass(
    described: Mapping[str, object], weights: Weights, ids: Sequence[int]
) -> Callable[[], object]:
    """``transformers``' pass over the whole prompt, which leaves keys and values too."""
    twin = transformers_twin(described, weights)
    there = torch.tensor([ids], device=weights.embed.device)

    def run() -> object:
        with torch.no_grad():
            return twin(there, use_cache=True, logits_to_keep=1)

    return run


# --- on a GPU ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The target on a device; ``hf_config`` is what ``transformers`` reads of it."""

    target: Target
    hf_config: dict[str, object]
    weights: Weights

    @classmethod
    def make(cls, device: gpu.Device, name: str, num_tokens: int) -> Bench:
        """Of a real model's shape; of a small one where nothing is real."""
        is_real = device.place.device == "cuda"
        spec = SPECS[name] if is_real else Spec(500, 10000.0, 512)
        described = hf_config(device.targets[name], spec)
        config = ModelConfig.from_dict(described)
        weights = random_weights(config, device.place.device, device.place.dtype)
        return cls(Target(config, weights, num_tokens), described, weights)

    def seconds(self, run: Callable[[], object]) -> float:
        """The median by the device's own marks, after a run that is not counted, and one that
        captures what is captured."""
        device, taken = self.target.device, []
        for _ in range(2 + _REPEATS):
            marks = [device.mark()]
            run()
            marks.append(device.mark())
            device.wait()
            taken.append(device.ms_between(*marks) / 1e3)
        return statistics.median(taken[2:])

    @cached_property
    def least_seconds(self) -> float:
        return self.seconds(lambda: self.target.run(LEAST))

    @cached_property
    def their_seconds(self) -> float:
        """Of ``transformers``' pass."""
        return self.seconds(their_pass(self.hf_config, self.weights, self.target.ids))

    def theirs(self) -> Row:
        """The row of ``transformers``."""
        size = len(self.target.ids)
        return self.target.row(size, self.their_seconds, self.least_seconds, TRANSFORMERS)


def one_case(
    case: int | str, device: gpu.Device, ceilings: Ceilings, l2_bytes: int, *, bench: Bench
) -> Measured:
    """A size of pieces, or ``transformers``.

    Raises:
        WrongResultError: pieces of this size leave other bits.
    """
    if isinstance(case, str):
        if find_spec("transformers") is None:
            return None, {TRANSFORMERS: "not installed"}
        return bench.theirs(), {}
    taken, failures = bench.seconds(lambda: bench.target.run(case)), dict[str, str]()
    row = bench.target.row(case, taken, bench.least_seconds)
    try:
        row["x transformers"] = taken / bench.their_seconds
    except Exception as error:
        failures[TRANSFORMERS] = gpu.reason(error)
    if row["equal"] != "all bits":
        raise WrongResultError("other keys and values than by 128 rows a piece", row)
    return row, failures


def cases(is_quick: bool) -> Iterator[int | str]:
    """What the goal is of comes first."""
    yield 512
    yield TRANSFORMERS
    yield from (size for size in SIZES if size != 512 and not is_quick)


def run(args: argparse.Namespace, device: gpu.Device) -> None:
    """Measure and report what the budget allows."""
    is_real = device.place.device == "cuda"
    bench = Bench.make(device, args.model, (args.prompt or 2048) if is_real else 300)
    measured = functools.partial(one_case, bench=bench)
    run_bench("prefill_cuda", cases(args.quick), measured, args, device)


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    arguments.add_argument("--model", choices=list(SPECS), default="Llama-3-8B")
    arguments.add_argument("--prompt", type=int, help="tokens; default: 512, on a GPU 2048")
    arguments.add_argument("--shapes", choices=list(SHAPES), default="small", help="on the CPU")
    arguments.add_argument("--layers", type=int, help="on the CPU; default: the model's")
    args = start(arguments)
    if args.device == "cpu" and not args.dry:
        on_cpu(args)
    else:
        run(args, gpu.chosen_device(args))


if __name__ == "__main__":
    main()
