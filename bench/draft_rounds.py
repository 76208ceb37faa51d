"""Whole rounds of our drafters, as they should be on a GPU: predicted, and against their goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from bench import draft_launches
from bench.draft_launches import CHAIN, CHILDREN, DEPTH, LEVEL, OBSERVE, RERANK, Draft
from bench.harness import Row
from bench.limits import BF16, Model
from bench.round_model import (
    CARDS,
    NAME_OF_GOALS,
    STREAMING,
    TREE_NODES,
    Launch,
    round_launches,
    stage_row,
    verdict,
)

DRAFTERS = FSPAD, EAGLE2, EESD = "fspad", "eagle2", "eesd"
REDUCED = 32_000
"""Rows of a reduced draft vocabulary."""
FIRST_LAYERS = 1 / 8
"""Of the target's, which EESD drafts with."""
ROUND_GOALS = {"bf16": {"H100": 8.2, "H200": 5.8}, "fp8": {"H100": 7.1, "H200": 5.1}}
"""Milliseconds, of a reduced vocabulary and folded tables."""
PLAIN_ROUNDS, LEVEL_GOAL = 1.5, 1.1
"""Plain rounds that a round may take; of a level, times its weights' streaming."""
EXPAND_GOAL, RERANK_GOAL = 5.0, 6.0
"""Microseconds."""
Stages = Mapping[str, Sequence[Launch]]


def drafts(name: str, vocab_size: int) -> Iterator[Draft]:
    """What is predicted of FSPAD or EAGLE-2, its goals' first."""
    heads = dict.fromkeys((min(REDUCED, vocab_size), vocab_size))
    for head_rows, is_folded, weight_size in product(heads, (True, False), (BF16, 1)):
        yield Draft(name == FSPAD, is_folded, head_rows, weight_size)


def prediction(
    drafter: str, models: Mapping[str, Model], prefix: int, tau: float
) -> tuple[list[Row], dict[str, str]]:
    """Rows of every stage, and verdicts.

    Args:
        drafter: ``fspad``, ``eagle2`` or ``eesd``.
        models: targets by name.
        prefix: tokens before the round.
        tau: rows that a commit moves.
    """
    rows: list[Row] = []
    for name, model in models.items():
        plain = list(round_launches(model, 1, prefix, 1.0))
        if drafter == EESD:
            rows += _eesd_rows(name, model, prefix, tau, plain)
            continue
        for draft in drafts(drafter, model.vocab_size):
            rows += _tree_rows(name, model, draft, prefix, tau, plain)
    columns = {column: None for row in rows for column in row}
    rows = [{**columns, **row} for row in rows]
    return rows, _verdicts(drafter, rows)


# --- rows -------------------------------------------------------------------------------------


def _tree_rows(
    name: str, model: Model, draft: Draft, prefix: int, tau: float, plain: Sequence[Launch]
) -> list[Row]:
    launches = list(draft_launches.fspad_launches(model, draft, TREE_NODES, prefix))
    one_level = list(draft_launches.level_launches(model, draft, DEPTH - 2, prefix))
    stages = {
        CHILDREN: _of(launches, CHILDREN),
        LEVEL: one_level,
        "tree_expand alone": [replace(one_level[-1], is_before_linear=False)],
        RERANK: _of(launches, RERANK),
        OBSERVE: _of(launches, OBSERVE),
        "draft": launches,
    }
    verify = list(round_launches(model, TREE_NODES, prefix, tau))
    rows = _rows(name, str(draft), TREE_NODES, stages, verify, plain)
    least = draft_launches.weight_bytes(model, draft)
    for row in rows:
        if row["stage"] in (CHILDREN, LEVEL):
            row |= _by_card(row, lambda card: least / (STREAMING * CARDS[card].bytes_per_s))
    return rows


def _eesd_rows(
    name: str, model: Model, prefix: int, tau: float, plain: Sequence[Launch]
) -> list[Row]:
    num_layers = max(1, int(FIRST_LAYERS * model.num_layers))
    launches = list(draft_launches.eesd_launches(model, num_layers, prefix))
    tokens = _of(launches, draft_launches.TOKEN)
    stages = {
        draft_launches.TOKEN: [replace(one, count=one.count // CHAIN) for one in tokens],
        draft_launches.LAST: _of(launches, draft_launches.LAST),
        OBSERVE: _of(launches, OBSERVE),
        "draft": launches,
    }
    # What the first layers said of these tokens is there already.
    upper = replace(model, num_layers=model.num_layers - num_layers)
    rest = round_launches(upper, 1 + CHAIN, prefix, min(tau, 1 + CHAIN))
    verify = [launch for launch in rest if launch.kernel != "embed"]
    named = f"EESD, {num_layers} of {model.num_layers} layers, {CHAIN} tokens"
    return _rows(name, named, 1 + CHAIN, stages, verify, plain)


def _rows(
    name: str,
    drafter: str,
    nodes: int,
    stages: Stages,
    verify: Sequence[Launch],
    plain: Sequence[Launch],
) -> list[Row]:
    whole = [*stages["draft"], *verify]
    named = {**stages, "target": verify, "round": whole}
    rows = [
        {"model": name, "drafter": drafter} | stage_row(name, nodes, stage, launches)
        for stage, launches in named.items()
    ]
    seconds = {
        card: sum(launch.seconds(CARDS[card], overlaps=True) for launch in plain) for card in CARDS
    }
    for card in CARDS:
        ms = rows[-1][f"{card} ms, predicted"]
        rows[-1][f"{card} x plain round, predicted"] = ms / (1e3 * seconds[card])
    return rows


def _of(launches: Sequence[Launch], stage: str) -> list[Launch]:
    return [launch for launch in launches if launch.stage == stage]


def _by_card(row: Row, least: Callable[[str], float]) -> Row:
    return {
        f"{card} x streaming, predicted": row[f"{card} ms, predicted"] / (1e3 * least(card))
        for card in CARDS
    }


# --- verdicts -----------------------------------------------------------------------------------


def _verdicts(drafter: str, rows: Sequence[Row]) -> dict[str, str]:
    """Of FSPAD's goals, which are Llama-3-8B's with a reduced vocabulary and folded tables."""
    said: dict[str, str] = {}
    if drafter != FSPAD:
        return said
    for size, goals in ROUND_GOALS.items():
        named = str(Draft(True, True, REDUCED, 1 if size == "fp8" else BF16))
        those = {
            row["stage"]: row
            for row in rows
            if (row["model"], row["drafter"]) == (NAME_OF_GOALS, named)
        }
        for card, most in goals.items() if those else ():
            found = {
                "round": (those["round"][f"{card} ms, predicted"], "ms", most),
                "in plain rounds": (
                    those["round"][f"{card} x plain round, predicted"],
                    "plain rounds",
                    PLAIN_ROUNDS,
                ),
                "a level": (
                    those[LEVEL][f"{card} x streaming, predicted"],
                    "x its weights' streaming",
                    LEVEL_GOAL,
                ),
                "tree_expand": (
                    1e3 * those["tree_expand alone"][f"{card} ms, predicted"],
                    "us",
                    EXPAND_GOAL,
                ),
                "tree_rerank": (1e3 * those[RERANK][f"{card} ms, predicted"], "us", RERANK_GOAL),
            }
            said |= {f"{size}, {card}: {what}": verdict(*of) for what, of in found.items()}
    return said
