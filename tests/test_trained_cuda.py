"""Stage D: drafters trained and measured; what is asked of commands, and what is told of them."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import train_cuda, trained_cuda, trained_exact, trained_speed
from bench.contenders import Output
from bench.fake_gpu import FakeGpu
from bench.trained_setup import KINDS, Setup
from specrt.cli.app import main
from specrt.engine.results import GenerationResult
from specrt.sampling import SamplingParams
from specrt.targets import BUILTIN
from specrt.types import RoundStats

Calls = list[tuple[Sequence[str], float | None]]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    problems = tmp_path / "problems.jsonl"
    line = '{"question": "How many legs have %d cats?", "answer": "#### 4"}\n'
    problems.write_text("".join(line % number for number in range(8)))
    (tmp_path / "work").mkdir()
    return Setup(BUILTIN, problems, tmp_path / "work", is_dry=True)


def arguments(setup: Setup, step: str, **more: Any) -> argparse.Namespace:
    given = {"step": step, "data": setup.problems, "target": BUILTIN, "work": setup.work}
    given |= {"assistant": None, "dry": True, "budget": None, "save": setup.work / "results"}
    return argparse.Namespace(**{**given, **more})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What ``specrt`` is asked, which does nothing."""
    found: Calls = []
    monkeypatch.setattr(trained_cuda, "call", lambda argv, seconds: found.append((argv, seconds)))
    return found


# --- answers and drafters -------------------------------------------------------------------------


def test_the_last_problems_are_never_trained_on(setup: Setup, tmp_path: Path) -> None:
    trained, measured = (file.read_text().splitlines() for file in setup.split())
    assert (len(trained), len(measured)) == (6, 2)
    assert trained + measured == setup.problems.read_text().splitlines()
    many = tmp_path / "many.jsonl"
    many.write_text("".join(f"{number}\n" for number in range(7473)))
    first, last = (file.read_text().split() for file in replace(setup, problems=many).split())
    assert (len(first), len(last)) == (7000, 473)
    assert last == [str(number) for number in range(7000, 7473)]
    assert len(setup.prompts()) == 2 and len(setup.prompts(count=3)) == 3


def test_answers_that_there_was_time_for_are_counted(setup: Setup, calls: Calls) -> None:
    setup.answers.write_text('{"response_ids": [1, 2, 3]}\n{"response_ids": [4]}\n{"cut')
    found = trained_cuda._run_part("answers", setup, 50.0)
    (row,) = found.rows
    assert (row["answers"], row["wanted"], row["tokens"]) == (2, 12, 4) and not found.failed
    ((argv, seconds),) = calls
    assert argv[0] == "distill-data" and seconds == 50.0
    assert "--device cpu" in " ".join(argv)


def test_a_training_leaves_time_for_its_end(setup: Setup, calls: Calls) -> None:
    summary = {"num_steps": 9, "is_complete": False, "num_tokens": 8, "seconds": 2.0}
    summary |= {"tokens_per_second": 4.0, "peak_share": 0.25, "mixed_precision": "bf16"}
    summary |= {"history": [{"loss": 1.5, "tokens_per_second": 5.0}]}
    for kind in KINDS:
        setup.drafter(kind).mkdir()
        held_out: dict[str, Any] = {"held_out": {"tau": 2.5}}
        said = {"exits": [held_out]} if kind == "eesd" else held_out
        (setup.drafter(kind) / "training.json").write_text(json.dumps({**summary, **said}))
        (row,) = trained_cuda._run_part(kind, setup, 65.0).rows
        assert row["drafter"] == kind and not row["complete"]
        assert (row["% of peak"], row["chain tau"], row["loss"]) == (25.0, 2.5, 1.5)
    words = [" ".join(argv) for argv, _ in calls]
    assert words[0].startswith("train fspad --arch fspad ")
    assert words[1].startswith("train fspad --arch eagle2 ")
    assert words[2].startswith("train eesd --exit-layer 3 ")
    assert all("--max-minutes 0.667 " in one and "--lr 0.00195 " in one for one in words)


def test_a_step_that_fails_says_why(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_cuda, "call", lambda *_: None)
    assert trained_cuda._run_part("fspad", setup, 9.0).failed == [
        "fspad: RuntimeError: no drafter after 9.0 s"
    ]
    assert trained_cuda._run_part("answers", setup, 9.0).failed[0].startswith("answers: FileNot")


def test_commands_that_fail_or_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: Sequence[str], timeout: float, **_: Any) -> Any:
        if timeout < 1:
            raise subprocess.TimeoutExpired(argv, timeout)
        return subprocess.CompletedProcess(argv, int(timeout), "", "specrt: error: no\nGPU")

    monkeypatch.setattr(subprocess, "run", run)
    trained_cuda.call(["train"], 0.5)  # what it has done stays
    with pytest.raises(RuntimeError, match="^specrt: error: no GPU$"):
        trained_cuda.call(["train"], 2.0)


def test_without_problems_nothing_is_begun(setup: Setup) -> None:
    with pytest.raises(SystemExit, match="--data: expected a file of problems"):
        trained_cuda.run(arguments(setup, "answers", data=None, dry=False), FakeGpu())


# --- what is measured -----------------------------------------------------------------------------


class FakeEngine:
    """Says the prompt's length over and over; a drafter takes two tokens a round."""

    def __init__(self, drafter: str | None, *, is_wrong: bool = False) -> None:
        self._drafter, self._is_wrong = drafter, is_wrong

    def generate(self, prompts: Any, sampling: Any) -> Any:
        if isinstance(prompts[0], int):
            return self._result(prompts, sampling)
        return [self._result(*pair) for pair in zip(prompts, sampling, strict=True)]

    def _result(self, prompt: list[int], sampling: SamplingParams) -> GenerationResult:
        token_ids = [len(prompt)] * sampling.max_new_tokens
        token_ids[-1] += self._is_wrong
        rounds = len(token_ids) // (2 if self._drafter else 1)
        stats = RoundStats(rounds, 0, len(token_ids) - rounds)
        logprobs = [-1.0] * len(token_ids)
        return GenerationResult("", token_ids, prompt, "length", logprobs, 0, stats)


class FakeSetup(Setup):
    def engine(self, drafter: str | None, *, batch: int = 1, is_eager: bool = False) -> Any:
        is_wrong = str(drafter).endswith("eesd") and is_eager
        return FakeEngine(drafter, is_wrong=is_wrong)

    def prompts(self, *, count: int | None = None) -> list[list[int]]:
        return [[1] * number for number in (3, 5, 4)]


@pytest.fixture
def fake(setup: Setup) -> Setup:
    for kind in ("fspad", "eesd"):
        setup.drafter(kind).mkdir()
        (setup.drafter(kind) / "config.json").write_text("{}")
    return FakeSetup(setup.target, setup.problems, setup.work, is_dry=True)


def saved(setup: Setup, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((setup.work / f"results/{name}.json").read_text())
    return result


def test_every_way_to_generate_is_compared(fake: Setup) -> None:
    found = trained_exact.run(fake, arguments(fake, "exact"), {})
    names = [row["case"] for row in found.rows]
    assert names[:4] == [f"plain {steps} {how}" for steps in ("eager", "graph") for how in HOW]
    assert len(names) == 3 * 2 * 2 + 1 and names[-1] == "plain on the CPU, greedy"
    assert found.failed == [f"eesd eager {how}: 3 tokens of 3 prompts differ" for how in HOW]
    assert found.left_out == ["eagle2: was not trained"]
    taus = {row["case"]: row["tau"] for row in found.rows}
    assert (taus["plain graph seeds"], taus["fspad graph seeds"]) == (1.0, 2.0)
    assert found.rows[-1]["differing tokens"] == "0 from where texts part"
    assert found.rows[-1]["apart"] == 0.0
    assert saved(fake, "trained_exact")["rows"] == found.rows[:-1]  # after the last of the cases


HOW = ("greedy", "seeds")


def test_what_the_budget_cuts_is_named_and_no_failure(fake: Setup) -> None:
    found = trained_exact.run(fake, arguments(fake, "exact", budget=1e-9), {})
    assert not found.rows and not found.failed
    assert "fspad graph greedy: over the budget" in found.left_out


def theirs(rate: float) -> Any:
    class Theirs:
        def run(self, request: Any) -> Output:
            token_ids = [len(request.prompt_ids)] * request.max_new_tokens
            return Output(token_ids, 5, 5 / rate, 1 / rate, 3)

    return Theirs()


def test_ours_and_theirs_on_the_same_prompts(fake: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, request: Any) -> Output:
            raise RuntimeError("no such cache")

    made = {"static": theirs(10.0), "lookup": theirs(20.0), "assisted": Broken()}
    monkeypatch.setattr(trained_speed, "_their_contenders", lambda *_: made)
    found = trained_speed.run(fake, arguments(fake, "speed"), {})
    rows = {row["contender"]: row for row in found.rows}
    assert list(rows) == ["plain", "fspad", "eesd", "prompt-lookup", "static", "lookup"]
    assert rows["fspad"]["tau"] == 2.0 and rows["fspad"]["equal"] == "2 of 2 prompts"
    assert rows["lookup"]["tokens/s"] == pytest.approx(20.0)
    assert (rows["lookup"]["tau"], rows["lookup"]["equal"]) == (2.0, "12 of 12 tokens")
    # All prompts are shared, so both are the same tokens by times.
    ours = rows["fspad"]["tokens/s"]
    assert rows["fspad"]["x transformers"] == pytest.approx(ours / 20.0)
    assert found.left_out == ["eagle2: was not trained", "assisted: RuntimeError: no such cache"]
    assert not found.failed and saved(fake, "trained_speed")["rows"] == found.rows


def test_a_drafter_that_changes_a_token_fails(
    fake: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained_speed, "_their_contenders", lambda *_: {})
    monkeypatch.setattr(
        FakeSetup, "engine", lambda self, name: FakeEngine(name, is_wrong=name is not None)
    )
    monkeypatch.setattr(trained_cuda, "Setup", lambda *_, **__: fake)
    with pytest.raises(SystemExit, match="3 failed; the first: fspad: 2 prompts differ"):
        trained_cuda.run(arguments(fake, "speed"), FakeGpu())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["failed"]) == 3 and result["summary"]["not_measured"]
    assert {"git_commit", "date", "gpu"} <= set(result["environment"])


# --- steps of training ----------------------------------------------------------------------------


def test_steps_of_training_are_timed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    case = train_cuda.Case(train_cuda.BUNDLED, "fspad", 2, 8)
    ceilings = FakeGpu().ceilings()
    row, missing = train_cuda.one_case(case, FakeGpu(), ceilings, 0)
    assert row is not None and not missing
    assert row["tokens"] == 16 and row["ms a step"] == pytest.approx(1.6e4 / row["tokens/s"])
    share = 1e14 * row["TFLOP/s"] / ceilings.flop_per_s
    assert row["% of products"] == pytest.approx(share) and row["% of peak"] is None


@pytest.mark.slow
def test_all_steps_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``gpu-check --dry`` runs them, on the bundled target; ``specrt`` in this process."""

    def call(argv: Sequence[str], seconds: float | None) -> None:
        assert main(list(argv)) == 0

    monkeypatch.setattr(trained_cuda, "call", call)
    setup = Setup(BUILTIN, tmp_path / "none", tmp_path, is_dry=True)
    for step in ("answers", *KINDS, "speed", "exact"):
        trained_cuda.run(arguments(setup, step, data=None), FakeGpu())
    assert len(saved(setup, "trained_speed")["rows"]) == 8
    assert len(saved(setup, "trained_exact")["rows"]) == 17
