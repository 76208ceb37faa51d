"""A running training's state on disk: whole or not there, the last good one kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_FOLDER = "state"
_PARTIAL = "partial"
_PREFIX = "step-"
_RUN_FILE = "run.json"


def latest_state(out: Path) -> Path | None:
    """The newest whole state under ``out``."""
    found = [path for path in (out / _FOLDER).glob(f"{_PREFIX}*") if (path / _RUN_FILE).is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)


def read_run(state: Path) -> dict[str, Any]:
    """What :func:`write_state` was given beside the tensors.

    Raises:
        ValueError: the file is broken.
    """
    file = state / _RUN_FILE
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(run, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return run


def write_state(
    out: Path,
    step: int,
    run: Mapping[str, Any],
    save_tensors: Callable[[Path], None],
    *,
    is_main: bool,
    wait: Callable[[], None],
) -> Path:
    """Write the state after ``step`` steps, then drop older ones.

    Args:
        out: the run's directory.
        step: the number of steps done.
        run: JSON kept beside the tensors.
        save_tensors: writes into the directory it is given; called by every process.
        is_main: this process moves and removes directories.
        wait: a barrier over all processes.

    Raises:
        OSError, RuntimeError: the disk is full, or the like; the older state is untouched.
    """
    folder = out / _FOLDER
    partial, final = folder / _PARTIAL, folder / f"{_PREFIX}{step:08d}"
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait()
    try:
        save_tensors(partial)
        wait()
        if is_main:
            text = json.dumps(run, indent=2) + "\n"
            (partial / _RUN_FILE).write_text(text, encoding="utf-8")
            _put(partial, final)
    except BaseException:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    wait()
    return final


def remove_states(out: Path) -> None:
    """Drop every state of a run that is over, or shall begin anew."""
    shutil.rmtree(out / _FOLDER, ignore_errors=True)


def _put(partial: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)  # of this very step, after a stop and a resume
    partial.rename(final)
    for path in final.parent.glob(f"{_PREFIX}*"):
        if path != final:
            shutil.rmtree(path, ignore_errors=True)
