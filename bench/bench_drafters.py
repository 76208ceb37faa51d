"""Drafters against each other: tau and speed by tree size, temperature and coupling.

All run over one target in memory, on the same prompts, in turn. tau is the mean over all rounds of
accepted tokens + 1; a drafter of several training seeds has the mean of their taus, and the least
and the greatest. Rates are of decoding alone; ``speed-up`` is the median over prompts of how many
times as fast as plain decoding in the same run, from medians over repeats. ``draft %`` and
``verify %`` are shares of decoding time. ``reached`` is the share of rounds with a tree that deep
whose accepted path got to depth 1, 2, ...

Trees are written ``nodes (depth, top_k)``; ``auto`` is the drafter's own choice by measured cost,
so its tau depends on the machine and its load. Every output must equal plain decoding's token for
token; otherwise the run fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bench.contenders import Request, known_drafters
from bench.draft_contenders import (
    FOLDS,
    PLAIN,
    Contender,
    Run,
    SharedTarget,
    Tree,
    Variant,
    describe,
)
from bench.harness import Row, parser, report, start
from bench.prompts import HELDOUT, load_prompts
from specrt.draft.fspad.pairs import MAX_LEVELS
from specrt.targets import BUILTIN
from specrt.tree import MAX_NODES
from specrt.types import CheckpointError

_TREES = ("8", "16", "32", "60", "auto")
_SWEEP_TREES = ("32",)
_SWEEP_DEPTHS = (3, 4, 5, 6, 7, 9)
_SWEEP_TOP_KS = (2, 3, 4, 6, 8, 10)
_USUAL_MAX_NODES = 64

Families = Mapping[str, Sequence[str]]
"""Checkpoints by the name of their line: one for each training seed."""
Results = dict[Contender, list[list[Run]]]
"""By contender, prompt and repeat."""


# --- the run ----------------------------------------------------------------------------------


def make_contenders(
    shared: SharedTarget, families: Families, args: argparse.Namespace, temperature: float
) -> list[Contender]:
    """Plain decoding first, then every checkpoint in every setting."""
    # Greedy decoding draws nothing that a tree could be coupled with.
    couplings = [False, True] if temperature > 0 else [False]
    contenders = [shared.plain()]
    for name, paths in families.items():
        is_trained = shared.layer(paths[0], args.fold[0]) is not None
        folds = args.fold if is_trained else args.fold[:1]
        for fold, path in product(folds, paths):
            label = name if len(folds) == 1 else f"{name}, fold {fold}"
            contenders += shared.contenders(label, path, fold, args.shapes, couplings)
    return contenders


def run(contenders: Sequence[Contender], requests: Sequence[Request], repeats: int) -> Results:
    """Every contender on every prompt, in turn, starting with another one each time."""
    results: Results = {one: [[] for _ in requests] for one in contenders}
    turns = list(product(range(repeats), range(len(requests))))
    console = Console(stderr=True)
    for repeat, index in track(turns, console=console, disable=not sys.stderr.isatty()):
        shift = (repeat + index) % len(contenders)
        for one in [*contenders[shift:], *contenders[:shift]]:
            results[one][index].append(one.run(requests[index]))
    return results


def warm_up(contenders: Sequence[Contender], requests: Sequence[Request], page_size: int) -> None:
    """Record the steps of every length of block table, the longest first.

    The longest makes a cache grow, which drops what had been captured; so it comes twice.
    """
    by_pages = {
        -(-(len(request.prompt_ids) + request.max_new_tokens) // page_size): request
        for request in sorted(requests, key=lambda request: len(request.prompt_ids))
    }
    longest = by_pages[max(by_pages)]
    for request in [longest, *by_pages.values()]:
        for one in contenders:
            one.run(request)


# --- figures ----------------------------------------------------------------------------------


def tau(runs: Iterable[Run]) -> float:
    """Mean over all rounds of accepted tokens + 1."""
    stats = [one.stats for one in runs]
    rounds = sum(one.num_rounds for one in stats)
    return (sum(one.num_accepted_tokens for one in stats) + rounds) / rounds


def rates(prompts: Sequence[Sequence[Run]]) -> list[float]:
    """Tokens a second on each prompt: medians over repeats."""
    return [
        len(repeats[0].token_ids) / statistics.median(one.seconds for one in repeats)
        for repeats in prompts
    ]


def reached(runs: Sequence[Run]) -> list[float]:
    """Of the rounds that proposed depth 1, 2, ..., the share that accepted so deep."""
    shares: list[float] = []
    deepest = max(len(one.stats.proposed_by_depth) for one in runs)
    for level in range(deepest):
        deep = [one.stats for one in runs if len(one.stats.proposed_by_depth) > level]
        proposed = sum(stats.proposed_by_depth[level] for stats in deep)
        accepted = sum(stats.accepted_by_depth[level] for stats in deep)
        shares.append(round(accepted / proposed, 2))
    return shares


def rows_of(results: Results, temperature: float, *, has_times: bool) -> list[Row]:
    """A line for each variant; its contenders are its training seeds."""
    plain = next(runs for one, runs in results.items() if one.variant.drafter == PLAIN)
    variants: dict[Variant, list[list[list[Run]]]] = {}
    for one, runs in results.items():
        variants.setdefault(one.variant, []).append(runs)
    taus = {variant: [tau(_flat(runs)) for runs in seeds] for variant, seeds in variants.items()}
    rows = []
    for variant, seeds in variants.items():
        row = _tau_columns(variant, taus, temperature)
        flat = [one for runs in seeds for one in _flat(runs)]
        if has_times:
            row |= _time_columns(seeds, plain, flat)
        rounds = sum(one.stats.num_rounds for one in flat)
        row["nodes"] = 1 + sum(one.stats.num_draft_tokens for one in flat) / rounds
        row["reached"] = " ".join(f"{share:.2f}" for share in reached(flat))
        row["differs"] = sum(num_differing(runs, plain) for runs in seeds)
        rows.append(row)
    return rows


def _flat(prompts: Sequence[Sequence[Run]]) -> list[Run]:
    return [one for repeats in prompts for one in repeats]


def _tau_columns(
    variant: Variant, taus: Mapping[Variant, Sequence[float]], temperature: float
) -> Row:
    seeds = taus[variant]
    is_drawn = temperature > 0 and variant.tree is not None
    # A drafter that chooses for itself may decline in one of the two: nothing to compare.
    is_comparable = variant.is_coupled and variant.tree != Tree()
    uncoupled = taus.get(replace(variant, is_coupled=False)) if is_comparable else None
    gain = statistics.mean(seeds) / statistics.mean(uncoupled) - 1 if uncoupled else None
    return {
        "drafter": variant.drafter,
        "temperature": temperature,
        "tree": str(variant.tree or ""),
        "coupled": ("yes" if variant.is_coupled else "no") if is_drawn else "",
        "tau": statistics.mean(seeds),
        "least": min(seeds) if len(seeds) > 1 else None,
        "greatest": max(seeds) if len(seeds) > 1 else None,
        "coupling": None if gain is None else f"{gain:+.1%}",
        "tau of seeds": " ".join(f"{one:.3f}" for one in seeds),
    }


def _time_columns(
    seeds: Sequence[Sequence[Sequence[Run]]], plain: Sequence[Sequence[Run]], flat: Sequence[Run]
) -> Row:
    """Medians over prompts, and of those over seeds."""
    plain_rates = rates(plain)
    by_seed = [rates(runs) for runs in seeds]
    speedups = [
        statistics.median(a / b for a, b in zip(one, plain_rates, strict=True)) for one in by_seed
    ]
    milliseconds = 1e3 * sum(one.seconds for one in flat)
    return {
        "tokens/s": statistics.median(statistics.median(one) for one in by_seed),
        "speed-up": statistics.median(speedups),
        "draft %": 100 * sum(one.stats.draft_ms for one in flat) / milliseconds,
        "verify %": 100 * sum(one.stats.verify_ms for one in flat) / milliseconds,
    }


def num_differing(prompts: Sequence[Sequence[Run]], plain: Sequence[Sequence[Run]]) -> int:
    """Outputs that are not plain decoding's, of all prompts and repeats."""
    return sum(
        one.token_ids != right[0].token_ids
        for repeats, right in zip(prompts, plain, strict=True)
        for one in repeats
    )


# --- the command line -------------------------------------------------------------------------


def parse_families(names: Sequence[str], seeds_of: Sequence[str]) -> dict[str, list[str]]:
    """Checkpoints by the name of their line.

    Args:
        names: drafters of one checkpoint, as :func:`specrt.load` takes them.
        seeds_of: ``NAME=DIR,DIR,...``; takes the place of a drafter of the same name.

    Raises:
        ValueError: not of that form, or two drafters of one name.
    """
    families = {Path(name).name: [name] for name in names}
    if len(families) < len(names) or PLAIN in families:
        raise ValueError(f"--drafters: expected different names, none of them {PLAIN}")
    for entry in seeds_of:
        name, _, paths = entry.partition("=")
        if name in ("", PLAIN) or not all(paths.split(",")):
            raise ValueError(f"--seeds-of: expected NAME=DIR,DIR,..., got {entry!r}")
        families[name] = paths.split(",")
    return families


def parse_trees(
    sizes: Sequence[str], depths: Sequence[int] | None, top_ks: Sequence[int] | None
) -> list[Tree]:
    """Every size with every depth and top_k that go together; None: what suits the size.

    Raises:
        ValueError: a size is neither ``auto`` nor a number, or no shape is left.
    """
    trees = [Tree()] if "auto" in sizes else []
    shapes = list(product(depths or [None], top_ks or [None]))
    for size in sizes:
        if size != "auto" and not (size.isdigit() and 1 < int(size) <= MAX_NODES):
            raise ValueError(f"--trees: expected 2..{MAX_NODES} or auto, got {size!r}")
        if size != "auto":
            trees += [Tree.of_size(int(size), *shape) for shape in shapes]
    fitting = [tree for tree in trees if tree.fits]
    if not fitting:
        raise ValueError(
            f"--depth, --top-k: expected depth <= {MAX_LEVELS} and at most {MAX_NODES} nodes "
            "expanded below the root, got none such"
        )
    return fitting


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--target", default=BUILTIN, help="a checkpoint directory; default: the bundled model")
    add("--dtype", default="auto", help="of the target; auto: its checkpoint's")
    add("--drafters", nargs="*", help="names and directories; default: all that are bundled")
    add("--seeds-of", nargs="+", default=[], metavar="NAME=DIR,DIR,...", help="training seeds")
    add("--trees", nargs="+", help=f"node counts and auto; default: {' '.join(_TREES)}")
    add("--depth", type=int, nargs="+", help="for every size; default: what suits it")
    add("--top-k", type=int, nargs="+", help="for every size; default: what suits it")
    add("--sweep", action="store_true", help="many depths and top_ks of one size and drafter")
    add("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    add("--fold", nargs="+", choices=list(FOLDS), default=["auto"], help="several are compared")
    add("--tau-only", action="store_true", help="one run of each prompt and no times")
    add("--prompts", default="heldout", help="heldout, self-quoting, novel or JSONL")
    add("--problems", type=Path, default=HELDOUT, help="what the named sets are made of")
    add("--num-prompts", type=int, default=24)
    add("--max-new-tokens", type=int, default=128)
    add("--repeats", type=int, default=3)
    add("--name", default="drafters", help="of the saved file")
    return arguments


def _parse() -> tuple[argparse.Namespace, dict[str, list[str]]]:
    arguments = _arguments()
    args = start(arguments)
    if args.quick:
        args.num_prompts, args.repeats, args.max_new_tokens = 1, 1, 8
        args.trees = args.trees or ["8", "auto"]
    if args.sweep:
        args.trees = args.trees or _SWEEP_TREES
        args.depth = args.depth or _SWEEP_DEPTHS
        args.top_k = args.top_k or _SWEEP_TOP_KS
    if args.tau_only:
        args.repeats = 1
    names = known_drafters(args.target) if args.drafters is None else args.drafters
    try:
        families = parse_families(names, args.seeds_of)
        args.shapes = parse_trees(args.trees or _TREES, args.depth, args.top_k)
    except ValueError as error:
        arguments.error(str(error))
    if args.sweep and len(families) != 1:
        arguments.error("--sweep: name one drafter with --drafters")
    return args, families


def _requests(shared: SharedTarget, args: argparse.Namespace) -> list[Request]:
    prompts = load_prompts(args.prompts, args.problems, args.num_prompts, args.target)
    return [
        Request(shared.encode(text), args.max_new_tokens, 0.0, seed)
        for seed, text in enumerate(prompts.texts)
    ]


def _descriptions(
    shared: SharedTarget, families: Families, folds: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    described: dict[str, list[dict[str, Any]]] = {}
    for (name, paths), fold in product(families.items(), folds):
        for path in paths:
            layer = shared.layer(path, fold)
            if layer is not None:
                said = describe(path, layer, shared.model.config)
                described.setdefault(name, []).append({"fold": fold, **said})
    return described


def bench(args: argparse.Namespace, families: Families) -> tuple[list[Row], dict[str, Any]]:
    """Every temperature."""
    is_usual = all((tree.total_tokens or 1) <= _USUAL_MAX_NODES for tree in args.shapes)
    shared = SharedTarget(args.target, args.dtype, _USUAL_MAX_NODES if is_usual else MAX_NODES)
    requests, rows = _requests(shared, args), []
    summary: dict[str, Any] = {
        "prompts": f"{Path(args.prompts).name}, {len(requests)}",
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(shared.model.dtype).removeprefix("torch."),
        "drafters": _descriptions(shared, families, args.fold),
    }
    for temperature in args.temperature:
        drawn = [replace(request, temperature=temperature) for request in requests]
        contenders = make_contenders(shared, families, args, temperature)
        if not args.tau_only:
            warm_up(contenders, drawn, contenders[0].engine.cache.page_size)
        results = run(contenders, drawn, args.repeats)
        rows += rows_of(results, temperature, has_times=not args.tau_only)
    return rows, summary


def main() -> None:
    """Measure, report, and fail if a drafter changed the text."""
    args, families = _parse()
    try:
        rows, summary = bench(args, families)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
    report(args.name, rows, save=args.save, summary=summary)
    changed = [f"{row['drafter']} {row['tree']}" for row in rows if row["differs"]]
    if changed:
        raise SystemExit(f"not lossless: {', '.join(changed)}")


if __name__ == "__main__":
    main()
