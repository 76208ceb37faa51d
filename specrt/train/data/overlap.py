"""Texts that are kept out of training data because they are for measuring."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from specrt.json_lines import read_items
from specrt.train.data.records import Chat, Pair, Problem, parse_record
from specrt.train.data.turns import USER

NUM_WORDS = 13
"""Of a run that two texts do not share by chance (as of GPT-3's filter, arXiv 2005.14165,
appendix C)."""
_LEAST_WORDS = 6  # of a whole text that is shorter than such a run
_WORD = re.compile(r"\w+")


class WordRuns:
    """Runs of 13 words of some texts, in lower case and without punctuation.

    Of a text of 6 to 12 words all of it is the run; a shorter one is nobody's own and has none.

    Args:
        texts: them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            words = _words(text)
            length = min(NUM_WORDS, len(words))
            if length >= _LEAST_WORDS:
                self._runs.setdefault(length, set()).update(_runs(words, length))

    def meet(self, text: str) -> bool:
        """Whether a text has one of the runs."""
        words = _words(text)
        return any(not runs.isdisjoint(_runs(words, length)) for length, runs in self._runs.items())


def asked_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """What files of prompts or of training data ask: users' turns, later ones too, and prompts.

    Raises:
        ValueError: a file is empty, a line has none of the known forms (the message names it), or
            token ids alone.
        OSError: a file cannot be read.
    """
    for path in paths:
        for item in read_items(path):
            data = item.value()
            if isinstance(data, dict) and isinstance(data.get("turns"), list):
                yield from (str(turn) for turn in data["turns"])
                continue
            record = parse_record(item)
            if isinstance(record, Chat):
                yield from (
                    str(turn.message["content"]) for turn in record.turns if turn.role == USER
                )
            elif isinstance(record, Pair):
                yield record.prompt
            elif isinstance(record, Problem):
                yield record.question
            else:
                raise ValueError(f"{item.where}: expected texts, got token ids")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
