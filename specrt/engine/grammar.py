"""Structured output: which tokens a form of text allows next, by llguidance.

A matcher follows one request's output. It holds nothing that its tokens do not say: asked for a
path that does not go on from where it stands, it begins again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from specrt.engine.editor import EditError, Row
from specrt.models.tokenizer import Tokenizer
from specrt.reuse import Recent
from specrt.sampling import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_COMPILED = 32  # grammars that are kept
# Between the tokens of JSON: no model can go on with white space for ever. (A schema's own
# "x-guidance" goes before it.)
_JSON_SPACE = " ?"


# Of llguidance's automata: a mask within 50 ms, where its own limits allow a second.
_FIRST_FUEL, _STEP_FUEL = 100_000, 20_000


class Grammars:
    """Compiles forms of text for one tokenizer, and keeps the last ones.

    Args:
        tokenizer: whose tokens spell the text.
        eos_ids: tokens that end a sequence, of the model.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._inner: LLTokenizer | None = None
        self._compiled: Recent[tuple[str, str], LLMatcher] = Recent(_MAX_COMPILED)
        self._lock = Lock()  # requests are checked by whatever thread adds them

    def compile(self, form: StructuredOutput) -> LLMatcher:
        """A matcher at its beginning, to be copied.

        Compiling is limited in size by llguidance (``LLParserLimits``), and may take seconds.

        Raises:
            ValueError: the form is none, can match no text, or is too large; llguidance is not
                installed, or cannot read the tokenizer.
        """
        key = form.kind, form.source
        with self._lock:
            found = self._compiled.get(key)
        if found is None:
            found = self._made(form)  # outside of the lock: others' forms are ready meanwhile
            with self._lock:
                self._compiled.put(key, found)
        return found

    def mask(self, form: StructuredOutput, stop_ids: Sequence[int]) -> GrammarMask:
        """What :meth:`compile` gives, for one request.

        Args:
            form: of its output.
            stop_ids: tokens that end its output.
        """
        matcher = self.compile(form)
        return GrammarMask(matcher.deep_copy, stop_ids, self._eos_ids)

    def _made(self, form: StructuredOutput) -> LLMatcher:
        tokenizer = self._tokens()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=_FIRST_FUEL, step_lexer_fuel=_STEP_FUEL)
        try:
            grammar = _grammar(form)
        except ValueError as error:
            raise ValueError(f"{form.kind}: {error}") from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            tried = matcher.deep_copy()
            tried.compute_bitmask()  # here, not in a round: some forms are found too large by it
            matcher = tried if tried.is_error() else matcher
        if matcher.is_error():
            lines = matcher.get_error().strip().splitlines()
            raise ValueError(f"{form.kind}: {' '.join(line.strip() for line in lines[:4])}"[:500])
        return matcher

    def _tokens(self) -> LLTokenizer:
        if self._inner is None:
            self._inner = _tokens_of(self._tokenizer, self._eos_ids)
        return self._inner


class GrammarMask:
    """Tokens with which the output's text goes on in its form.

    Args:
        begin: gives a matcher at its beginning.
        stop_ids: tokens that end the output; they come where the text may end.
        eos_ids: tokens that end a sequence: they are no text.
    """

    name = "structured"

    def __init__(
        self, begin: Callable[[], LLMatcher], stop_ids: Sequence[int], eos_ids: Sequence[int]
    ) -> None:
        self._begin = begin
        self._stop_ids = list(stop_ids)
        self._eos_ids = list(eos_ids)
        self._matcher = begin()
        self._read: list[int] = []  # tokens that it has taken

    def forbid(self, output: Sequence[int], row: Row) -> None:
        """As :class:`~specrt.engine.editor.Mask`."""
        self._go_to(output)
        matcher = self._matcher
        is_in = np.zeros(len(row), dtype=np.bool_)
        if not matcher.is_stopped():
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            count = min(len(row), 8 * len(bits))
            is_in[:count] = np.unpackbits(bits, count=count, bitorder="little")
            is_in[self._eos_ids] = False
        if matcher.is_error():
            raise self._fault()
        if matcher.is_accepting():
            is_in[self._stop_ids] = True
        row[~is_in] = -np.inf

    def _go_to(self, output: Sequence[int]) -> None:
        count = len(self._read)
        if self._read != list(output[:count]):
            self._matcher, self._read, count = self._begin(), [], 0
        rest = list(output[count:])
        if rest and not self._matcher.consume_tokens(rest):
            raise self._fault()
        self._read += rest

    def _fault(self) -> EditError:
        lines = self._matcher.get_error().strip().splitlines()
        return EditError(f"structured: {lines[0] if lines else 'llguidance failed'}"[:300])


def _grammar(form: StructuredOutput) -> str:
    from llguidance import LLMatcher

    source = form.source
    if form.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(
            source, defaults={"whitespace_pattern": _JSON_SPACE}
        )
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if form.kind == "choice":
        texts = json.loads(source)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
    return LLMatcher.grammar_from_lark(source)


def _tokens_of(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> LLTokenizer:
    """Which bytes each token stands for.

    Raises:
        ValueError: as :meth:`Grammars.compile`.
    """
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ValueError(
            "structured: needs llguidance, which is not installed: pip install 'specrt[structured]'"
        ) from error
    inner: Any = getattr(tokenizer, "inner", None)
    try:
        return from_tokenizer(inner, eos_token=list(eos_ids) or None)
    except Exception as error:  # of whatever the tokenizer is made of
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"structured: llguidance cannot read a {type(inner).__name__}, the target's tokenizer: "
            f"{what}"
        ) from error
