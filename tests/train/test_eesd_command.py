"""``specrt train eesd``, from files, or from nothing but a target, to exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import specrt
from specrt.builtin import heldout_prompts, target_path
from specrt.cli.answers import AnswerFile
from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import read_exit
from specrt.sampling import SamplingParams
from tests.checkpoints import edit_config, make_checkpoint
from tests.cli.test_cli import expect_one_line, run, write_tokenizer

CHANGED = (("seed", "1", 0), ("num-texts", "14", 12), ("max-length", "50", 257))
FAST = ("--max-steps", "2", "--log-steps", "1", "--no-tensorboard", "--threads", "1")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "letters"
    make_checkpoint("qwen3", path, bos_token_id=0, eos_token_id=1, max_position_embeddings=64)
    write_tokenizer(path)
    return path


def train(
    capsys: pytest.CaptureFixture[str], target: Path, out: Path, *more: str
) -> tuple[int, str, str]:
    args = ("train", "eesd", "--target", str(target), "--out", str(out), "--num-texts", "12")
    return run(capsys, *args, *FAST, *more)


def texts(out: Path, name: str = "distilled.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


# --- from the target alone ------------------------------------------------------------------------


def test_trains_on_what_the_target_says_by_itself(
    capsys: pytest.CaptureFixture[str], target: Path, tmp_path: Path
) -> None:
    code, said, err = train(capsys, target, tmp_path, "--exit-layer", "1", "--json")
    assert code == 0, err
    summary = json.loads(said)
    assert summary["num_steps"] == 2 and summary["is_complete"]
    assert "exit-1/top-1" in err
    assert json.loads((tmp_path / "training.json").read_text()) == summary
    assert read_exit(tmp_path, ModelConfig.from_directory(target)).exit_layer == 1
    drawn = [row for row in texts(tmp_path) if row["temperature"] == 1.0]
    assert len(drawn) == 6 and all(row["prompt_ids"] == [0] for row in drawn)
    openings = texts(tmp_path, "openings.jsonl")
    going_on = [[0, *row["response_ids"]] for row in openings if row["finish_reason"] == "length"]
    greedy = [row["prompt_ids"] for row in texts(tmp_path) if row["temperature"] == 0.0]
    assert sorted(greedy) == sorted(going_on)
    assert len(openings) == 6 and 0 < len(greedy) < 6  # some were over within the opening
    assert f"{6 + len(greedy)} examples" in err
    # Or a held-out text would begin as one that was trained on.
    beginnings = {tuple(row["response_ids"][:8]) for row in [*drawn, *openings]}
    assert len(beginnings) == 12


def test_an_interrupted_distillation_goes_on(
    capsys: pytest.CaptureFixture[str],
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, err = train(capsys, target, tmp_path / "whole", "--exit-layer", "1")
    assert code == 0, err
    inner, written = AnswerFile.write, []

    def interrupted(file: AnswerFile, *answer: Any) -> None:
        inner(file, *answer)
        written.append(file.path.name)
        if len(written) == 9:  # six openings, three texts
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", interrupted)
        cut = train(capsys, target, tmp_path / "cut", "--exit-layer", "1")
    assert cut[0] == 130 and len(texts(tmp_path / "cut")) == 3
    openings = tmp_path / "cut" / "openings.jsonl"
    for name, option, there in CHANGED:
        done = train(capsys, target, tmp_path / "cut", "--exit-layer", "1", f"--{name}", option)
        said = f"{openings}, line 1: an answer made with {there}, not {option}; --restart"
        assert done[0] == 2 and f"{name.replace('-', '_')}: {said}" in done[2]
    code, _, err = train(capsys, target, tmp_path / "cut", "--exit-layer", "1")
    assert code == 0 and "openings.jsonl: 0 answers written" in err and "; 3 were there" in err
    whole, resumed = (texts(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole) == len(resumed) and all(row in whole for row in resumed)


def test_text_of_another_target_is_refused(
    capsys: pytest.CaptureFixture[str], target: Path, tmp_path: Path
) -> None:
    row = {"prompt_ids": [0], "response_ids": [5], "temperature": 1.0, "seed": 1, "target": "other"}
    (tmp_path / "distilled.jsonl").write_text(json.dumps(row) + "\n")
    done = train(capsys, target, tmp_path, "--exit-layer", "1")
    assert done[0] == 2
    assert "an answer of target 'other', expected 'letters'" in done[2].splitlines()[-1]


def test_a_target_without_a_first_token_needs_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint("qwen2", tmp_path / "target")
    write_tokenizer(tmp_path / "target")
    edit_config(tmp_path / "target", bos_token_id=None)
    generation = tmp_path / "target" / "generation_config.json"
    generation.unlink(missing_ok=True)
    done = train(capsys, tmp_path / "target", tmp_path / "out", "--exit-layer", "1")
    expect_one_line(done, "data: expected --data, for this target has no first token")


# --- from files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{n} + {n} is", "response": f" {2 * n} ."} for n in range(24)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_a_table_compares_several_exits(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    given = ("--data", str(data), "--exit-layer", "3", "--exit-layer", "2", "--held-out", "0.3")
    args = ("train", "eesd", "--target", "builtin", "--out", str(tmp_path), *given, *FAST)
    code, said, err = run(capsys, *args)
    assert code == 0, err
    target = ModelConfig.from_directory(target_path())
    assert [read_exit(tmp_path / f"exit-{n}", target).exit_layer for n in (2, 3)] == [2, 3]
    assert not (tmp_path / "distilled.jsonl").exists()
    sampling, prompt = SamplingParams(max_new_tokens=12), heldout_prompts(1)
    plain = specrt.load("builtin", progress=False).generate(prompt, sampling)
    drafted = specrt.load("builtin", tmp_path / "exit-3", progress=False).generate(prompt, sampling)
    assert drafted[0].token_ids == plain[0].token_ids
    rows = [line.split() for line in said.splitlines()]
    shares = {row[0]: row[1] for row in rows if row and row[0] in ("2", "3")}
    assert shares == {"2": "0.17", "3": "0.21"}
    assert "is an estimate, not a measurement" in said
    assert said.splitlines()[-2:] == [f"drafter: {tmp_path / f'exit-{n}'}" for n in (2, 3)]


def test_features_cached_for_several_exits_serve_one(
    capsys: pytest.CaptureFixture[str], target: Path, data: Path, tmp_path: Path
) -> None:
    shared = ("--data", str(data), "--features", str(tmp_path / "features"))
    both = train(capsys, target, tmp_path / "a", *shared, "--exit-layer", "1", "--exit-layer", "2")
    assert both[0] == 0, both[2]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").iterdir()}
    one = train(capsys, target, tmp_path / "b", *shared, "--exit-layer", "2")
    assert one[0] == 0, one[2]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "features").iterdir()} == files
    kept = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a/exit-2", "b")]
    assert kept[0] == kept[1]


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--exit-layer", "0"), "exit_layer: expected 1..2 for a target of 3 layers, got 0"),
        (("--exit-layer", "1", "--exit-layer", "3"), "exit_layer: expected 1..2 for a target"),
        (("--exit-layer", "1", "--num-texts", "1"), "num_texts: expected at least 2, got 1"),
        (("--exit-layer", "1", "--max-length", "1"), "max_length: expected at least 2, got 1"),
        (("--exit-layer", "1", "--max-length", "33"), "max_length: expected at least 34 without"),
        (("--exit-layer", "1", "--held-out", "1"), "held_out: expected a share in [0, 1), got 1"),
        (("--exit-layer", "1", "--lr", "0"), "lr: expected a positive number, got 0.0"),
        (("--exit-layer", "1", "--data", "/no/file.jsonl"), "/no/file.jsonl: No such file"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str],
    target: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
) -> None:
    expect_one_line(train(capsys, target, tmp_path / "out", *more), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected one JSON object per line, got an empty file"),
        ('{"prompt": "abc"}\n', "data: no example with a response in"),
    ],
    ids=["empty", "prompts alone"],
)
def test_data_without_anything_to_learn(
    capsys: pytest.CaptureFixture[str], target: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    more = ("--exit-layer", "1", "--data", str(tmp_path / "data.jsonl"))
    expect_one_line(train(capsys, target, tmp_path / "out", *more), message)


def test_a_directory_with_a_finished_run_is_left_alone(
    capsys: pytest.CaptureFixture[str], target: Path, data: Path, tmp_path: Path
) -> None:
    more = ("--data", str(data), "--exit-layer", "1", "--exit-layer", "2")
    assert train(capsys, target, tmp_path, *more)[0] == 0
    code, _, err = train(capsys, target, tmp_path, *more)
    assert code == 2 and "already holds a model; --restart replaces it" in err
