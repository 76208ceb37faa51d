"""Files of JSON objects: one a line, in an array, or one alone over any number of lines."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

_MARK = b"\xef\xbb\xbf"  # editors' byte order mark


@dataclass(frozen=True)
class JsonItem:
    """One item of a file, which may be no JSON: only :meth:`value` tells."""

    where: str
    """What errors call it: ``FILE, line 3``, ``FILE, item 3`` of an array, ``FILE`` alone."""
    content: Any
    """A line's bytes, or what an array or the whole file holds, parsed."""

    def value(self) -> Any:
        """What it holds.

        Raises:
            ValueError: it is not JSON; names ``where``.
        """
        is_line = isinstance(self.content, bytes)
        return _parsed(self.where, self.content) if is_line else self.content


def read_items(path: str | os.PathLike[str]) -> Iterator[JsonItem]:
    """The items of a file, as :func:`iter_items` gives them.

    Raises:
        ValueError: the file is empty, or holds an array that is not JSON.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as stream:
        yield from iter_items(str(path), stream)


def iter_items(name: str, stream: BinaryIO) -> Iterator[JsonItem]:
    """The items of a stream: lines one by one, an array or a single object as a whole.

    What begins with ``[`` is an array. An object that does not end on its line is the whole file
    if that parses. Anything else is read a line at a time, blank ones left out.

    Args:
        name: of the stream, for errors.
        stream: read from where it stands; need not be seekable.

    Raises:
        ValueError: there is no item, or an array that is not JSON.
    """
    blank, first = _beginning(stream)
    if not first.strip():
        raise ValueError(f"{name}: expected one JSON object per line, got an empty file")
    lines: Iterator[bytes] = stream
    if first.lstrip().startswith(b"["):
        items = _parsed(name, b"\n" * blank + first + stream.read())
        if not items:
            raise ValueError(f"{name}: expected JSON objects, got an empty array")
        yield from (JsonItem(f"{name}, item {n}", item) for n, item in enumerate(items, start=1))
        return
    if _is_open(first):
        rest = stream.read()
        try:
            yield JsonItem(name, _parsed(name, first + rest))
            return
        except ValueError:  # lines, of which the first is bad
            lines = io.BytesIO(rest)
    for number, line in enumerate(chain([first], lines), start=blank + 1):
        if line.strip():
            yield JsonItem(f"{name}, line {number}", line)


def _beginning(stream: BinaryIO) -> tuple[int, bytes]:
    """How many blank lines there are, and the first that is not."""
    blank, line = 0, stream.readline().removeprefix(_MARK)
    while line and not line.strip():
        blank, line = blank + 1, stream.readline()
    return blank, line


def _is_open(line: bytes) -> bool:
    """Whether a line is the beginning of an object that may go on behind it."""
    try:
        content = line.decode("utf-8").rstrip()
        json.loads(content)
    except json.JSONDecodeError as error:
        return content.lstrip().startswith("{") and error.pos == len(content)
    except (ValueError, RecursionError):
        pass
    return False


def _parsed(where: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
