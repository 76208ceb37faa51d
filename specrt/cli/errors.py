"""What a command says on stderr, and where it ends: one line for a mistake, and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

import typer

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

# GenerationError is a RuntimeError; CheckpointError and UnicodeDecodeError are ValueErrors.
_EXPECTED = (ValueError, TypeError, MemoryError, OSError, RuntimeError)


def run(command: Callable[[], object], *, is_last: bool = False) -> int:
    """Run a command and return the process's exit code.

    A mistake of the user's is one line on stderr and 2, unless ``SPECRT_TRACEBACK=1`` asks for the
    traceback; Ctrl-C is 130, and one more does not interrupt what the first makes necessary; a
    closed pipe ends quietly.

    Args:
        command: what to do.
        is_last: whether the process ends with it: after Ctrl-C it then ignores further ones.
    """
    with _one_interrupt():
        return _run(command, is_last)


def _run(command: Callable[[], object], is_last: bool) -> int:
    try:
        command()
        sys.stdout.flush()
    except typer.Exit as end:
        return _flushed(end.exit_code)
    except KeyboardInterrupt:
        print("specrt: interrupted", file=sys.stderr)
        if is_last and signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return FAILED
    except Exception as error:
        if os.environ.get("SPECRT_TRACEBACK") == "1" or not _is_expected(error):
            raise
        report(_message(error))
        return USER_ERROR
    return OK


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt as ever, but not where one is being handled.

    So ``finally`` and ``__exit__`` run to their ends: lock files go, an empty result is removed.
    Whoever handles SIGINT otherwise, ignoring it among them, keeps to that; so does what is not the
    main thread, where signals cannot be caught.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        # Unless a command has left it ignored.
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    handled = sys.exc_info()[1]
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    raise KeyboardInterrupt


def report(message: str) -> None:
    """Print one error line."""
    print(f"specrt: error: {' '.join(message.split())}", file=sys.stderr)


def note(message: str) -> None:
    """Print one line that is no error."""
    print(f"specrt: {message}", file=sys.stderr)


def _is_expected(error: Exception) -> bool:
    return isinstance(error, _EXPECTED) or hasattr(error, "format_message")


def _message(error: Exception) -> str:
    if hasattr(error, "format_message"):  # a usage error: no such option, a value missing, …
        return str(error.format_message())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
    return code


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush is quiet too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
