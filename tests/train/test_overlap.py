"""Runs of words that two texts share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specrt.train.data.overlap import WordRuns, asked_texts

WORDS = [f"w{number}" for number in range(20)]


@pytest.mark.parametrize("length", [12, 13, 14])
def test_thirteen_words_in_a_row_make_a_copy(length: int) -> None:
    runs = WordRuns([" ".join(WORDS)])
    assert runs.meet("x, " + "; ".join(WORDS[3 : 3 + length]).upper() + ". y") == (length >= 13)


@pytest.mark.parametrize("length", [5, 6, 12])
def test_a_shorter_text_is_met_as_a_whole(length: int) -> None:
    runs = WordRuns([" ".join(WORDS[:length])])
    assert runs.meet(" ".join(["so", *WORDS[:length], "then"])) == (length >= 6)
    assert not runs.meet(" ".join(WORDS[: length - 1]))


def test_no_texts_meet_nothing() -> None:
    assert not WordRuns([]).meet("anything at all")


def test_all_that_is_asked_counts(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    items = (
        {"turns": ["first", "second"]},
        {"question": "third", "answer": "no"},
        {"prompt": "fourth", "response": "no"},
        {"messages": [{"role": "user", "content": "fifth"}, {"role": "assistant", "content": "n"}]},
    )
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert list(asked_texts([file])) == ["first", "second", "third", "fourth", "fifth"]
    file.write_text(json.dumps({"prompt_ids": [1], "response_ids": [2]}))
    with pytest.raises(ValueError, match=r"measured.jsonl.*expected texts, got token ids"):
        list(asked_texts([file]))
