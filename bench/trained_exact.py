"""Whether drafters, graphs and batches change a token: 500 prompts, greedy and drawn by seeds.

All must say what plain decoding says launch by launch. The CPU's activations are float32 and a
GPU's have 16 bits, so there texts may part where two tokens are nearly as likely: of plain decoding
on both, tokens until then are counted, and how far their log-probabilities are apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.gpu import reason
from bench.harness import Row, result_of, save_result
from bench.trained_setup import PLAIN, Found, Setup
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.sampling import SamplingParams


@dataclass(frozen=True)
class Sizes:
    """How much is generated."""

    prompts: int = 500
    tokens: int = 96
    batch: int = 64
    on_cpu: int = 16


_SIZES, _DRY_SIZES = Sizes(), Sizes(3, 4, 2, 2)


@dataclass(frozen=True)
class Case:
    """One way to generate them all."""

    drafter: str
    is_eager: bool
    is_drawn: bool

    def __str__(self) -> str:
        sampling = "seeds" if self.is_drawn else "greedy"
        return f"{self.drafter} {'eager' if self.is_eager else 'graph'} {sampling}"


def cases(drafters: Sequence[str]) -> Iterator[Case]:
    """The reference of each sampling first, then graphs, then what is slow."""
    for is_drawn in (False, True):
        yield Case(PLAIN, is_eager=True, is_drawn=is_drawn)
    for is_eager in (False, True):
        for drafter in drafters:
            for is_drawn in (False, True):
                if (drafter, is_eager) != (PLAIN, True):
                    yield Case(drafter, is_eager, is_drawn)


def params(count: int, num_tokens: int, *, is_drawn: bool) -> list[SamplingParams]:
    """A seed each."""
    if not is_drawn:
        return [SamplingParams(max_new_tokens=num_tokens)] * count
    return [SamplingParams(num_tokens, temperature=1.0, seed=seed) for seed in range(count)]


def differing(
    found: Sequence[GenerationResult], wanted: Sequence[GenerationResult]
) -> tuple[int, int]:
    """Prompts and tokens in which two runs differ, what one says more included."""
    tokens = prompts = 0
    for one, other in zip(found, wanted, strict=True):
        a, b = one.token_ids, other.token_ids
        count = max(len(a), len(b)) - sum(x == y for x, y in zip(a, b, strict=False))
        tokens, prompts = tokens + count, prompts + (count > 0)
    return prompts, tokens


def run(setup: Setup, args: argparse.Namespace, where: Mapping[str, Any]) -> Found:
    """All that the budget allows, saved after each case."""
    end = time.monotonic() + (args.budget or float("inf"))
    sizes = _DRY_SIZES if setup.is_dry else _SIZES
    prompts, drafters = setup.prompts(count=sizes.prompts), setup.drafters()
    found = Found(left_out=setup.missing())
    wanted: dict[bool, list[GenerationResult]] = {}
    engines: dict[tuple[str, bool], Engine] = {}
    for case in cases(list(drafters)):
        if time.monotonic() > end:
            found.left_out.append(f"{case}: over the budget")
            continue
        begun, key = time.monotonic(), (case.drafter, case.is_eager)
        try:
            if key not in engines:
                engines.clear()
                drafter = drafters[case.drafter]
                engines[key] = setup.engine(drafter, batch=sizes.batch, is_eager=case.is_eager)
            sampling = params(len(prompts), sizes.tokens, is_drawn=case.is_drawn)
            results = _generated(engines[key], prompts, sampling)
        except Exception as error:
            found.failed.append(f"{case}: {reason(error)}")
            continue
        other = differing(results, wanted.setdefault(case.is_drawn, results))
        if other[1]:
            found.failed.append(f"{case}: {other[1]} tokens of {other[0]} prompts differ")
        found.rows.append(_row(str(case), results, other, time.monotonic() - begun))
        _save(found, args, where)
    if wanted.get(False) and time.monotonic() < end:
        found.rows.append(against_cpu(setup, prompts[: sizes.on_cpu], sizes.tokens, wanted[False]))
    return found


def _generated(
    engine: Engine, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
) -> list[GenerationResult]:
    """With log-probabilities.

    Raises:
        RuntimeError: a prompt failed.
    """
    asked = [replace(params, logprobs=True) for params in sampling]
    results: list[GenerationResult] = engine.generate(prompts, asked)
    if errors := [result.error for result in results if result.error is not None]:
        raise RuntimeError(errors[0])
    return results


def _row(
    case: str, results: Sequence[GenerationResult], other: tuple[int, int], seconds: float
) -> Row:
    rounds = sum(result.stats.num_rounds for result in results)
    count = sum(len(result.token_ids) for result in results)
    return {
        "case": case,
        "prompts": len(results),
        "tokens": count,
        "differing prompts": other[0],
        "differing tokens": other[1],
        "tau": count / max(1, rounds),
        "seconds": seconds,
        "apart": None,
    }


def against_cpu(
    setup: Setup, prompts: Sequence[list[int]], num_tokens: int, wanted: Sequence[GenerationResult]
) -> Row:
    """Greedy plain decoding on the CPU: tokens after which the texts part are no difference."""
    begun = time.monotonic()
    engine = replace(setup, is_dry=True).engine(None, batch=len(prompts))
    found = _generated(engine, prompts, params(len(prompts), num_tokens, is_drawn=False))
    apart, num_same = 0.0, 0
    for one, other in zip(found, wanted, strict=False):
        same = num_equal(one.token_ids, other.token_ids)
        pairs = zip((one.logprobs or ())[:same], (other.logprobs or ())[:same], strict=True)
        apart = max([apart, *(abs(a - b) for a, b in pairs)])
        num_same += same
    num_parted, _ = differing(found, wanted[: len(found)])
    row = _row("plain on the CPU, greedy", found, (num_parted, 0), time.monotonic() - begun)
    row["differing tokens"] = f"{row['tokens'] - num_same} from where texts part"
    return row | {"apart": apart}


def num_equal(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    differing = (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
    return next(differing, min(len(found), len(wanted)))


def _save(found: Found, args: argparse.Namespace, where: Mapping[str, Any]) -> None:
    if args.save:
        summary = {"not_measured": found.left_out}
        save_result(result_of("trained_exact", found.rows, summary, where, found.failed), args.save)
