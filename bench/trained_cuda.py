"""Drafters trained on a GPU for a real target, and measured there: one step a process.

``answers`` has our engine answer the problems; ``fspad``, ``eagle2`` and ``eesd`` train a drafter
on the answers; ``speed`` (``bench.trained_speed``) generates with each, plainly and with
``transformers``; ``exact`` (``bench.trained_exact``) looks for tokens that differ. Steps leave what
they have in ``--work``, where the next ones find it; one that is stopped leaves what it had.

Problems are JSONL in any form that ``specrt distill-data`` reads: GSM8K's training file has 7,473.
The last 473 (of a smaller file a quarter) are measured on, the first 7,000 before them trained on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench import gpu, trained_exact, trained_speed
from bench.gpu import Device
from bench.harness import Row, environment, parser, report, start
from bench.prompts import HELDOUT
from bench.trained_setup import KINDS, Found, Setup
from specrt.config import ModelConfig
from specrt.targets import BUILTIN, target_path

_DRY_PROBLEMS = 12
_WARM = 25.0
"""Seconds of a training beside its steps: features, compiling, figures at the end."""


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    answer_tokens: int = 192
    answer_batch: int = 64
    batch: int = 64
    epochs: int = 8
    max_steps: int | None = None

    @property
    def recipe(self) -> list[str]:
        """Options of ``specrt train``."""
        steps = [] if self.max_steps is None else ["--max-steps", str(self.max_steps)]
        return ["--batch", str(self.batch), "--epochs", str(self.epochs), *steps]


_SIZES = Sizes()
_DRY_SIZES = Sizes(answer_tokens=4, answer_batch=4, batch=4, epochs=1, max_steps=1)


def call(arguments: Sequence[str], seconds: float | None) -> None:
    """Run ``specrt`` in a process of its own; what it has done by the end of its time stays.

    Raises:
        RuntimeError: it failed; its last words.
    """
    command = [sys.executable, "-m", "specrt", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-400:]
        raise RuntimeError(said or f"exit code {done.returncode}")


# --- steps ------------------------------------------------------------------------------------


def answers(setup: Setup, sizes: Sizes, budget: float | None) -> list[Row]:
    """The target's own answers to the problems that are trained on, greedy and drawn."""
    begun = time.monotonic()
    problems, _ = setup.split()
    options = ["--prompts", str(problems), "--out", str(setup.answers), "--target", setup.target]
    options += ["--temperature", "0", "--temperature", "1", "--device", setup.device]
    options += ["--max-new-tokens", str(sizes.answer_tokens)]
    call(["distill-data", *options, "--batch-size", str(sizes.answer_batch)], budget)
    seconds = time.monotonic() - begun
    with setup.answers.open() as lines:
        lengths = [len(json.loads(line)["response_ids"]) for line in lines if line.endswith("\n")]
    wanted = 2 * sum(1 for _ in problems.open())
    row = {"step": "answers", "answers": len(lengths), "wanted": wanted, "tokens": sum(lengths)}
    return [row | {"seconds": seconds, "tokens/s": sum(lengths) / seconds}]


def trained(kind: str, setup: Setup, sizes: Sizes, budget: float | None) -> list[Row]:
    """A drafter of a kind; the learning rate falls with the target's width.

    Raises:
        RuntimeError: it was not finished in its time, or failed.
    """
    target = ModelConfig.from_directory(target_path(setup.target))
    out = setup.drafter(kind)
    options = ["eesd", "--exit-layer", str(max(1, target.num_layers // 8))]
    if kind != "eesd":
        options = ["fspad", "--arch", kind]
    options += ["--target", setup.target, "--data", str(setup.answers), "--out", str(out)]
    options += ["--device", setup.device, "--lr", f"{0.5 / target.hidden_size:.3g}", "--restart"]
    options += ["--schedule", "cosine", "--warmup", "50", "--held-out", "0.02", *sizes.recipe]
    if budget is not None:
        options += ["--max-minutes", f"{max(5.0, budget - _WARM) / 60:.3f}"]
    call(["train", *options, "--no-tensorboard"], budget)
    summary_file = out / "training.json"
    if not summary_file.exists():
        raise RuntimeError(f"no drafter after {budget} s")
    return [_training_row(kind, json.loads(summary_file.read_text()))]


def _training_row(kind: str, summary: Mapping[str, Any]) -> Row:
    held_out = summary.get("held_out") or summary["exits"][0]["held_out"]
    last = summary["history"][-1]
    return {
        "drafter": kind,
        "steps": summary["num_steps"],
        "complete": summary["is_complete"],
        "tokens": summary["num_tokens"],
        "seconds": summary["seconds"],
        "tokens/s": summary["tokens_per_second"],
        "tokens/s at the end": last["tokens_per_second"],
        "% of peak": 100 * summary["peak_share"] if "peak_share" in summary else None,
        "precision": summary["mixed_precision"],
        "loss": last["loss"],
        "chain tau": held_out["tau"],
    }


def _run_part(step: str, setup: Setup, budget: float | None) -> Found:
    """A step that calls commands."""
    sizes = _DRY_SIZES if setup.is_dry else _SIZES
    try:
        if step == "answers":
            return Found(answers(setup, sizes, budget))
        return Found(trained(step, setup, sizes, budget))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        return Found(failed=[f"{step}: {gpu.reason(error)}"])


# --- the command ------------------------------------------------------------------------------


def run(args: argparse.Namespace, device: Device) -> None:
    """One step; leaves with exit code 1 if it failed.

    Raises:
        SystemExit: so; or there are no problems.
    """
    problems = args.data or (_dry_problems(args.work) if args.dry else None)
    if problems is None:
        raise SystemExit("--data: expected a file of problems, GSM8K's training set for one")
    setup = Setup(args.target, problems, args.work, args.assistant, is_dry=args.dry)
    setup.work.mkdir(parents=True, exist_ok=True)
    where = environment() | {"gpu": device.facts()}
    measured: Mapping[str, Callable[..., Found]] = {
        "speed": trained_speed.run,
        "exact": trained_exact.run,
    }
    if args.step in measured:
        found = measured[args.step](setup, args, where)
    else:
        found = _run_part(args.step, setup, args.budget)
    summary = {"not_measured": found.left_out}
    name = f"trained_{args.step}"
    report(name, found.rows, save=args.save, summary=summary, where=where, failed=found.failed)
    if found.failed:
        raise SystemExit(f"{len(found.failed)} failed; the first: {found.failed[0]}")


def _dry_problems(work: Path) -> Path:
    """A few of the bundled ones."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "problems.jsonl"
    with HELDOUT.open() as lines:
        file.write_text("".join(islice(lines, _DRY_PROBLEMS)))
    return file


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    arguments.add_argument("step", choices=["answers", *KINDS, "speed", "exact"])
    arguments.add_argument("--data", type=Path, metavar="FILE", help="of problems, JSONL")
    arguments.add_argument("--target", default=BUILTIN, help="a directory; default: the bundled")
    arguments.add_argument("--assistant", metavar="DIR", help="a model to assist transformers with")
    arguments.add_argument("--work", type=Path, required=True, metavar="DIR", help="of the steps")
    gpu.add_arguments(arguments, has_cpu_side=False)
    args = start(arguments)
    run(args, gpu.chosen_device(args))


if __name__ == "__main__":
    main()
