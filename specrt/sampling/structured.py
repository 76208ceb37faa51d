"""What an output's text is to conform to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_GRAMMAR_CHARS = 1 << 16
"""Of a schema as JSON, a regular expression, a grammar, or all choices together."""


def refusal(name: str, expected: str, got: object) -> ValueError:
    """The error of a field that is out of range."""
    shown = repr(got)
    shown = shown if len(shown) <= 400 else f"{shown[:400]} ..."
    return ValueError(f"{name}: expected {expected}, got {shown}")


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """A form of text; exactly one of the fields is given.

    Raises:
        ValueError: none is given or several are, or one is not what it should be; names it.
    """

    json_schema: Mapping[str, Any] | str | None = None
    """A JSON schema, also as JSON; ``{}`` is any JSON value."""
    regex: str | None = None
    """A regular expression of Rust's syntax (no look-around), which the whole text matches."""
    choice: Sequence[str] | None = None
    """The texts of which it is one."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax, as llguidance reads it; ``start`` is the text."""

    def __post_init__(self) -> None:
        given = [one.name for one in fields(self) if getattr(self, one.name) is not None]
        if len(given) != 1:
            names = ", ".join(one.name for one in fields(self))
            raise ValueError(
                f"structured: expected exactly one of {names}, got {', '.join(given) or 'none'}"
            )
        (self._check_choice if given == ["choice"] else self._check_text)(given[0])
        size = len(self.source)
        if size > MAX_GRAMMAR_CHARS:
            raise ValueError(
                f"{self.kind}: expected at most {MAX_GRAMMAR_CHARS} characters, got {size}"
            )

    def _check_choice(self, name: str) -> None:
        texts: object = self.choice
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not texts
            or any(not isinstance(text, str) or not text for text in texts)
        ):
            raise refusal(name, "a sequence of non-empty texts", texts)

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if name == "json_schema" and isinstance(value, Mapping):
            self._check_json(dict(value))
        elif not isinstance(value, str) or not value:
            kind = "a mapping or JSON" if name == "json_schema" else "a non-empty text"
            raise refusal(name, kind, value)
        elif name == "json_schema":
            try:
                schema = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise refusal(name, f"JSON ({error})", value) from error
            if not isinstance(schema, (dict, bool)):
                raise refusal(name, "a schema, a JSON object", value)

    def _check_json(self, schema: dict[str, Any]) -> None:
        try:
            json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise refusal("json_schema", f"what JSON can say ({error})", schema) from error

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> StructuredOutput:
        """One whose fields are written as JSON has them.

        Raises:
            ValueError: as the class itself, or a field is unknown.
        """
        known = [one.name for one in fields(cls)]
        if any(name not in known for name in given):
            raise refusal("structured", f"one of {', '.join(known)}", dict(given))
        return cls(**given)

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(one.name for one in fields(self) if getattr(self, one.name) is not None)

    @property
    def source(self) -> str:
        """What is given, as one text: a schema as JSON, choices as a JSON array."""
        value = getattr(self, self.kind)
        if isinstance(value, str):
            return value
        return json.dumps(dict(value) if isinstance(value, Mapping) else list(value))
