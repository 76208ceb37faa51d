"""Lines, an array, one object: every item by its name, and no more read than is asked for."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specrt.json_lines import iter_items, read_items

ONE, OTHER = {"a": [1, {"b": "é"}]}, {"a": 2}


def read(content: str | bytes) -> list[tuple[str, Any]]:
    data = content.encode() if isinstance(content, str) else content
    return [(item.where, item.value()) for item in iter_items("F", io.BytesIO(data))]


@pytest.mark.parametrize("mark", ["", "\ufeff", "\n \n"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_and_one_object_over_any_number_of_lines(mark: str, indent: int | None) -> None:
    array = mark + json.dumps([ONE, OTHER], indent=indent)
    assert read(array) == [("F, item 1", ONE), ("F, item 2", OTHER)]
    (item,) = read(mark + json.dumps(ONE, indent=indent, ensure_ascii=False) + "\n")
    assert item[1] == ONE
    assert item[0] == ("F" if indent else f"F, line {1 + mark.count(chr(10))}")


def test_lines_have_their_numbers() -> None:
    content = f"\n{json.dumps(ONE)}\r\n\n  {json.dumps(OTHER)}"
    assert read(content) == [("F, line 2", ONE), ("F, line 4", OTHER)]


@pytest.mark.parametrize("bad", ['{"a": 1', '{"a": "x', "{a}", '{"a": "\xff"}', '{"a":' * 10**5])
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_line_is_named_and_the_others_stay(bad: str, place: int) -> None:
    lines = [json.dumps(ONE), json.dumps(OTHER)]
    lines.insert(place, bad)
    items = list(iter_items("F", io.BytesIO("\n".join(lines).encode("latin-1"))))
    with pytest.raises(ValueError, match=f"^F, line {place + 1}: not JSON: "):
        items.pop(place).value()
    assert [item.value() for item in items] == [ONE, OTHER]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "F: expected one JSON object per line, got an empty file"),
        ("\ufeff \n\n", "got an empty file"),
        ("[]", "F: expected JSON objects, got an empty array"),
        ("\n[1,\n2", "F: not JSON: .* line 3"),
        ("[1]\n[2]\n", "F: not JSON: Extra data: line 2"),
    ],
)
def test_a_file_without_items_is_named(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


class Pipe(io.RawIOBase):
    """Lines without an end, from which nobody can go back."""

    def __init__(self) -> None:
        self.num_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        line = b'{"a": 2}\n'
        buffer[: len(line)] = line
        self.num_read += 1
        return len(line)


def test_lines_are_read_as_they_are_asked_for() -> None:
    pipe = Pipe()
    items: Iterator[Any] = iter_items("F", io.BufferedReader(pipe, buffer_size=16))
    assert [next(items).value() for _ in range(3)] == [OTHER] * 3
    assert pipe.num_read < 20


def test_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(ONE, indent=2))
    assert [(item.where, item.value()) for item in read_items(file)] == [(str(file), ONE)]
    with pytest.raises(FileNotFoundError):
        list(read_items(tmp_path / "none"))
