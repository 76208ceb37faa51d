"""``specrt generate`` on a GPU with the bundled model: each drafter's text is plain decoding's.

One process a drafter, as a user starts it. Problems that the model was not trained on, greedily,
with a seed, and with filters and penalties besides; texts and finish reasons must be equal. ``tau``
is the first problem's: what a GPU's 16-bit activations leave of the drafters' accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import gpu
from bench.harness import Row, parser, report, start
from bench.prompts import HELDOUT

PLAIN = "none"
DRAFTERS = ("eesd", "fspad", "prompt-lookup", "recycle", "eagle2")
SAMPLING: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 6},
)
_SECONDS = 60.0
"""That one process may take."""
_AT_ONCE = 3
"""Processes: most of one's time goes into starting it, on one CPU. Each has its own context on the
GPU, as one by itself has; what is compared is texts, not times."""


def prompt_lines(num_tokens: int) -> str:
    """A JSON object a line: a problem and how to sample its answer."""
    problems = [json.loads(line) for line in HELDOUT.read_text().splitlines()[: len(SAMPLING)]]
    rows = (
        problem | {"max_new_tokens": num_tokens, **sampling}
        for problem, sampling in zip(problems, SAMPLING, strict=True)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def generated(
    drafter: str, device: str, prompts: Path, seconds: float = _SECONDS
) -> list[dict[str, Any]]:
    """The results of one run of the command.

    Raises:
        RuntimeError: it failed; its last words.
        subprocess.TimeoutExpired: it took longer than ``seconds``.
    """
    argv = [sys.executable, "-m", "specrt", "generate", "--file", str(prompts), "--json"]
    argv += ["--drafter", drafter, "--device", device]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode != 0:
        raise RuntimeError(" ".join(done.stderr.split())[-400:] or f"exit code {done.returncode}")
    lines = (line for line in done.stdout.splitlines() if line.startswith("{"))
    return sorted(map(json.loads, lines), key=lambda result: int(result["index"]))


def difference(found: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> str:
    """In words; empty if there is none."""
    named = ("token_ids", "text", "finish_reason")
    for index, (a, b) in enumerate(zip(found, plain, strict=True)):
        other = [name for name in named if a[name] != b[name]]
        if other:
            return f"prompt {index}: {' and '.join(other)} differ from plain decoding's"
    return ""


def rows_of(
    drafters: Sequence[str], device: str, prompts: Path, failed: list[str], end: float
) -> Iterator[Row]:
    """One a drafter; what is wrong goes to ``failed``, and so does what there is no time for."""
    plain: list[dict[str, Any]] = []
    names = (PLAIN, *drafters)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        runs = [pool.submit(_timed, name, device, prompts, end) for name in names]
    for drafter, done in zip(names, runs, strict=True):
        try:
            found, seconds = done.result()
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            failed.append(f"{drafter}: {error}")
            if not plain:
                return  # nothing to compare with
            continue
        plain = plain or found
        wrong = difference(found, plain)
        failed += [f"{drafter}: {wrong}"] if wrong else []
        tau = found[0]["stats"]["tau"]
        yield {"drafter": drafter, "equal": wrong or "yes", "tau": tau, "seconds": seconds}


def _timed(
    drafter: str, device: str, prompts: Path, end: float
) -> tuple[list[dict[str, Any]], float]:
    begun = time.monotonic()
    if begun > end:
        raise RuntimeError("over the budget")
    found = generated(drafter, device, prompts, min(_SECONDS, end - begun))
    return found, time.monotonic() - begun


def run(args: argparse.Namespace) -> None:
    """Run all and report; leave with exit code 1 if one failed."""
    device, num_tokens = ("cpu", 8) if args.dry else ("cuda", 48)
    end = time.monotonic() + (args.budget or float("inf"))
    failed: list[str] = []
    drafters = DRAFTERS[: 1 if args.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(prompt_lines(num_tokens))
        rows = list(rows_of(drafters, device, prompts, failed, end))
    report("generate_cuda", rows, save=args.save, failed=failed)
    if failed:
        raise SystemExit(f"{len(failed)} drafters failed; the first: {failed[0]}")


def main() -> None:
    """The command."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments, has_cpu_side=False)
    args = start(arguments)
    if not args.dry:
        gpu.require_gpu()
    run(args)


if __name__ == "__main__":
    main()
