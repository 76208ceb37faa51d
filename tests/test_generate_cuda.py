"""The command line on a GPU against plain decoding: what it asks, and what it finds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench import generate_cuda
from specrt.cli.prompts import own_sampling, read_prompts
from specrt.sampling import SamplingParams

Results = list[dict[str, Any]]


def results(last: int = 3) -> Results:
    return [
        {"index": i, "token_ids": [1, last], "text": "a", "finish_reason": "length"}
        | {"stats": {"tau": 2.0}}
        for i in range(3)
    ]


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answers: dict[str, Results]
) -> tuple[dict[str, Any], str]:
    """The result of a run whose processes say ``answers``, and its last words."""

    def generated(drafter: str, device: str, prompts: Path, seconds: float) -> Results:
        if drafter not in answers:
            raise RuntimeError("no such kernel")
        return answers[drafter]

    monkeypatch.setattr(generate_cuda, "generated", generated)
    words = ""
    try:
        generate_cuda.run(argparse.Namespace(dry=True, quick=False, budget=None, save=None))
    except SystemExit as end:
        words = str(end)
    return json.loads(capsys.readouterr().out.splitlines()[-1]), words


def test_equal_texts_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("none", *generate_cuda.DRAFTERS)
    result, words = run(monkeypatch, capsys, dict.fromkeys(names, results()))
    assert result["failed"] == [] and words == ""
    assert [row["drafter"] for row in result["rows"]] == list(names)


def test_another_text_and_a_failure_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = dict.fromkeys(("none", "fspad", "recycle", "prompt-lookup"), results())
    result, words = run(monkeypatch, capsys, answers | {"eesd": results(last=4)})
    other = "prompt 0: token_ids differ from plain decoding's"
    assert result["failed"] == [f"eesd: {other}", "eagle2: no such kernel"]
    assert [row["equal"] for row in result["rows"]] == ["yes", other, "yes", "yes", "yes"]
    assert words == f"2 drafters failed; the first: eesd: {other}"


def test_without_plain_decoding_nothing_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, words = run(monkeypatch, capsys, {"eesd": results()})
    assert result["rows"] == [] and words.endswith("none: no such kernel")


def test_prompts_that_the_command_takes(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(generate_cuda.prompt_lines(9))
    prompts = read_prompts(None, str(file), is_jsonl=False, is_chat=False)
    params = own_sampling(prompts, SamplingParams())
    assert [p.max_new_tokens for p in params] == [9] * 3
    assert [p.is_greedy for p in params] == [True, False, False]
    assert params[2].repetition_penalty == 1.1


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(generate_cuda.prompt_lines(4))
    failed: list[str] = []
    rows = list(generate_cuda.rows_of(["eesd"], "cpu", file, failed, float("inf")))
    assert [row["equal"] for row in rows] == ["yes", "yes"] and not failed
    with pytest.raises(RuntimeError, match="drafter"):
        generate_cuda.generated("no such", "cpu", file)
