"""A file of results that grows line by line, and that the same command goes on with."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from specrt.train.loop.lock import hold_file

_File = TypeVar("_File", bound="LineFile")


class LineFile:
    """JSON objects, one a line; a line cut short by a kill is dropped, by :meth:`begin`: until then
    nothing of the file is touched, nor ever is what is not of this kind.

    As a context that ends by an exception it removes a file that it made and wrote nothing to.

    Args:
        path: written if missing, else gone on with. One process at a time may.
        is_restart: drop what is there, once :meth:`begin` is called.

    Raises:
        ValueError: the file has lines of another kind, or another process is writing to it.
        OSError: it cannot be read or written.
    """

    what = "a result"
    """What a line is, for messages."""
    _OPENING = b'{"prompt": "'  # of each line

    def __init__(self, path: Path, *, is_restart: bool = False) -> None:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a file", str(path))
        self.path = path
        self._whole: int | None = None  # bytes, where a line cut short follows them
        self._lacks_end = False
        self._is_restart = is_restart
        self._is_new = not path.exists()
        self._run: Mapping[str, Any] = {}
        self._runs: dict[str, str] = {}
        with ExitStack() as stack:
            stack.enter_context(hold_file(path))
            # Unbuffered: what a full disk does not take is in no buffer to be tried again.
            self._file = stack.enter_context(path.open("ab", buffering=0))
            if not is_restart:
                self._read()
            self._held = stack.pop_all()

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._is_new and self.path.stat().st_size == 0:
            self.path.unlink()
        self._held.close()

    def take(self, where: str, data: dict[str, Any]) -> None:
        """Know a line that is there already.

        Raises:
            ValueError: it is of another kind; names ``where``.
        """
        raise NotImplementedError

    def begin(self, run: Mapping[str, Any]) -> None:
        """Say how results are made from here on; each line keeps it, under ``run``.

        Args:
            run: JSON values, by the names of the options.

        Raises:
            ValueError: results that are there were made otherwise.
        """
        self._run = run
        if self._is_restart:
            self._file.truncate(0)
        for theirs, where in self._runs.items():
            said = json.loads(theirs)
            for name, value in run.items():
                if name in said and said[name] != value:
                    raise ValueError(
                        f"{name}: {where}: {self.what} made with {said[name]}, not {value}; "
                        "--restart begins anew, or write to another file"
                    )
        if self._whole is not None:
            self._file.truncate(self._whole)
        if self._lacks_end:
            self._file.write(b"\n")

    def append(self, data: Mapping[str, Any]) -> None:
        """Add a line; it is in the file when this returns.

        Raises:
            OSError: it cannot be written, and nothing of it is.
        """
        size = self.path.stat().st_size
        line = memoryview(json.dumps({**data, "run": self._run}).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            said = f"{error.strerror}; the lines before are kept, the same command goes on"
            raise OSError(error.errno, said, str(self.path)) from error

    def _read(self) -> None:
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where, is_whole = f"{self.path}, line {number}", line.endswith(b"\n")
                try:
                    data: Any = json.loads(line)
                except ValueError as error:
                    if not is_whole and line.startswith(self._OPENING[: len(line)]):
                        self._whole = end
                        break
                    raise ValueError(f"{where}: not JSON: {error}") from error
                self._lacks_end = not is_whole
                end += len(line)
                if not isinstance(data, dict):
                    raise ValueError(f"{where}: expected {self.what}, got {type(data).__name__}")
                self.take(where, data)
                if isinstance(run := data.get("run"), dict):  # earlier versions wrote none
                    self._runs.setdefault(json.dumps(run), where)
