"""What a command says on stderr, and where it ends: one line for a mistake, and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

# GenerationError is a RuntimeError; CheckpointError and UnicodeDecodeError are ValueErrors.
_EXPECTED = (ValueError, TypeError, MemoryError, OSError, RuntimeError)


def run(command: Callable[[], object]) -> int:
    """Run a command and return the process's exit code.

    A mistake of the user's is one line on stderr and 2, unless ``SPECRT_TRACEBACK=1`` asks for the
    traceback; Ctrl-C is 130; a closed pipe ends quietly.
    """
    try:
        command()
        sys.stdout.flush()
    except typer.Exit as end:
        return _flushed(end.exit_code)
    except KeyboardInterrupt:
        print("specrt: interrupted", file=sys.stderr)
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
