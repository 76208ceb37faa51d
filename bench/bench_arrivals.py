"""Requests that arrive over time and share one engine, against one after another.

Requests of unequal prompts and lengths arrive faster than one after another could be answered
(``--load`` times as fast, with seeded exponential gaps) and are served by ``Engine.add`` and
``step``. ``ratio`` is the tokens a second of that over those of the same requests one after another
through the same engine and drafter; both are run in turn. First tokens are timed from a request's
arrival, also where they come one after another. Every text must be plain decoding's.

``wait``: how long a running sequence waits at most for its next tokens while another's long prompt
is read, in the time of one chunk of that prompt, by ``prefill_chunk``.

``--target random`` is a model of random weights of ``--layers`` and ``--hidden``: where the weights
are larger than the caches, further rows of a pass cost little.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import specrt
from bench.contenders import known_drafters
from bench.harness import Row, parser, report, start
from bench.prompts import HELDOUT, load_prompts
from bench.random_target import SilentTokenizer, random_weights
from specrt import SamplingParams
from specrt.config import ModelConfig
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.targets import BUILTIN

RANDOM, PLAIN = "random", "none"


@dataclass(frozen=True)
class Job:
    """A request and when it arrives, as a share of the time that all take one after another."""

    prompt_ids: list[int]
    params: SamplingParams
    arrival: float


@dataclass(frozen=True)
class Served:
    """What came of all jobs."""

    texts: list[list[int]]
    seconds: float
    """From the first arrival to the last token."""
    first_tokens: list[float]
    """Seconds from each job's arrival."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.texts)) / self.seconds


def make_jobs(prompts: Sequence[list[int]], args: argparse.Namespace) -> list[Job]:
    """One a prompt, greedy and sampled ones in turn."""
    rng = random.Random(args.seed)
    jobs, arrival = [], 0.0
    for number, prompt in enumerate(prompts):
        length = rng.randint(max(1, args.max_new_tokens // 6), args.max_new_tokens)
        params = SamplingParams(
            max_new_tokens=length,
            temperature=0.7 * (number % 2),
            seed=number,
            ignore_eos=args.target == RANDOM,
        )
        jobs.append(Job(prompt, params, arrival))
        arrival += rng.expovariate(args.load * len(prompts))
    return jobs


# --- serving ----------------------------------------------------------------------------------


def one_after_another(engine: Engine, jobs: Sequence[Job], total: float = 0.0) -> Served:
    """Each job waits until the one before it has ended; ``total``: what arrivals are shares of."""
    texts, firsts, spans = [], [], []
    for job in jobs:
        begun, first = perf_counter(), 0.0
        engine.add(job.prompt_ids, job.params)
        tokens: list[int] = []
        while not engine.is_idle:
            for chunk in engine.step():
                tokens += chunk.token_ids
                first = first or perf_counter() - begun
        texts.append(tokens)
        firsts.append(first)
        spans.append(perf_counter() - begun)
    # Had they arrived over time: the place is free when the one before has ended.
    free, waits = 0.0, []
    for job, first, span in zip(jobs, firsts, spans, strict=True):
        arrival = job.arrival * total
        free = max(free, arrival)
        waits.append(free + first - arrival)
        free += span
    return Served(texts, sum(spans), waits)


def arriving(engine: Engine, jobs: Sequence[Job], total: float) -> Served:
    """Each job is added when its time has come."""
    texts: list[list[int]] = [[] for _ in jobs]
    firsts, begun, numbers = [0.0] * len(jobs), perf_counter(), {}
    waiting = list(range(len(jobs)))
    while waiting or not engine.is_idle:
        elapsed = perf_counter() - begun
        while waiting and (jobs[waiting[0]].arrival * total <= elapsed or engine.is_idle):
            number = waiting.pop(0)
            numbers[engine.add(jobs[number].prompt_ids, jobs[number].params)] = number
        for chunk in engine.step():
            number = numbers[chunk.handle]
            texts[number] += chunk.token_ids
            if not firsts[number]:
                arrival = jobs[number].arrival * total
                firsts[number] = max(0.0, perf_counter() - begun - arrival)
    return Served(texts, perf_counter() - begun, firsts)


def bench(engine: Engine, jobs: Sequence[Job], expected: Sequence[list[int]], repeats: int) -> Row:
    """One engine: both ways, in turn."""
    one_after_another(engine, jobs[:2])  # captures and first pages
    total = one_after_another(engine, jobs).seconds
    arriving(engine, jobs, total)
    alone, together = [], []
    for _ in range(repeats):
        alone.append(one_after_another(engine, jobs, total))
        together.append(arriving(engine, jobs, total))
    ratios = [b.rate / a.rate for a, b in zip(alone, together, strict=True)]
    runs = [*alone, *together]
    return {
        "tokens/s": statistics.median(run.rate for run in together),
        "one by one": statistics.median(run.rate for run in alone),
        "ratio": statistics.median(ratios),
        "first ms": 1e3 * statistics.median(t for run in together for t in run.first_tokens),
        "worst first ms": 1e3 * max(t for run in together for t in run.first_tokens),
        "first ms, one by one": 1e3
        * statistics.median(t for run in alone for t in run.first_tokens),
        "differs": sum(
            text != wanted for run in runs for text, wanted in zip(run.texts, expected, strict=True)
        ),
    }


# --- waiting for another's prompt -------------------------------------------------------------


def longest_wait(engine: Engine, length: int, vocab_size: int, repeats: int) -> float:
    """Of a running sequence, in the time of one chunk of the prompt that it waits for."""
    rng, chunk = random.Random(0), engine.limits.prefill_chunk
    prompt = [rng.randrange(3, vocab_size) for _ in range(length)]
    one_token = SamplingParams(max_new_tokens=1, ignore_eos=True)
    running = SamplingParams(max_new_tokens=400, ignore_eos=True)
    waits = []
    for _ in range(repeats + 1):
        alone = engine.generate(prompt, one_token)
        chunk_ms = alone.stats.prefill_ms * min(1.0, chunk / (length - 1))
        first = engine.add(prompt[:5], running)
        for _ in range(10):
            engine.step()
        other, times, is_read = engine.add(prompt, one_token), [perf_counter()], False
        while not is_read:
            chunks = engine.step()
            if any(one.handle is first for one in chunks):
                times.append(perf_counter())
            is_read = any(one.handle is other for one in chunks)
        engine.abort(first)
        while not engine.is_idle:
            engine.step()
        waits.append(1e3 * max(b - a for a, b in pairwise(times)) / chunk_ms)
    return statistics.median(waits[1:])


# --- engines ----------------------------------------------------------------------------------


def make_engine(args: argparse.Namespace, drafter: str, **limits: int) -> Engine:
    """An engine of the target that was asked for."""
    chosen = None if drafter == PLAIN else drafter
    limits |= {"max_shared_tokens": 0}  # the same prompts are run again and again
    if args.target != RANDOM:
        dtype = args.dtype
        return specrt.load(args.target, chosen, dtype=dtype, progress=False, **limits)  # type: ignore[arg-type]
    config = ModelConfig.from_dict(random_config(args.layers, args.hidden))
    dtype = getattr(torch, args.dtype)
    weights = random_weights(config, "cpu", dtype)
    model = LlamaModel(config, weights)
    made = load_drafter(chosen, model, None, DrafterOptions())
    tokenizer: Any = SilentTokenizer()
    return Engine(model, made, tokenizer, **limits)


def random_config(num_layers: int, hidden_size: int) -> dict[str, Any]:
    """The content of a ``config.json``."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 4096,
        "hidden_size": hidden_size,
        "intermediate_size": 11 * hidden_size // 4,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 256),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def prompts_of(args: argparse.Namespace, engine: Engine) -> list[list[int]]:
    """Held-out problems; for a random target, random tokens as many as these have letters / 4."""
    texts = load_prompts("heldout", HELDOUT, args.num_requests).texts
    if args.target != RANDOM:
        return [engine.encode(text) for text in texts]
    rng, vocab_size = random.Random(args.seed), engine.target.config.vocab_size
    return [[rng.randrange(3, vocab_size) for _ in range(len(text) // 4)] for text in texts]


def drafters_of(args: argparse.Namespace) -> list[str]:
    """Plain decoding first."""
    if args.drafters == "all":
        return [PLAIN, *known_drafters(args.target)]
    return [PLAIN, *(name for name in args.drafters.split(",") if name != PLAIN)]


def _parse() -> argparse.Namespace:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--target", default=BUILTIN, help=f"a checkpoint directory, {BUILTIN} or {RANDOM}")
    add("--layers", type=int, default=8, help="of the random target")
    add("--hidden", type=int, default=1024, help="of the random target, a multiple of 256")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--drafters", default="all", help="all, none, or names and paths with commas between")
    add("--max-batch", type=int, nargs="+", default=[8])
    add("--num-requests", type=int, default=32)
    add("--max-new-tokens", type=int, default=192)
    add("--load", type=float, default=8.0, help="arrivals, in what one after another could take")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=3)
    add("--chunks", type=int, nargs="*", default=[128, 256, 512], help="prefill_chunk to try")
    add("--long-prompt", type=int, default=1500, help="tokens of the prompt that others wait for")
    args = start(arguments)
    if args.target not in (BUILTIN, RANDOM):
        args.target = str(Path(args.target).resolve())
    if args.quick:
        args.num_requests, args.max_new_tokens, args.repeats = 4, 12, 1
        args.chunks, args.long_prompt = args.chunks[:1], 200
    return args


def main() -> None:
    """Measure, report, and fail if a text has changed."""
    args = _parse()
    plain = make_engine(args, PLAIN)
    jobs = make_jobs(prompts_of(args, plain), args)
    expected = one_after_another(plain, jobs).texts
    rows: list[Row] = []
    for name in drafters_of(args):
        for max_batch in args.max_batch:
            with make_engine(args, name, max_batch=max_batch) as engine:
                row = bench(engine, jobs, expected, args.repeats)
            rows.append({"drafter": Path(name).name, "max_batch": max_batch, **row})
            print(rows[-1])
    waits = {}
    for chunk in args.chunks:
        with make_engine(args, PLAIN, prefill_chunk=chunk) as engine:
            vocab_size = engine.target.config.vocab_size
            waits[str(chunk)] = longest_wait(engine, args.long_prompt, vocab_size, args.repeats)
    weights = plain.target.weights.arena.nbytes / 2**20
    summary = {"weights_MiB": weights, "wait": waits, "goal_ratio": 3.0, "goal_wait": 1.5}
    report("arrivals", rows, save=args.save, summary=summary)
    changed = [row["drafter"] for row in rows if row["differs"]]
    if changed:
        raise SystemExit(f"not lossless: {', '.join(changed)}")


if __name__ == "__main__":
    main()
