"""``make gpu-check``: what a GPU is asked in the minutes that it is at hand.

Stages, each within its time and whatever fails in between: A first contact (tests, probes of the
hardware, sanitizer, small benchmarks), B variants, C end to end, D drafters trained for a real
target. Needs no network; takes what `make gpu-package` prepared, if it lies in build/. Without a
GPU it builds what this machine can and runs the shim's tests; --dry goes through A to D on a
made-up GPU.

Exit code 1 if a command failed or was cut. gpu_check_<stage>.json is written after every command,
beside the benchmarks' own JSON; each command's output goes to a file, and its end is shown if it
failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import goals
from bench.commit import git_commit
from bench.gpu_check import machine as machines
from bench.gpu_check import package, stages
from bench.gpu_check.report import Report, facts_found, passed_before
from bench.gpu_check.run import run_stage
from bench.gpu_check.stages import PREPARES, SECONDS, Command, Machine

ROOT = Path(__file__).resolve().parents[2]
_BUILD = ROOT / "build/gpu_check"
_LISTED_FOR = {"device": "none here; as for one of compute capability 9.0", "capability": "9.0"}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", help="some of A,B,C,D,shim, as A,C; default: A, shim without a GPU"
    )
    parser.add_argument("--only-failed", action="store_true", help="what did not pass before")
    parser.add_argument("--dry", action="store_true", help="all stages on a made-up GPU")
    parser.add_argument("--list", action="store_true", help="the commands, not run")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="D: problems, as GSM8K's training set; default: what a package brought",
    )
    parser.add_argument(
        "--target", default="builtin", metavar="DIR", help="D: default: the bundled one"
    )
    parser.add_argument(
        "--assistant", metavar="DIR", help="D: for transformers' assisted generation"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="default: bench/results; its folder local without a GPU, build/gpu_check/dry if --dry",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        metavar="DIR",
        help="default: logs, in build/gpu_check or in its dry",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="results and logs in one, kept up to date; default: results.tar.gz in "
        "build/gpu_check or in its dry",
    )
    parser.add_argument(
        "--fits", action="store_true", help="only say by the exit code if this Python has it all"
    )
    return parser


def main() -> None:
    args = arguments().parse_args()
    if args.fits:
        raise SystemExit(bool(machines.lacks(sys.executable)))
    asked = _asked_stages(args)
    for line in package.unpack(ROOT) if not args.dry else ():
        print(line)
    os.environ["PYTHONPATH"] = os.pathsep.join(package.search_path(ROOT))
    machine = replace(
        machines.find(_chosen_python(), is_dry=args.dry),
        problems=_problems(args),
        target=args.target,
        assistant=args.assistant,
    )
    is_for_a_gpu = bool(set(asked) & set(stages.ON_A_GPU))
    if is_for_a_gpu and not machine.gpu and args.list:
        machine = replace(machine, gpu=_LISTED_FOR)
    if is_for_a_gpu and not machine.gpu:
        raise SystemExit(f"gpu-check: stage {asked[0]} needs a GPU, and torch sees none; try --dry")
    chosen = asked or (stages.ON_A_GPU[0] if machine.gpu else stages.WITHOUT_GPU,)
    print(f"python: {machine.python}")
    print(f"GPU: {machine.gpu.get('device', 'torch sees none: the tests under the shim')}")
    save = save_folder(args, machine)
    if args.list:
        for stage in chosen:
            _list(stage, stages.plan(machine, stage, save))
        return
    _end_on_signals()
    passed = [check(stage, machine, save, args) for stage in chosen]
    raise SystemExit(0 if all(passed) else 1)


def _asked_stages(args: argparse.Namespace) -> tuple[str, ...]:
    if args.stages is None:
        return stages.ON_A_GPU if args.dry else ()
    try:
        return stages.names_of(args.stages)
    except ValueError as error:
        raise SystemExit(f"gpu-check: {error}") from None


def _problems(args: argparse.Namespace) -> Path | None:
    """What stage D is given; a dry run finds some by itself."""
    if args.data is None:
        return None if args.dry else package.problems(ROOT)
    if not args.data.is_file():
        raise SystemExit(f"gpu-check: --data: there is no {args.data}")
    return Path(args.data).resolve()


def check(stage: str, machine: Machine, save: Path, args: argparse.Namespace) -> bool:
    """Run a stage and print what came of it; whether it passed.

    Raises:
        SystemExit: results cannot be written; or it was interrupted, after the summary.
    """
    commands = stages.plan(machine, stage, save)
    path = save / f"gpu_check_{stage}.json"
    device = machine.gpu.get("device")
    earlier = passed_before(path, device) if args.only_failed else []
    # What a dry run leaves must not take the place of a real one's.
    build = _BUILD / "dry" if machine.is_dry else _BUILD
    all_logs = {name: (args.logs or build / "logs").resolve() / name for name in SECONDS}
    logs, order = all_logs[stage], [command.name for command in commands]
    archive = (args.archive or build / "results.tar.gz").resolve()
    head = _head(stage, machine)
    report = Report(path, head, order, logs, archive, earlier, list(all_logs.values()))
    try:
        report.write()
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # before there are results to lose
        raise SystemExit(
            f"gpu-check: cannot write there (--save, --logs, --archive): {error}"
        ) from None
    try:
        run_stage(_to_run(commands, earlier), SECONDS[stage], report, logs)
    except KeyboardInterrupt:
        report.is_interrupted = True
    report.try_write()
    _show(stage, report, is_dry=machine.is_dry)
    if report.is_interrupted:
        raise SystemExit(1)
    return report.has_passed


def _to_run(commands: Sequence[Command], earlier: Sequence[dict[str, Any]]) -> list[Command]:
    """All but those that passed before; what others need runs again."""
    passed = {row["command"] for row in earlier} - {PREPARES}
    needed = {command.needs for command in commands if command.name not in passed}
    return [one for one in commands if one.name not in passed or one.name in needed]


def _show(stage: str, report: Report, *, is_dry: bool) -> None:
    """The summary comes last: of a long output the end is what is seen."""
    folder, since = report.path.parent, report.head["date"]
    for line in facts_found(folder, since) + ([] if is_dry else goals.lines(folder, since)):
        print(line)
    for line in report.left_out:
        print(f"left out: {line}")
    print(report.table())
    print(f"logs: {report.logs}; all in one: {report.archive}")
    print(f"gpu-check {stage}: {report.outcome}, {report.path}", flush=True)


def _end_on_signals() -> None:
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) != signal.SIG_IGN:  # of nohup
            signal.signal(sign, signal.default_int_handler)


def save_folder(args: argparse.Namespace, machine: Machine) -> Path:
    """Where results go: without a GPU they are not kept in the repository."""
    if args.save:
        return Path(args.save).resolve()
    if machine.is_dry:
        return _BUILD / "dry"
    return ROOT / "bench/results" if machine.gpu else ROOT / "bench/results/local"


def _chosen_python() -> str:
    candidates = [sys.executable, str(ROOT / ".venv/bin/python")]
    chosen = machines.choose_python(candidates, machines.lacks)
    if chosen is None:
        missing = machines.lacks(candidates[0], machines.REQUIRED)
        raise SystemExit(f"gpu-check: {candidates[0]} lacks {', '.join(missing)}")
    return chosen


def _head(stage: str, machine: Machine) -> dict[str, Any]:
    return {
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "stage": stage,
        "gpu": machine.gpu or None,
    }


def _list(stage: str, commands: Sequence[Command]) -> None:
    print(f"{stage}: at most {SECONDS[stage]:.0f} s")
    for command in commands:
        settings = [f"{name}={value!r}" for name, value in command.environment.items()]
        text = command.skipped or " ".join([*settings, *command.argv])
        print(f"  {command.name}, at most {command.seconds:.0f} s: {text}")


if __name__ == "__main__":
    main()
