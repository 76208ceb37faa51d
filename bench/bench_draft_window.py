"""Acceptance of trained drafters along long texts, with and without a window over them.

Texts: ``problems``, solved ones with an unsolved one behind them and the target's answer; ``own``,
what the target says by itself when nothing ends it. The target says each text and makes its
features once; drafters are then stepped along what it said, which is what an engine does where
nothing is drawn. A column is tau of ``--max-new-tokens`` behind so many tokens. A window is written
``size+sinks``; ``all`` sees the whole text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from bench.draft_contenders import Tree
from bench.harness import Row, parser, report, start
from bench.prompts import HELDOUT
from specrt import SamplingParams, load
from specrt.draft.base import Budget, Drafter, EmptyDrafter
from specrt.draft.kind import DrafterOptions, DraftWindow
from specrt.draft.kinds import load_drafter
from specrt.draft.length.costs import RoundCost
from specrt.engine.engine import Engine
from specrt.models.step import FINAL_TAP
from specrt.targets import BUILTIN
from specrt.tree import MAX_NODES
from specrt.types import AcceptResult, Proposal, SequenceState


@dataclass(frozen=True)
class Text:
    """A prompt, and what the target said behind it."""

    length: int
    """Of the prompt."""
    ids: list[int]
    features: torch.Tensor
    """``[len(ids) - 1, H]``: the target's, of all tokens but the last."""


def parse_window(text: str) -> DraftWindow | None:
    """``all``, or ``size`` or ``size+sinks`` in tokens."""
    if text == "all":
        return None
    size, _, sinks = text.partition("+")
    return DraftWindow(int(size), int(sinks or 0))


# --- texts ------------------------------------------------------------------------------------


def solved_problems(engine: Engine, args: argparse.Namespace) -> list[Text]:
    """Behind the last tokens of solved held-out problems and an unsolved one."""
    lines = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    solved = [f"Question: {one['question']}\nAnswer: {one['answer']}\n" for one in lines]
    texts = []
    for index in range(args.num_texts):
        examples = "".join(solved[args.num_texts + 20 * index :][:20])
        ids = engine.encode(f"{examples}Question: {lines[index]['question']}\nAnswer:")
        for length in args.lengths:
            texts.append(said(engine, ids[-length:], args.max_new_tokens))
    return texts


def own_texts(engine: Engine, args: argparse.Namespace) -> list[Text]:
    """Behind the beginnings of what the target says to a held-out problem, past every end."""
    texts = []
    for line in HELDOUT.read_text(encoding="utf-8").splitlines()[: args.num_texts]:
        prompt = engine.encode(f"Question: {json.loads(line)['question']}\nAnswer:")
        prompt = prompt[: min(args.lengths)]
        whole = said(engine, prompt, max(args.lengths) + args.max_new_tokens - len(prompt))
        for length in args.lengths:
            end = length + args.max_new_tokens
            texts.append(Text(length, whole.ids[:end], whole.features[: end - 1]))
    return texts


class _Listener(EmptyDrafter):
    """Drafts nothing, and keeps the features of one sequence: of all its tokens but the last."""

    taps = (FINAL_TAP,)

    def __init__(self) -> None:
        self.features: list[torch.Tensor] = []

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        self.features.append(taps[FINAL_TAP][0].clone())

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        self.features.append(taps[FINAL_TAP][0, :1].clone())


def said(engine: Engine, prompt: list[int], num_tokens: int) -> Text:
    """What the target says behind a prompt, past every end."""
    listener = _Listener()
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    speaker = Engine(engine.target, listener, engine.tokenizer)
    result = speaker.generate(prompt, sampling)
    return Text(len(prompt), prompt + result.token_ids, torch.cat(listener.features))


# --- drafters along them ----------------------------------------------------------------------


def accepted(tree: Proposal, said: Sequence[int]) -> int:
    """How far a tree goes along what was said behind its root."""
    tokens, parents = tree.draft_tokens[0].tolist(), tree.parents[0].tolist()
    node = 0
    for length, token in enumerate(said):
        nodes = range(node + 1, int(tree.num_nodes[0]))
        below = [i for i in nodes if parents[i] == node and tokens[i] == token]
        if not below:
            return length
        node = below[0]
    return len(said)


def num_rounds(drafter: Drafter, text: Text, budget: Budget) -> int:
    """Rounds that a drafter needs for what was said behind a prompt."""
    state = SequenceState(text.ids[: text.length], text.length, 1 << 20, 0, 0.0)
    drafter.start(state)
    for first in range(0, text.length - 1, MAX_NODES):
        piece = text.features[None, first : min(first + MAX_NODES, text.length - 1)]
        drafter.prefill(state, first, {FINAL_TAP: piece})
    rounds = 0
    while (length := len(state.token_ids)) < len(text.ids):
        tree = drafter.propose([state], budget)
        count = accepted(tree, text.ids[length:-1])
        state.token_ids.extend(text.ids[length : length + count + 1])
        path = torch.arange(count + 1, dtype=torch.int32)[None]
        result = AcceptResult(path, torch.tensor([count], dtype=torch.int32), path)
        features = text.features[None, length - 1 : length + count]
        drafter.observe([state], tree, result, {FINAL_TAP: features})
        rounds += 1
    drafter.finish(state)
    return rounds


def bench(args: argparse.Namespace) -> list[Row]:
    """A line for each drafter and window."""
    engine = load(args.target, dtype=args.dtype, progress=False)
    texts = {"problems": solved_problems, "own": own_texts}[args.text](engine, args)
    budget, rows = Budget(args.nodes, RoundCost(), Tree.of_size(args.nodes).params), []
    for path, window in product(args.drafter, args.window):
        options = DrafterOptions(window=parse_window(window))
        drafter = load_drafter(path, engine.target, None, options)
        row: Row = {"drafter": path, "window": window}
        for length in args.lengths:
            some = [text for text in texts if text.length == length]
            rounds = sum(num_rounds(drafter, text, budget) for text in some)
            row[str(length)] = sum(len(text.ids) - length for text in some) / rounds
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--target", default=BUILTIN)
    arguments.add_argument("--drafter", nargs="+", default=["fspad", "eagle2"])
    arguments.add_argument("--text", choices=["problems", "own"], default="problems")
    arguments.add_argument("--window", nargs="+", default=["all", "384", "256", "128"])
    arguments.add_argument("--lengths", nargs="+", type=int, default=[128, 256, 512, 1024, 1920])
    arguments.add_argument("--num-texts", type=int, default=8)
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--nodes", type=int, default=32, help="of a tree")
    arguments.add_argument("--dtype", default="float32")
    args = start(arguments)
    if args.quick:
        args.drafter, args.window, args.lengths = args.drafter[:1], ["all", "8+2"], [16, 40]
        args.num_texts, args.max_new_tokens = 1, 8
    names = ("text", "nodes", "num_texts", "max_new_tokens")
    summary = {name: getattr(args, name) for name in names}
    report("draft_window", bench(args), save=args.save, summary=summary)


if __name__ == "__main__":
    main()
