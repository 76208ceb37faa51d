"""Ways to do the same work on a GPU, measured against the one in use, and the winners put to use.

Without ``--record``: for each shape all variants in one process, in turn, over inputs that rotate;
the one in use twice, which shows how far two measurements of the same thing lie apart (spread). A
variant wins where it is quicker by more than twice the spread and by more than 2 %; ties go to the
one in use. All give the same bits, which is looked at first. Saved as ``variants_<GPU>.json``.

``--record FILE`` writes the winners of such a file into the table that launches are planned by.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gpu, limits
from bench.gpu import Contender, Device
from bench.gpu_report import Measured, run_bench
from bench.harness import Row, parser, start
from bench.probes.report import file_name
from bench.tree_attention_cuda import PAGE_SIZE, Bench, Case, Outputs
from specrt.ops import AttentionPlan

TABLE = Path(__file__).resolve().parents[1] / "csrc/tree_attention/variants.h"
IN_USE, AGAIN = gpu.OURS, "ours again"
PLANS = tuple(AttentionPlan(warps, blocks) for warps in (4, 8) for blocks in (1, 2, 4))
LEAST_GAIN = 0.02
"""Of the time in use: less is not worth a line."""
_BEGIN, _END = "    // BEGIN measured\n", "    // END measured\n"


def cases(is_quick: bool, models: Mapping[str, limits.Model]) -> Iterator[Case]:
    """Single sequences first, the tree of 60 nodes before others."""
    for batch in (1,) if is_quick else (1, 4, 16):
        for nodes in (60,) if is_quick else (60, 8, 1):
            for prefix in (2048,) if is_quick else (2048, 8192, 512, 32768):
                for name, model in models.items():
                    yield Case(name, model, batch, prefix, nodes)


def name_of(plan: AttentionPlan) -> str:
    """As it stands in a result."""
    return f"{plan.num_warps} warps, {plan.blocks_per_sm} blocks/SM"


# --- measuring --------------------------------------------------------------------------------


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    """Microseconds of every variant; no row if there is no memory for it."""
    free = device.free_bytes() * 4 // 5
    num_sets = limits.input_sets(case.work.num_bytes, case.work.num_bytes, l2_bytes, free)
    if num_sets == 0:
        return None, {IN_USE: f"{case.work.num_bytes / 1e9:.0f} GB of {free / 1e9:.0f} GB"}
    timings = device.measure(same_bits(Bench(case, num_sets, device.place)))
    found = judged(timings.graph)
    row: Row = {
        "model": case.name,
        "batch": case.batch,
        "prefix": case.prefix,
        "nodes": case.nodes,
        "winner": found.winner,
        "gain_%": 100 * found.gain,
        "spread_%": 100 * found.spread,
        **limits.figures(case.work, timings.graph[IN_USE], ceilings),
    }
    others = {f"{name}_us": 1e6 * s for name, s in timings.graph.items() if name != IN_USE}
    return row | others, timings.failures


def same_bits(bench: Bench) -> dict[str, Contender]:
    """The variants, when each has given the bits of the one in use.

    Raises:
        AssertionError: one has not.
    """
    made: dict[str, tuple[Contender, Outputs]] = {IN_USE: bench.ours(), AGAIN: bench.ours()}
    made |= {name_of(plan): bench.ours(plan) for plan in PLANS}
    expected = made[IN_USE][1]().clone()
    for name, (_, output) in made.items():
        bench.sets[0].out.fill_(float("nan"))  # what the one before wrote must not count
        assert torch.equal(output(), expected), f"{name}: other bits than the one in use"
    return {name: contender for name, (contender, _) in made.items()}


@dataclass(frozen=True)
class Verdict:
    """Of one shape's measurements."""

    winner: str
    gain: float
    """The share of the time in use that the quickest saves; what wins is not told by it alone."""
    spread: float
    """Between the two measurements of the one in use, as a share."""


def judged(seconds: Mapping[str, float]) -> Verdict:
    """Which variant is to be used.

    Args:
        seconds: by variant, ``IN_USE`` and ``AGAIN`` among them.
    """
    base = min(seconds[IN_USE], seconds[AGAIN])
    spread = abs(seconds[IN_USE] - seconds[AGAIN]) / base
    best = min(seconds, key=lambda name: seconds[name])
    gain = 1 - seconds[best] / base
    return Verdict(best if gain > max(2 * spread, LEAST_GAIN) else IN_USE, gain, spread)


# --- recording --------------------------------------------------------------------------------


def table_lines(result: Mapping[str, Any], table: str) -> list[str]:
    """The lines of ``variants.h`` for one GPU's result, narrow shapes before wide ones.

    Shapes at which the one in use won have a line, too, where a wider one would hold for them.

    Args:
        result: of this benchmark.
        table: ``variants.h`` as it was measured; what it says is the one in use.

    Raises:
        ValueError: a winner is no variant.
    """
    facts = result["environment"]["gpu"]
    arch = round(10 * float(facts["capability"]))
    origin = f"{facts['device']}, {result['environment']['date'][:10]}"
    chosen: dict[tuple[int, ...], tuple[int, int]] = {}
    for row in result["rows"]:
        key = _key(row, limits.MODELS[row["model"]])
        chosen[key] = _choice(row["winner"]) or in_use(table, arch, key)
    others = {key[0] for key, choice in chosen.items() if choice != (0, 0)}
    return [
        f"    {{{arch}, {', '.join(map(str, key))}, {{{choice[0]}, {choice[1]}}}}},  // {origin}\n"
        for key, choice in sorted(chosen.items())
        if key[0] in others
    ]


def _choice(winner: str) -> tuple[int, int] | None:
    """Warps and blocks; None: the one in use."""
    if winner == IN_USE:
        return None
    for plan in PLANS:
        if winner == name_of(plan):
            return plan.num_warps, plan.blocks_per_sm
    raise ValueError(f"no variant: {winner!r}")


def in_use(table: str, arch: int, key: Sequence[int]) -> tuple[int, int]:
    """What ``variants.h`` says of a shape, as its ``measured_choice`` does; (0, 0): the rules."""
    for line in re.findall(r"^    \{\d.*", table, re.MULTILINE):
        *about, warps, blocks = _numbers(line)
        is_near = about[:2] == [arch, key[0]]
        if is_near and all(size <= most for size, most in zip(key[1:], about[2:], strict=True)):
            return warps, blocks
    return 0, 0


def _key(row: Row, model: limits.Model) -> tuple[int, ...]:
    """Head size, rows of a sequence and KV head, such pairs, slots of the pages."""
    rows = row["nodes"] * (model.num_heads // model.num_kv_heads)
    keys = -(-(row["prefix"] + row["nodes"]) // PAGE_SIZE) * PAGE_SIZE
    return model.head_dim, rows, row["batch"] * model.num_kv_heads, keys


def with_lines(table: str, lines: Sequence[str]) -> str:
    """``variants.h`` with these lines; others of the architecture stay for what they alone hold.

    So a run that was cut takes nothing from the shapes that it did not measure.
    """
    head, rest = table.split(_BEGIN)
    old, tail = rest.split(_END)
    measured = {_numbers(line)[:-2] for line in lines}
    kept = [line for line in old.splitlines(True) if _numbers(line)[:-2] not in measured]
    return "".join([head, _BEGIN, *sorted([*kept, *lines], key=_numbers), _END, tail])


def _numbers(line: str) -> tuple[int, ...]:
    """Of a line: architecture, head size, the most rows, pairs and keys, then warps and blocks."""
    words = re.findall(r"kAny|\d+", line.split("//")[0])
    return tuple(sys.maxsize if word == "kAny" else int(word) for word in words)


def record(path: Path) -> None:
    """Put the winners of a result to use.

    Raises:
        SystemExit: it is no result of a GPU.
    """
    try:
        result = json.loads(path.read_text())
        if result["environment"]["gpu"]["device"].startswith("no GPU"):
            raise SystemExit(f"{path}: a dry run, no figure is real")
        table = TABLE.read_text()
        lines = table_lines(result, table)
        arch = round(10 * float(result["environment"]["gpu"]["capability"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: no result of this benchmark: {error!r}") from None
    TABLE.write_text(with_lines(table, lines))
    print(f"{TABLE.name}: {len(lines)} lines for compute capability {arch / 10:g}")


def main() -> None:
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    arguments.set_defaults(device="cuda")
    arguments.add_argument("--record", type=Path, metavar="FILE", help="instead of measuring")
    arguments.add_argument("--only", metavar="CASE", help="shapes whose name contains this")
    arguments.add_argument("--once", action="store_true", help="one launch, for a profiler")
    args = start(arguments)
    if args.record:
        record(args.record)
        return
    torch.manual_seed(0)
    device = gpu.chosen_device(args)
    chosen = [case for case in cases(args.quick, device.models) if (args.only or "") in str(case)]
    if not chosen:
        raise SystemExit(f"--only: no shape's name contains {args.only!r}")
    if args.once:
        Bench(chosen[0], 1, device.place).ours()[0].run()
        return
    run_bench(result_name(device), chosen, one_case, args, device)


def result_name(device: Device) -> str:
    """``variants_h100_80gb_hbm3``, say."""
    return file_name("variants", str(device.facts()["device"]).split(":")[0])


if __name__ == "__main__":
    main()
