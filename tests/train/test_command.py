"""``specrt train fspad``, from files to a drafter."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import specrt
from specrt.builtin import heldout_prompts, target_path
from specrt.cli.app import main
from specrt.config import ModelConfig
from specrt.draft.fspad.checkpoint import ARCHS, TOKEN_IDS, read_checkpoint
from specrt.models.tokenizer import load_tokenizer
from specrt.sampling import SamplingParams
from specrt.train.loop.lock import hold_directory
from specrt.train.loop.report import Reporter
from specrt.train.loop.stopping import StopRequest
from specrt.train.loop.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    answers = [" 3 + 4 = 7 .\n#### 7", " She has 5 * 2 = 10 apples .\n#### 10"]
    rows = [
        {"prompt": prompt, "response": answers[number % 2]}
        for number, prompt in enumerate(heldout_prompts(12))
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def run(data: Path, out: Path, *more: str) -> int:
    given = ["--target", "builtin", "--data", str(data), "--out", str(out), "--log-steps", "1"]
    return main(["train", "fspad", *given, "--held-out", "0.2", *more])


def test_trains_and_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path, "--max-steps", "2", "--json") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert "12 examples" in captured.err and "step 1/2 loss" in captured.err
    assert summary["num_steps"] == 2 and summary["is_complete"]
    assert summary["peak_memory_bytes"] > 2**24 and summary["tokens_per_second"] > 0
    assert len(summary["held_out"]["acceptance_rate"]) == 5
    assert json.loads((tmp_path / "training.json").read_text()) == summary
    config, _ = read_checkpoint(tmp_path, ModelConfig.from_directory(target_path()))
    assert (config.arch, config.target_name) == ("fspad", "builtin")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tensorboard",
        "training.json",
    ]


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch in ("fspad", "eagle2") else pytest.mark.slow)
        for arch in ARCHS
    ],
)
def test_serves(data: Path, tmp_path: Path, arch: str) -> None:
    assert run(data, tmp_path, "--arch", arch, "--max-steps", "1", "--no-tensorboard") == 0
    sampling = SamplingParams(max_new_tokens=12)
    prompt = heldout_prompts(1)
    plain = specrt.load("builtin", progress=False).generate(prompt, sampling)
    drafted = specrt.load("builtin", tmp_path, progress=False).generate(prompt, sampling)
    assert drafted[0].token_ids == plain[0].token_ids


def test_curves(data: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(data, tmp_path, "--max-steps", "3") == 0
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    wanted = {f"train/{name}" for name in ("regression", "classification", "top1", "top2", "top3")}
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/top1")] == [1, 2, 3]


def test_goes_on_without_tensorboard(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(data, tmp_path, "--max-steps", "1") == 0
    assert "no curves: tensorboard is not installed" in capsys.readouterr().err


def test_needs_accelerate(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return None if name == "accelerate" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert run(data, tmp_path) == 2
    error = capsys.readouterr().err
    assert error == "specrt: error: training needs accelerate: pip install 'specrt[train]'\n"


def test_cached_features_are_shared_and_own_ones_removed(data: Path, tmp_path: Path) -> None:
    shared = tmp_path / "features"
    for arch in ("eagle2", "no-split"):
        more = ("--arch", arch, "--features", str(shared), "--max-steps", "1")
        assert run(data, tmp_path / arch, *more) == 0
    assert (shared / "index.json").exists()
    assert run(data, tmp_path / "own", "--max-steps", "5", "--epochs", "3") == 0
    assert not (tmp_path / "own" / "features").exists()


def test_another_run_and_a_second_one_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changes the result although no option of the recipe says so."""
    target, out = tmp_path / "target", tmp_path / "out"
    shutil.copytree(target_path(), target)
    given = ("--target", str(target), "--max-steps", "5", "--no-tensorboard")
    assert run(data, out, *given, "--max-minutes", "1e-9") == 0  # stops after a step

    def refused(message: str, *more: str) -> None:
        assert run(data, out, *given, *more) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    refused("run with held_out 0.2, not 0.4; --restart", "--held-out", "0.4")
    refused("run with max_length 2048, not 500; --restart", "--max-length", "500")
    refused("run with features cached, not online; --restart", "--features", "online")
    with hold_directory(out):
        refused(f"{out}: process {os.getpid()} on")
    weights = bytearray((target / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (target / "model.safetensors").write_bytes(weights)
    refused("run with target_weights ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--arch", "medusa"), "arch: expected one of fspad, eagle2, "),
        (("--lr", "0"), "lr: expected a positive number, got 0.0"),
        (("--threads", "0"), "threads: expected at least 1, got 0"),
        (("--batch", "3", "--accumulate", "2"), "batch_size: 3 sequences cannot be split"),
        (("--target", "/no/where"), "/no/where"),
        (("--data", "/no/file.jsonl"), "/no/file.jsonl: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(
    data: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(data, tmp_path, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("specrt: error: ") and message in error


def test_learns_to_propose_few_tokens_and_begins_with_another_drafter(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    small = ("--max-steps", "1", "--intermediate-size", "64", "--held-out", "0")
    assert run(data, first, *small, "--draft-vocab", "12", "--lr", "1e-2") == 0
    target = ModelConfig.from_directory(target_path())
    config, tensors = read_checkpoint(first, target)
    said = {token for row in map(json.loads, data.read_text().splitlines()) for token in _ids(row)}
    ids = set(tensors[TOKEN_IDS].tolist())
    assert config.draft_vocab_size == len(ids) == 12 and ids < said
    loss = json.loads((first / "training.json").read_text())["history"][0]["classification"]
    assert 0 < loss < 1.5 * math.log(12)  # of 12 tokens; of the whole vocabulary it is above 8

    hot = tmp_path / "hot.json"
    hot.write_text(json.dumps([7, 5, 3]))
    begin = ("--init", str(first), "--lr", "1e-12", "--hot-tokens", str(hot))
    assert run(data, second, *small, *begin) == 0
    _, after = read_checkpoint(second, target)
    assert after.pop(TOKEN_IDS).tolist() == [3, 5, 7]
    assert all(torch.equal(after[key], tensors[key]) for key in after)

    capsys.readouterr()
    assert run(data, other, "--init", str(first), "--max-steps", "1") == 2
    assert (
        f"{first}: expected fspad with MLPs of 704, got fspad with MLPs of 64"
        in capsys.readouterr().err
    )
    assert run(data, other, "--draft-vocab", "0") == 2
    assert "draft_vocab: expected 1..4096, got 0" in capsys.readouterr().err
    with (
        specrt.load("builtin", drafter=str(second)) as drafted,
        specrt.load("builtin", drafter="none") as plain,
    ):
        asked = ["Question: What is 3 + 4?\nAnswer:", SamplingParams(max_new_tokens=12)]
        assert drafted.generate(*asked).token_ids == plain.generate(*asked).token_ids


def _ids(row: dict[str, str]) -> list[int]:
    ends = ModelConfig.from_directory(target_path()).eos_ids
    return [*load_tokenizer(target_path()).encode(row["response"]), *ends]


def test_a_run_goes_on_without_the_drafter_it_began_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its state is saved; the drafter is the undisturbed run's."""
    first, whole, out = tmp_path / "first", tmp_path / "whole", tmp_path / "out"
    small = ("--intermediate-size", "64", "--held-out", "0", "--max-steps", "2")
    assert run(data, first, *small) == 0
    begin = (*small, "--init", str(first), "--seed", "3")
    assert run(data, whole, *begin) == 0
    gone = first.rename(tmp_path / "gone")

    capsys.readouterr()
    assert run(data, out, *begin) == 2  # nothing was saved
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"specrt: error: {first}: ")
    assert not out.exists()

    gone.rename(first)
    step, count = Trainer._step, [0]

    def stopped(trainer: Trainer, reporter: Reporter, stop: StopRequest) -> bool:
        count[0] += 1
        if count[0] == 2:
            stop.signal = signal.SIGTERM
        return step(trainer, reporter, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        assert run(data, out, *begin) == 128 + signal.SIGTERM
    first.rename(gone)
    capsys.readouterr()
    assert run(data, out, *begin, "--restart", "--max-steps", "1") == 2  # which forgets the state
    assert run(data, out, *begin, "--seed", "4") == 2
    assert "holds an unfinished run with seed 3, not 4" in capsys.readouterr().err
    assert run(data, out, *begin) == 0
    assert f"{first} is not there; the run in {out} goes on without it" in capsys.readouterr().err
    ours, theirs = (read_checkpoint(path)[1] for path in (out, whole))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
