"""Real acceptance and speed of drafters trained on a GPU, against plain decoding and transformers.

Greedy, a prompt at a time, all in turn on each prompt, times with the prompt's own pass. The first
prompts are ``transformers``' too, on a static cache, launched one by one and compiled, with its
prompt lookup and assisted generation (by ``--assistant``, else by the target's own first layers);
they end when three fifths of the budget are over. ``x transformers`` is its best on these prompts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import Output, Request, Transformers
from bench.gpu import reason
from bench.harness import Row, result_of, save_result
from bench.trained_exact import num_equal
from bench.trained_setup import PLAIN, Found, Setup
from specrt.config import ModelConfig
from specrt.engine.engine import Engine
from specrt.lab.measure import Comparison, compare, summarise
from specrt.sampling import SamplingParams
from specrt.targets import BUILTIN, target_path
from tools.export_checkpoint import export

LOOKUP = "prompt-lookup"
_TOKENS, _DRY_TOKENS, _DRY_PROMPTS = 192, 6, 2
_WARM_PROMPTS = 3
"""That are generated once before they are timed."""
_THEIRS = 0.6
"""Of the budget, in which transformers are asked."""
_COMPILE_SECONDS = 60.0
"""That compiling may take; with less left for transformers it is not begun."""


@dataclass
class Measured:
    """What was found so far."""

    comparisons: list[Comparison] = field(default_factory=list)
    """One a prompt, of ours."""
    theirs: dict[str, list[Output]] = field(default_factory=dict)
    """Of the first prompts, by contender."""

    def rows(self, names: Sequence[str]) -> list[Row]:
        """Ours, over all prompts; then theirs."""
        best = max((_rate(outputs) for outputs in self.theirs.values() if outputs), default=None)
        found = [self._ours(name, best) for name in names if self.comparisons]
        return found + [self._theirs(name) for name, outputs in self.theirs.items() if outputs]

    def _ours(self, name: str, best: float | None) -> Row:
        whole = summarise(name, self.comparisons)
        num_shared = max(map(len, self.theirs.values()), default=0)
        shared = summarise(name, self.comparisons[:num_shared])
        return {
            "contender": name,
            "prompts": whole.num_prompts,
            "equal": f"{whole.num_equal_prompts} of {whole.num_prompts} prompts",
            "tau": whole.tau,
            "tokens/s": whole.tokens_per_second,
            "x plain": whole.speedup,
            "x transformers": shared.tokens_per_second / best if best and num_shared else None,
        }

    def _theirs(self, name: str) -> Row:
        outputs = self.theirs[name]
        plain = [one.measurements[PLAIN].result.token_ids for one in self.comparisons]
        same = sum(num_equal(a.token_ids, b) for a, b in zip(outputs, plain, strict=False))
        count = sum(len(output.token_ids) for output in outputs)
        shared = summarise(PLAIN, self.comparisons[: len(outputs)]).tokens_per_second
        return {
            "contender": name,
            "prompts": len(outputs),
            "equal": f"{same} of {count} tokens",
            "tau": count / max(1, sum(output.num_rounds for output in outputs)),
            "tokens/s": _rate(outputs),
            "x plain": _rate(outputs) / shared,
            "x transformers": None,
        }


def _rate(outputs: Sequence[Output]) -> float:
    seconds = sum(output.prefill_seconds + output.seconds for output in outputs)
    return sum(len(output.token_ids) for output in outputs) / seconds


def run(setup: Setup, args: argparse.Namespace, where: Mapping[str, Any]) -> Found:
    """All that the budget allows, saved after each prompt."""
    begun = time.monotonic()
    end = begun + (args.budget or float("inf"))
    theirs_end = begun + _THEIRS * (end - begun) if args.budget else end
    num_tokens = _DRY_TOKENS if setup.is_dry else _TOKENS
    found, measured = Found(left_out=setup.missing()), Measured()
    engines = _engines(setup, found)
    if PLAIN not in engines:
        return found
    prompts = setup.prompts()[: _DRY_PROMPTS if setup.is_dry else None]
    longest = Request(max(prompts, key=len), num_tokens, 0.0, 0)
    theirs = _their_contenders(setup, longest, theirs_end, found.left_out)
    measured.theirs = {name: [] for name in theirs}
    sampling = SamplingParams(max_new_tokens=num_tokens)
    for number, prompt in enumerate(prompts):
        if number and time.monotonic() > end:
            break
        warmup = int(number < _WARM_PROMPTS)
        measured.comparisons.append(compare(engines, prompt, sampling, repeats=1, warmup=warmup))
        if not number or time.monotonic() < theirs_end:
            _ask(theirs, Request(prompt, num_tokens, 0.0, 0), measured, found.left_out)
        found.rows = measured.rows(list(engines))
        if args.save:
            summary = {"not_measured": found.left_out}
            result = result_of("trained_speed", found.rows, summary, where, found.failed)
            save_result(result, args.save)
    for name in engines:
        num_other = sum(not one.is_equal(name) for one in measured.comparisons)
        if num_other:
            found.failed.append(f"{name}: {num_other} prompts differ from plain decoding")
    return found


def _ask(
    theirs: Mapping[str, Transformers], request: Request, measured: Measured, left_out: list[str]
) -> None:
    """All of theirs for one prompt; who fails is asked no more."""
    for name in list(measured.theirs):
        try:
            measured.theirs[name].append(theirs[name].run(request))
        except Exception as error:
            del measured.theirs[name]
            left_out.append(f"{name}: {reason(error)}")


def _engines(setup: Setup, found: Found) -> dict[str, Engine]:
    engines = {}
    for name, drafter in {**setup.drafters(), LOOKUP: LOOKUP}.items():
        try:
            engines[name] = setup.engine(drafter)
        except Exception as error:
            found.failed.append(f"{name}: {reason(error)}")
    return engines


# --- transformers -----------------------------------------------------------------------------


def _their_contenders(
    setup: Setup, longest: Request, end: float, left_out: list[str]
) -> dict[str, Transformers]:
    """Those that run here, each after a run of the longest prompt, so that a cache's size stays."""
    found: dict[str, Transformers] = {}
    dtype = "float32" if setup.is_dry else "bfloat16"
    try:
        options = _their_options(setup, dtype)
        directory = _plain_directory(setup, dtype)
    except Exception as error:
        left_out.append(f"transformers: {reason(error)}")
        return found
    for name, given in options.items():
        is_compiled = name.endswith("compiled")
        if is_compiled and setup.is_dry:
            continue
        if is_compiled and end - time.monotonic() < _COMPILE_SECONDS:
            left_out.append(f"{name}: wants {_COMPILE_SECONDS:.0f} s of the budget")
            continue
        try:
            contender = Transformers(directory, dtype, device=setup.device, options=given)
            contender.run(longest)
        except Exception as error:
            left_out.append(f"{name}: {reason(error)}")
            continue
        found[name] = contender
    return found


def _their_options(setup: Setup, dtype: str) -> dict[str, dict[str, Any]]:
    """Of ``generate``, by the name of the contender."""
    target = ModelConfig.from_directory(target_path(setup.target))
    assisted: dict[str, Any] = {"assistant_early_exit": max(1, target.num_layers // 8)}
    if setup.assistant is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(setup.assistant, dtype=dtype)
        assisted = {"assistant_model": model.to(setup.device)}
    static = {"cache_implementation": "static"}
    return {
        "transformers static": {**static, "disable_compile": True},
        "transformers lookup": {"prompt_lookup_num_tokens": 10},
        "transformers assisted": assisted,
        "transformers compiled": static,
    }


def _plain_directory(setup: Setup, dtype: str) -> Path:
    """The target as transformers reads it."""
    if setup.target != BUILTIN:
        return target_path(setup.target)
    directory = setup.work / f"target-{dtype}"
    if not (directory / "config.json").exists():
        export(setup.target, directory, dtype)
    return directory
