"""Trees of a given acceptance against plain decoding on the CPU, end to end in one run.

A target of random weights says noise, so acceptance is planted (``planted.py``): a drafter that
knows plain decoding's text proposes trees of which as much is right as in a stretch of the recorded
trace whose tau is nearest to the one asked for. ``drafting`` free: that drafter takes no time, so a
row says what a drafter of that acceptance could win at the most. ``layer``: besides, all that an
FSPAD drafter of the target's width does in a round is done (random weights, EAGLE-2's depths, a
head of 32,000 rows at the most). Texts must be plain decoding's.

    python -m bench.random_checkpoint --shapes llama-1b --out DIR
    python -m bench.planted_cpu --target DIR
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.contenders import Output, Request
from bench.draft_contenders import Tree
from bench.generate_gguf import ALONE, EngineOf
from bench.harness import Row, parser, report, start
from bench.planted import PlantedDrafter, PlantedRounds, Trace, recorded_trace
from bench.whole_rounds import LayerKind, layer_round, random_layer
from specrt import Engine, load
from specrt.draft.base import Drafter, DraftParams, EmptyDrafter
from specrt.draft.fspad.drafter import FspadDrafter

PLAIN = "plain"
GOALS = ((8, 3.3), (60, 4.8))
"""Nodes, and the tau that is asked for."""
_HEAD_ROWS = 32_000


@dataclass(frozen=True)
class Case:
    """A tree and its acceptance."""

    num_nodes: int
    tau: float
    is_free: bool
    """Whether drafting takes no time."""

    def __str__(self) -> str:
        return f"{self.num_nodes} nodes, drafting {'free' if self.is_free else 'by a layer'}"


def stretch(trace: Trace, tau: float, num_tokens: int) -> Trace:
    """That part of a trace, about as long as so many tokens take, whose tau is nearest."""
    lengths = trace.accept_lengths
    size = min(len(lengths), round(num_tokens / tau))
    sums = [sum(lengths[at : at + size]) for at in range(len(lengths) - size + 1)]
    at = min(range(len(sums)), key=lambda i: abs(1 + sums[i] / size - tau))
    return replace(trace, accept_lengths=lengths[at : at + size])


def contender(engine: Engine, case: Case, answer: Sequence[int]) -> EngineOf:
    """An engine over the same weights whose trees are planted."""
    model, vocab_size = engine.target, engine.target.config.vocab_size
    tree = Tree.of_size(case.num_nodes)
    trace = stretch(recorded_trace(case.num_nodes), case.tau, len(answer))
    drafter: Drafter = PlantedDrafter(answer, trace, vocab_size, model.device)
    params: DraftParams | None = None
    if not case.is_free:
        rows = min(_HEAD_ROWS, vocab_size // 2)
        made = layer_round(model, random_layer(model, LayerKind(head_rows=rows))).drafter
        assert isinstance(made, FspadDrafter)
        drafter = PlantedRounds(made, answer, trace, vocab_size, model.device)
        params = tree.params
    return EngineOf(Engine(model, drafter, engine.tokenizer, max_nodes=64, **ALONE), params)


def run(engine: Engine, cases: Sequence[Case], request: Request, repeats: int) -> list[Row]:
    """Plain decoding and each case, in turn.

    Raises:
        SystemExit: a text is not plain decoding's.
    """
    plain = EngineOf(Engine(engine.target, EmptyDrafter(), engine.tokenizer, **ALONE))
    answer = plain.run(request).token_ids
    contenders = {PLAIN: plain} | {str(case): contender(engine, case, answer) for case in cases}
    outputs: dict[str, list[Output]] = {name: [] for name in contenders}
    for name, one in contenders.items():  # captures what is captured
        if one.run(request).token_ids != answer:
            raise SystemExit(f"not lossless: {name}")
    for _ in range(repeats):
        for name, one in contenders.items():
            outputs[name].append(one.run(request))
    return [_row(name, outputs) for name in contenders]


def _row(name: str, outputs: dict[str, list[Output]]) -> Row:
    own, plain = outputs[name], outputs[PLAIN]

    def ratio(seconds: list[tuple[float, float]]) -> float:
        return statistics.median(theirs / ours for ours, theirs in seconds)

    pairs = list(zip(own, plain, strict=True))
    rounds = own[0].num_rounds
    seconds = statistics.median(one.seconds for one in own)
    return {
        "contender": name,
        "tokens/s": len(own[0].token_ids) / seconds,
        "tau": len(own[0].token_ids) / rounds,
        "ms a round": 1e3 * seconds / rounds,
        "x plain": ratio([(a.seconds, b.seconds) for a, b in pairs]),
        "with prompt": ratio(
            [(a.seconds + a.prefill_seconds, b.seconds + b.prefill_seconds) for a, b in pairs]
        ),
    }


def _parse() -> argparse.Namespace:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--target", type=Path, required=True, help="what specrt.load takes")
    add("--dtype", default="auto", help="of it")
    add("--drafting", nargs="+", choices=["free", "layer"], default=["free", "layer"])
    add("--max-new-tokens", type=int, default=128)
    add("--prompt-tokens", type=int, default=32)
    add("--repeats", type=int, default=3)
    args = start(arguments)
    if args.quick:
        args.max_new_tokens, args.repeats = 16, 1
    return args


def main() -> None:
    """Measure and report."""
    args = _parse()
    engine = load(args.target, dtype=args.dtype, progress=False)
    generator = torch.Generator().manual_seed(0)
    size = engine.target.config.vocab_size
    prompt = torch.randint(size, (args.prompt_tokens,), generator=generator).tolist()
    cases = [Case(*goal, is_free=kind == "free") for goal in GOALS for kind in args.drafting]
    rows = run(engine, cases, Request(prompt, args.max_new_tokens, 0.0, 0), args.repeats)
    report("planted_cpu", rows, save=args.save, summary={"target": args.target.name})


if __name__ == "__main__":
    main()
