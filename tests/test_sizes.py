"""How long a file and a function of specrt may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "specrt"
FILE_LINES, FUNCTION_LINES = 400, 60


def function_lengths(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """From ``def`` to the end; decorators and docstrings, which may say all there is, left out."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first, length = node.body[0], (node.end_lineno or 0) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= (first.end_lineno or 0) - first.lineno + 1
        yield node.name, length


def too_long(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        place, lines = path.relative_to(package), len(text.splitlines())
        if lines > FILE_LINES:
            found.append(f"{place}: {lines} lines")
        found += [
            f"{place}: {name} has {length} lines"
            for name, length in function_lengths(ast.parse(text))
            if length > FUNCTION_LINES
        ]
    return found


def test_no_file_and_no_function_is_too_long() -> None:
    assert too_long(PACKAGE) == []


def function(num_lines: int, docstring: str = "") -> str:
    return f"@decorator\ndef f():\n{docstring}" + "    x = 1\n" * (num_lines - 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * 400, []),
        ("x = 1\n" * 401, ["a/b.py: 401 lines"]),
        (function(60), []),
        (function(61), ["a/b.py: f has 61 lines"]),
        (function(60, '    """One.\n\n    Two.\n    """\n'), []),
        (function(61).replace("def", "async def"), ["a/b.py: f has 61 lines"]),
        (
            indent(function(61), "    ").replace("    @", "class A:\n    @"),
            ["a/b.py: f has 61 lines"],
        ),
    ],
)
def test_planted_lengths(tmp_path: Path, text: str, found: list[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text(text)
    assert too_long(tmp_path) == found
