"""One writer at a time: a lock that goes when its process does, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_IS_HELD = (errno.EAGAIN, errno.EACCES)
# Of file systems without locks, where it is the user's care that there is one writer.
_HAS_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold_directory(directory: Path) -> Iterator[None]:
    """Be the only one who writes to a directory; it is made where it is missing.

    One that was made here and has got no files is removed again.

    Raises:
        ValueError: another process holds it; names the directory and the process.
        OSError: it cannot be written.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _hold(directory / ".lock", directory):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                directory.rmdir()


@contextmanager
def hold_file(file: Path) -> Iterator[None]:
    """Be the only one who writes to a file; the lock is a hidden file beside it.

    Raises:
        ValueError: another process holds it; names the file and the process.
        OSError: its directory cannot be written.
    """
    with _hold(file.with_name(f".{file.name}.lock"), file):
        yield


@contextmanager
def _hold(lock: Path, guarded: Path) -> Iterator[None]:
    try:
        descriptor = _taken(lock, guarded)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(guarded)) from error
    try:
        yield
    finally:
        # Before it is let go: who has opened this very file by then finds it gone and opens anew.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _taken(lock: Path, guarded: Path) -> int:
    """The lock file, opened and locked."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, guarded)
            if _is_at(lock, descriptor):
                with suppress(OSError):  # a full disk; the lock holds all the same
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} on {platform.node()}".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, guarded: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HAS_NONE:
            return
        if error.errno not in _IS_HELD:
            raise
        holder = os.pread(descriptor, 256, 0).decode("utf-8", "replace") or "of an unknown number"
        raise ValueError(
            f"{guarded}: process {holder} is writing here; wait for its end, or write elsewhere"
        ) from error


def _is_at(lock: Path, descriptor: int) -> bool:
    """Whether the name still stands for the opened file."""
    try:
        return os.path.samestat(os.stat(lock), os.fstat(descriptor))
    except FileNotFoundError:
        return False
