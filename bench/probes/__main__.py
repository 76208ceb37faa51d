"""The command: ``python -m bench.probes``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.probes import __doc__ as _description
from bench.probes import build
from bench.probes.catalogue import BUDGET, PROBES, Probe
from bench.probes.report import Report
from bench.probes.run import run_probe

_ANSWER = 15.0
"""Seconds in which the program says what GPU it is on."""
_MOST_BUILDING = 60.0
_FOLDERS = (build.BROUGHT_ALONG, build.FOLDER)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.probes", description=_description)
    parser.add_argument("--save", type=Path, metavar="DIR", help="write probes_<card>.json there")
    parser.add_argument("--binary", type=Path, metavar="FILE", help="the program, built before")
    parser.add_argument(
        "--build-only", type=Path, metavar="DIR", help="put the program there, run nothing"
    )
    parser.add_argument("--archs", help="of the program, as 90a,80; default: this GPU's, else 90a")
    parser.add_argument("--only", help="some probes, as p1,p3")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="for all; default %(default)g",
    )
    parser.add_argument("--dry", action="store_true", help="say what would run; needs no GPU")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.budget <= 0:
        parser.error(f"--budget: expected seconds above 0, got {args.budget:g}")
    try:
        chosen = parse_only(args.only)
        archs = parse_archs(args.archs)
    except ValueError as error:
        parser.error(str(error))
    if args.build_only:
        _build_only(args.build_only, archs)
    elif args.dry:
        _dry(chosen, args.budget)
    else:
        # The probe that runs is a process group of its own: stopped by what leaves this one.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("probes: stopped"))
        raise SystemExit(_run(args, chosen, archs))


def parse_only(text: str | None) -> list[Probe]:
    """Probes by name, in their own order; all of them if none is named.

    Raises:
        ValueError: a name is unknown.
    """
    names = {name.strip() for name in (text or "").split(",") if name.strip()}
    if unknown := names - {probe.name for probe in PROBES}:
        known = ",".join(probe.name for probe in PROBES)
        raise ValueError(f"--only: expected some of {known}, got {', '.join(sorted(unknown))}")
    return [probe for probe in PROBES if not names or probe.name in names]


def parse_archs(text: str | None) -> list[str]:
    """``90a,80`` as a list.

    Raises:
        ValueError: one is no architecture.
    """
    if text is None:
        return [build.found_arch() or build.DEFAULT_ARCH]
    archs = [arch.strip() for arch in text.split(",")]
    if bad := [arch for arch in archs if not arch.rstrip("af").isdigit()]:
        raise ValueError(f"--archs: expected names such as 90a or 80, got {bad[0]!r}")
    return archs


# --- without running --------------------------------------------------------------------------


def _build_only(folder: Path, archs: Sequence[str]) -> None:
    start = time.monotonic()
    try:
        program = build.build(folder, archs, 10 * _MOST_BUILDING)
    except (build.BuildError, OSError) as error:
        raise SystemExit(f"probes: not built: {error}") from None
    size = program.stat().st_size / 1e6
    took = time.monotonic() - start
    print(f"{program}: sm_{', sm_'.join(archs)}, {size:.1f} MB, {took:.0f} s")


def _dry(chosen: Sequence[Probe], budget: float) -> None:
    print(f"{len(chosen)} probes, at most {budget:g} s in all")
    for probe in chosen:
        print(f"  {probe.name} at most {probe.seconds:g} s: {probe.question}")
        print(f"     decides: {probe.decides}")
    facts = [f"{probe.name.upper()}: not run on a GPU" for probe in chosen]
    print(json.dumps({"rows": [], "facts": facts, "failed": []}))


# --- running ----------------------------------------------------------------------------------


def _run(args: argparse.Namespace, chosen: Sequence[Probe], archs: Sequence[str]) -> int:
    """The exit code: 1 if a probe did not come to its end."""
    end = time.monotonic() + args.budget
    program, device = _find_program(args.binary, archs, end)
    print(f"GPU: {device.get('device')}, {device.get('num_sms')} SMs; program: {program}")
    if device.get("sources") != build.source_digest():
        print("the program is made of other sources than those here")
    report = Report(device, sys.argv[1:], args.save)
    try:
        report.save()
    except OSError as error:  # now, not when there are results
        raise SystemExit(f"probes: --save: {error}") from None
    for probe in chosen:
        seconds = min(probe.seconds, end - time.monotonic())
        print(report.add(probe, run_probe([str(program)], probe.name, seconds)), flush=True)
    print("\n".join(["== facts and choices", *report.facts]))
    print(json.dumps(report.result))
    return 1 if report.failed else 0


@dataclass(frozen=True)
class Candidate:
    """A program that was there before."""

    program: Path
    device: dict[str, Any]
    """What it says of the GPU; empty if it does not run."""
    flaw: str
    """Why it is not used; empty if it is."""


def _candidate(program: Path, is_asked: bool) -> Candidate:
    if not program.is_file():
        return Candidate(program, {}, "not there")
    device, failure = _device(program)
    if not failure and device.get("capability") == "9.0" and not device.get("has_hopper"):
        failure = "built without sm_90a"
    if not failure and not is_asked and device.get("sources") != build.source_digest():
        failure = "made of other sources"
    return Candidate(program, device, failure)


def _find_program(
    asked: Path | None, archs: Sequence[str], end: float
) -> tuple[Path, dict[str, Any]]:
    """One that runs on this GPU, and what it says of it: the one asked for; brought along or built
    here before, of these sources; built; of other sources, if nothing else can be had.

    Raises:
        SystemExit: there is no GPU, or no program; in a line.
    """
    paths = [asked] if asked else [folder / build.PROGRAM for folder in _FOLDERS]
    candidates = []
    for path in paths:
        candidates.append(_candidate(path, asked is not None))
        if not candidates[-1].flaw:
            return path, candidates[-1].device
    flaws = [f"{one.program}: {one.flaw}" for one in candidates if asked or one.flaw != "not there"]
    if build.found_arch() is None:
        reasons = "; ".join(["the driver is not there or sees none (--dry needs none)", *flaws])
        raise SystemExit(f"probes: no GPU: {reasons}")
    print("\n".join(f"not used: {flaw}" for flaw in flaws))
    try:
        limit = min(_MOST_BUILDING, end - time.monotonic())
        program = build.build(build.FOLDER, archs, limit)
    except (build.BuildError, OSError) as error:
        for stale in candidates:
            if stale.device:
                return stale.program, stale.device
        raise SystemExit(f"probes: no program: {'; '.join([*flaws, str(error)])}") from None
    device, failure = _device(program)
    if failure:
        raise SystemExit(f"probes: the program does not run here: {failure}")
    return program, device


def _device(program: Path) -> tuple[dict[str, Any], str]:
    """What the program says of the GPU; nothing, and why, if it does not run."""
    outcome = run_probe([str(program.resolve())], "device", _ANSWER)
    if outcome.failure or not outcome.rows:
        return {}, outcome.failure or "it says nothing of the GPU"
    return dict(outcome.rows[0]), ""


if __name__ == "__main__":
    main()
