"""A running training's state on disk: whole or not there, the last good one kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from specrt.train.summary import SUMMARY_FILE

_FOLDER = "state"
_PARTIAL = "partial"
_PREFIX = "step-"
_RUN_FILE = "run.json"


class StateFolder:
    """The states of one run, in ``OUT/state``.

    Args:
        out: the run's directory.
        identity: JSON values that a run must share with the one it takes up.
        accelerator: this process's place; the main one moves and removes directories.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], accelerator: Accelerator) -> None:
        self._out = out
        self._folder = out / _FOLDER
        self._identity = dict(identity)
        self._accelerator = accelerator

    def latest(self) -> Path | None:
        """The newest whole state."""
        found = [p for p in self._folder.glob(f"{_PREFIX}*") if (p / _RUN_FILE).is_file()]
        return max(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)

    def claim(self, *, is_restart: bool = False) -> None:
        """Make sure that ``out`` is free, or holds this very run unfinished.

        Args:
            is_restart: drop what is there.

        Raises:
            ValueError: it holds a finished drafter, or a run with another identity.
        """
        if is_restart:
            self._accelerator.wait_for_everyone()
            if self._accelerator.is_main_process:
                self.remove()
            self._accelerator.wait_for_everyone()
            return
        state = self.latest()
        if state is None:
            if any((self._out / name).exists() for name in ("config.json", SUMMARY_FILE)):
                raise ValueError(f"out: {self._out} already holds a model; --restart replaces it")
            return
        theirs = _read(state)["identity"]
        for name, value in self._identity.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"out: {self._out} holds an unfinished run with {name} {theirs.get(name)}, "
                    f"not {value}; --restart begins anew"
                )

    def read(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest state's directory and progress; None where there is none."""
        state = self.latest()
        return None if state is None else (state, _read(state)["progress"])

    def write(
        self, step: int, progress: Mapping[str, Any], save_tensors: Callable[[Path], None]
    ) -> Path:
        """Write the state after ``step`` steps, then drop older ones; every process calls this.

        Raises:
            OSError, RuntimeError: the disk is full, or the like; the older state is untouched.
        """
        is_main, wait = self._accelerator.is_main_process, self._accelerator.wait_for_everyone
        partial, final = self._folder / _PARTIAL, self._folder / f"{_PREFIX}{step:08d}"
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait()
        try:
            save_tensors(partial)
            wait()
            if is_main:
                run = {"identity": self._identity, "progress": progress}
                text = json.dumps(run, indent=2) + "\n"
                (partial / _RUN_FILE).write_text(text, encoding="utf-8")
                self._put(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        wait()
        return final

    def remove(self) -> None:
        """Drop every state."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _put(self, partial: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)  # only what is no whole state can be there
        partial.rename(final)
        for path in self._folder.glob(f"{_PREFIX}*"):
            if path != final:
                shutil.rmtree(path, ignore_errors=True)


def _read(state: Path) -> dict[str, Any]:
    file = state / _RUN_FILE
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    return run
