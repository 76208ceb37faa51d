"""A running training's state on disk: whole or not there, the last good one kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors import SafetensorError

from specrt.config import read_json
from specrt.train.loop.checksums import check_sums, write_sums
from specrt.train.loop.summary import SUMMARY_FILE
from specrt.types import CheckpointError

_FOLDER = "state"
_PARTIAL = "partial"
_PREFIX = "step-"
_RUN_FILE = "run.json"
_PROBE = 1 << 16
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


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
        return _latest(self._folder)

    def claim(self, *, is_restart: bool = False) -> None:
        """Make sure that ``out`` is free, or holds this very run unfinished.

        Args:
            is_restart: drop what is there.

        Raises:
            ValueError: it holds a finished drafter, or a run with another identity.
            CheckpointError: the state there is damaged; names the file.
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
        with _restartable():
            check_sums(state)
            theirs = _read(state, "identity")
        for name, value in self._identity.items():
            if name in theirs and theirs[name] != value:
                raise ValueError(
                    f"out: {self._out} holds an unfinished run with {name} {theirs[name]}, "
                    f"not {value}; --restart begins anew"
                )

    def resume(self, load: Callable[[Path, dict[str, Any]], None]) -> bool:
        """Take up the newest state, if there is one; :meth:`claim` has looked at its files.

        Args:
            load: is given the state's directory and its progress.

        Raises:
            CheckpointError: ``load`` cannot read it, or its progress is missing.
        """
        state = self.latest()
        if state is None:
            return False
        with _restartable():
            progress = _read(state, "progress")
            try:
                load(state, progress)
            except (MemoryError, torch.cuda.OutOfMemoryError):
                raise
            except Exception as error:  # torch, pickle, safetensors, accelerate: each its own
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise CheckpointError(f"{state}: the state cannot be read: {reason}") from error
        return True

    def write(
        self, step: int, progress: Mapping[str, Any], save_tensors: Callable[[Path], None]
    ) -> Path:
        """Write the state after ``step`` steps, then drop older ones; every process calls this.

        Raises:
            OSError: the disk is full, or the like; names the file. The older state is untouched.
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
                write_sums(partial)
                self._put(partial, final)
        except BaseException as error:
            failure = _unwritten(partial, error) if isinstance(error, Exception) else None
            shutil.rmtree(partial, ignore_errors=True)
            if failure is None:
                raise
            kept = self.latest()
            what = "there is no state from before" if kept is None else f"{kept} is kept"
            said = f"{failure.strerror}: the state after step {step} is not saved; {what}"
            raise OSError(failure.errno, said, failure.filename) from error
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


def saved_identity(out: Path) -> dict[str, Any]:
    """What the newest state in a run's directory says a run must share with it; nothing: none.

    Raises:
        CheckpointError: the state there is damaged; names the file.
    """
    state = _latest(out / _FOLDER)
    if state is None:
        return {}
    with _restartable():
        return _read(state, "identity")


def _latest(folder: Path) -> Path | None:
    found = [
        (int(path.name.removeprefix(_PREFIX)), path)
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdecimal() and (path / _RUN_FILE).is_file()
    ]
    return max(found)[1] if found else None


def _read(state: Path, key: str) -> dict[str, Any]:
    """An object of a state's ``run.json``."""
    file = state / _RUN_FILE
    found = read_json(file).get(key)
    if not isinstance(found, dict):
        raise CheckpointError(f'{file}: "{key}": expected an object, got {type(found).__name__}')
    return found


@contextmanager
def _restartable() -> Iterator[None]:
    """Have errors of a state that is there say what can be done."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --restart begins anew") from error


def _unwritten(folder: Path, error: Exception) -> OSError | None:
    """What the file system has against a file of a folder, if that is why saving it failed."""
    newest = max(folder.glob("*"), key=lambda file: file.stat().st_mtime_ns, default=folder)
    # safetensors leaves nothing of what it could not write.
    file = folder / SAFE_WEIGHTS_NAME if isinstance(error, SafetensorError) else newest
    number = _errno(error, newest)
    return None if number is None else OSError(number, os.strerror(number), str(file))


def _errno(error: BaseException | None, file: Path) -> int | None:
    """The error number behind an error of a library that keeps it to itself."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if said := _RUST_ERRNO.search(str(error)):
            return int(said[1])
        error = error.__cause__ or error.__context__
    try:
        with file.open("ab", buffering=0) as stream:
            stream.write(bytes(_PROBE))
    except OSError as refused:
        return None if file.is_dir() else refused.errno
    return None
