"""Rules for the draft length, live: EESD's controllers on three kinds of prompt, against plain.

Every contender decodes every prompt in turn, starting with another one each time; rates are of
decoding alone, without the prompt's own pass. All must give plain decoding's tokens, or the run
fails. ``vs plain`` is plain decoding's time over the contender's, summed over the prompts (medians
over repeats); ``vs best K`` is the time of the fixed length that was best on that kind, over the
contender's. The kind ``all`` sums the three.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import specrt
from bench.harness import Row, parser, report, start
from bench.prompts import HELDOUT, load_prompts
from specrt import SamplingParams
from specrt.draft.base import DraftParams
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.length.control import CONTROLLERS, parse_control
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.lab.measure import without_drafter
from specrt.targets import BUILTIN

PLAIN = "plain"
ALL = "all"
KINDS = ("heldout", "self-quoting", "unpredictable")


@dataclass
class Runs:
    """One contender on one kind of prompt."""

    seconds: list[list[float]] = field(default_factory=list)
    """By prompt and repeat."""
    results: list[GenerationResult] = field(default_factory=list)
    """The first repeat's."""

    @property
    def total_seconds(self) -> float:
        """Sum over prompts of the median."""
        return sum(map(statistics.median, self.seconds))


@dataclass(frozen=True)
class Contender:
    """An engine, and the shape of its trees."""

    engine: Engine
    draft: DraftParams | None = None


def contenders(args: argparse.Namespace, dtype: str) -> dict[str, Contender]:
    """Plain decoding, fixed lengths, the learning rules, and trees where asked for."""
    engine = specrt.load(args.target, None, dtype=dtype, max_shared_tokens=0, progress=False)
    plain = without_drafter(engine)
    names = [f"fixed-{length}" for length in range(1, args.max_draft + 1)]
    names += [name for name in CONTROLLERS if name != "fixed"]
    made = {PLAIN: Contender(plain)}
    for name in args.controllers or names:
        made[name] = Contender(_engine(engine, args.drafter, name))
    for branches in args.branches:
        for depth in (2, 3, 4):
            name = f"tree {depth} x {branches}"
            shape = DraftParams(depth=depth, top_k=branches)
            made[name] = Contender(_engine(engine, args.drafter, "fixed-1"), shape)
    return made


def _engine(engine: Engine, drafter: str, controller: str) -> Engine:
    options = DrafterOptions(control=parse_control(controller))
    made = load_drafter(drafter, engine.target, None, options)
    return Engine(engine.target, made, engine.tokenizer, max_shared_tokens=0)


def run(
    those: Mapping[str, Contender],
    texts: Sequence[str],
    params: Sequence[SamplingParams],
    repeats: int,
) -> dict[str, Runs]:
    """Every contender on every prompt, in turn."""
    names = list(those)
    runs = {name: Runs([[] for _ in texts]) for name in names}
    for contender in those.values():  # graphs, and the learning rules' first costs
        _timed(contender, texts[0], params[0])
    for repeat in range(repeats):
        for index, text in enumerate(texts):
            shift = (repeat + index) % len(names)
            for name in names[shift:] + names[:shift]:
                seconds, result = _timed(those[name], text, params[index])
                runs[name].seconds[index].append(seconds)
                if repeat == 0:
                    runs[name].results.append(result)
    return runs


def _timed(
    contender: Contender, text: str, params: SamplingParams
) -> tuple[float, GenerationResult]:
    started = perf_counter()
    result: GenerationResult = contender.engine.generate(text, params, contender.draft)
    seconds = perf_counter() - started
    if result.error is not None:
        raise RuntimeError(result.error)
    return seconds - result.stats.prefill_ms / 1e3, result


def rows_of(kind: str, dtype: str, runs: Mapping[str, Runs]) -> list[Row]:
    """A line for each contender."""
    fixed = [run.total_seconds for name, run in runs.items() if name.startswith("fixed-")]
    rows = []
    for name, those in runs.items():
        stats = [result.stats for result in those.results]
        num_rounds = sum(one.num_rounds for one in stats)
        num_accepted = sum(one.num_accepted_tokens for one in stats)
        num_tokens = sum(len(result.token_ids) for result in those.results)
        pairs = zip(those.results, runs[PLAIN].results, strict=True)
        rows.append(
            {
                "kind": kind,
                "dtype": dtype,
                "controller": name,
                "tau": 1 + num_accepted / num_rounds,
                "drafted": sum(one.num_draft_tokens for one in stats) / num_rounds,
                "accepted": num_accepted / num_rounds,
                "tokens/s": num_tokens / those.total_seconds,
                "vs plain": runs[PLAIN].total_seconds / those.total_seconds,
                "vs best K": min(fixed) / those.total_seconds if fixed else None,
                "differing": sum(one.token_ids != other.token_ids for one, other in pairs),
            }
        )
    return rows


def together(parts: Sequence[Mapping[str, Runs]]) -> dict[str, Runs]:
    """The kinds as one."""
    return {
        name: Runs(
            [seconds for part in parts for seconds in part[name].seconds],
            [result for part in parts for result in part[name].results],
        )
        for name in parts[0]
    }


def bench(args: argparse.Namespace, dtype: str) -> list[Row]:
    """All kinds of prompt in one dtype."""
    those, parts, rows = contenders(args, dtype), [], []
    for kind in args.kinds:
        prompts = load_prompts(kind, args.problems, args.num_prompts, args.target)
        params = [
            SamplingParams(
                max_new_tokens=args.max_new_tokens, temperature=prompts.temperature, seed=seed
            )
            for seed in range(len(prompts.texts))
        ]
        parts.append(run(those, prompts.texts, params, args.repeats))
        rows += rows_of(kind, dtype, parts[-1])
    if len(parts) > 1:
        rows += rows_of(ALL, dtype, together(parts))
    return rows


def _parse() -> argparse.Namespace:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--target", default=BUILTIN, help="a checkpoint directory; default: the bundled model")
    add("--drafter", default="eesd", help="an EESD drafter of the target")
    add("--controllers", nargs="+", help="some rules; default: all, and fixed lengths")
    add("--branches", nargs="*", type=int, default=[], help="trees of so many branches, too")
    add("--max-draft", type=int, default=8, help="longest fixed length")
    add("--kinds", nargs="+", default=list(KINDS), help="prompts, as bench_generate names them")
    add("--problems", type=Path, default=HELDOUT, help="what the named sets are made of")
    add("--num-prompts", type=int, default=10)
    add("--max-new-tokens", type=int, default=128)
    add("--repeats", type=int, default=3)
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    args = start(arguments)
    if args.quick:
        args.num_prompts, args.repeats, args.max_new_tokens, args.max_draft = 1, 1, 8, 1
        args.kinds = args.kinds[:1]
    return args


def main() -> None:
    """Measure, report, and fail if a controller changed the text."""
    args = _parse()
    rows = [row for dtype in args.dtype for row in bench(args, dtype)]
    summary = {"drafter": Path(args.drafter).name, "max_new_tokens": args.max_new_tokens}
    report("control", rows, save=args.save, summary=summary)
    changed = sorted({str(row["controller"]) for row in rows if row["differing"]})
    if changed:
        raise SystemExit(f"not lossless: {', '.join(changed)}")


if __name__ == "__main__":
    main()
