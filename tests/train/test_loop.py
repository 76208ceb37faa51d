"""The loop: what it learns, and that no interruption, split or bad number changes or spoils it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from specrt.draft.fspad.checkpoint import ARCHS, read_checkpoint
from specrt.train.loop.options import FspadOptions
from specrt.train.loop.processes import make_accelerator
from specrt.train.loop.trainer import TrainingError
from tests.train.support import OPTIONS, TARGET, curve, make_source, make_trainer, train

ROOT = Path(__file__).parents[2]
LEARNING = replace(OPTIONS, max_steps=150, epochs=100, lr=1e-2, schedule="cosine", log_steps=150)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out, TARGET)[1]


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def raising(at: int, number: int) -> Callable[[int], None]:
    """Raise signal ``number`` when the batch of number ``at`` is read."""

    def on_batch(batch: int) -> None:
        if batch == at:
            signal.raise_signal(number)

    return on_batch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, ...]]]:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    return out, curve(train(out))


# --- what it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_learns_what_a_pair_determines(tmp_path: Path, arch: str) -> None:
    summary = train(tmp_path, LEARNING, arch=arch).summary
    first, last = summary["history"][0], summary["history"][-1]
    assert first["top1"] < 0.2 and last["top1"] > 0.9
    assert last["regression"] < 0.5 * first["regression"]
    config, tensors = read_checkpoint(tmp_path, TARGET)
    assert config.arch == arch
    assert summary["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert config.extra["training"]["num_steps"] == 150


@pytest.mark.parametrize("shift", [1, -1])
def test_cannot_learn_from_features_of_another_position(tmp_path: Path, shift: int) -> None:
    """So that the test above would notice an alignment that is off by one."""
    source = make_source(200, shift=shift)  # too many to learn by heart
    summary = train(tmp_path, replace(LEARNING, epochs=3), source=source).summary
    assert summary["held_out"]["acceptance_rate"][0] < 0.3
    straight = train(tmp_path / "0", replace(LEARNING, epochs=3), source=make_source(200)).summary
    assert straight["held_out"]["acceptance_rate"][0] > 0.95


def test_uncounted_positions_teach_nothing(tmp_path: Path) -> None:
    """Features that only uncounted positions are to predict may be anything."""
    plain, changed = make_source(), make_source()
    for source in (plain, changed):
        for sample in source.samples:
            sample.loss_mask[:] = torch.arange(len(sample.loss_mask)) < 4  # t = 0 and 1
    for sample in changed.samples:
        sample.features[3:] = -7.0  # of t = 2 on
    train(tmp_path / "a", source=plain)
    train(tmp_path / "b", source=changed)
    assert same(tmp_path / "a", tmp_path / "b")


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_same_call_goes_on(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]], number: int
) -> None:
    source = make_source()
    source.on_batch = raising(3, number)
    stopped = train(tmp_path, source=source)
    assert (stopped.is_done, stopped.signal, stopped.summary) == (False, number, {})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000003"]
    assert not (tmp_path / "config.json").exists()
    assert curve(train(tmp_path)) == whole[1]
    assert same(tmp_path, whole[0])
    assert not (tmp_path / "state").exists()


def run_program(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [] if processes == 1 else ["torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher += ["--standalone", "-m"] if launcher else []
    command = [sys.executable, "-m", *launcher, "tests.train.support", *arguments]
    # Sums are taken in another order with other numbers of threads.
    threads = str(torch.get_num_threads()) if processes == 1 else "1"
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]]
) -> None:
    killed = run_program(str(tmp_path), "8", "5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000004"]
    outcome = train(tmp_path, replace(OPTIONS, save_steps=2))
    assert curve(outcome) == whole[1]
    assert same(tmp_path, whole[0])


def test_half_written_state_is_not_taken(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]]
) -> None:
    source = make_source()
    source.on_batch = raising(2, signal.SIGINT)
    train(tmp_path, source=source)
    (tmp_path / "state" / "step-00000007").mkdir()
    (tmp_path / "state" / "partial").mkdir()
    assert curve(train(tmp_path)) == whole[1]


def test_failing_save_keeps_the_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_options = replace(OPTIONS, save_steps=2)
    saved = []

    def full(accelerator: object, folder: str) -> None:
        if saved:
            raise OSError(28, "No space left on device", folder)
        saved.append(folder)
        real(accelerator, folder)

    real = Accelerator.save_state
    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, trainer_options)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000002"]


def test_drafter_that_cannot_be_written_costs_no_training(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]]
) -> None:
    (tmp_path / "model.safetensors").mkdir()  # in the way
    with pytest.raises(OSError):
        train(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    source = make_source()
    assert curve(train(tmp_path, source=source)) == whole[1]
    assert source.num_batches == 2  # the held-out ones


def test_time_limit_gives_a_drafter_and_may_be_lifted(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]]
) -> None:
    outcome = train(tmp_path, replace(OPTIONS, max_minutes=1e-9))
    assert (outcome.is_done, outcome.signal) == (False, None)
    assert outcome.summary["num_steps"] == 1 and not outcome.summary["is_complete"]
    assert read_checkpoint(tmp_path, TARGET)[0].extra["training"]["num_steps"] == 1
    assert curve(train(tmp_path)) == whole[1]


def test_refuses_to_mix_runs(tmp_path: Path) -> None:
    source = make_source()
    source.on_batch = raising(2, signal.SIGINT)
    train(tmp_path, source=source)
    with pytest.raises(ValueError, match=r"unfinished run with lr 0\.003, not 0\.5; --restart"):
        make_trainer(tmp_path, replace(OPTIONS, lr=0.5))
    with pytest.raises(ValueError, match="unfinished run with arch fspad, not eagle2"):
        make_trainer(tmp_path, arch="eagle2")
    assert train(tmp_path, replace(OPTIONS, lr=0.5), is_restart=True).is_done
    with pytest.raises(ValueError, match="already holds a model"):
        make_trainer(tmp_path)


# --- splits ---------------------------------------------------------------------------------------


def test_accumulation_changes_only_rounding(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]]
) -> None:
    parts = curve(train(tmp_path, replace(OPTIONS, accumulation_steps=2)))
    assert parts != whole[1]  # it did split
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole[1]), rtol=1e-4, atol=1e-5)


def test_processes_that_know_nothing_of_one_another_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU without ACCELERATE_USE_CPU a launcher's processes would all be the main one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE: the launcher started 2 processes"):
        make_accelerator(OPTIONS)


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_agree_with_one(
    tmp_path: Path, whole: tuple[Path, list[tuple[float, ...]]], is_killed: bool
) -> None:
    """Killed and taken up again on the way too, as one process may be."""
    if is_killed:
        killed = run_program(str(tmp_path), "8", "5", processes=2)
        assert killed.returncode != 0
        assert (tmp_path / "state" / "step-00000004").is_dir(), killed.stderr
    done = run_program(str(tmp_path), "8", processes=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["num_processes"] == 2
    names = [name for name in summary["history"][0] if name != "tokens_per_second"]
    both = [[entry[name] for name in names] for entry in summary["history"]]
    torch.testing.assert_close(torch.tensor(both), torch.tensor(whole[1]), rtol=1e-4, atol=1e-5)
    mine, theirs = weights(tmp_path), weights(whole[0])
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4)


def test_precisions_in_one_process(tmp_path: Path) -> None:
    runs = {
        precision: train(tmp_path / precision, replace(LEARNING, precision=precision)).summary
        for precision in ("float32", "bf16")
    }
    assert [runs[name]["mixed_precision"] for name in ("float32", "bf16")] == ["no", "bf16"]
    assert runs["bf16"]["history"][-1]["top1"] > 0.9
    assert runs["bf16"]["history"] != runs["float32"]["history"]


def test_batch_must_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 4 sequences cannot be split evenly over 1 "):
        make_trainer(tmp_path, replace(OPTIONS, accumulation_steps=3))


# --- bad numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_feature_stops_and_is_named(tmp_path: Path, value: float) -> None:
    source = make_source()
    source.samples[7].features[2, 5] = value
    options = replace(OPTIONS, save_steps=1, epochs=9)
    with pytest.raises(TrainingError, match=r"step \d: .*; sequences 7 \(features") as caught:
        train(tmp_path, options, source=source)
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    kept = tmp_path / "state" / f"step-{step - 1:08d}"
    assert str(kept) in str(caught.value) and (kept / "run.json").is_file()
    assert train(tmp_path, options).is_done  # with the features mended


def test_exploding_weights_are_not_saved(tmp_path: Path) -> None:
    options = replace(OPTIONS, lr=1e38, warmup_steps=0, save_steps=1, clip_value=0.0)
    with pytest.raises(TrainingError, match="not finite|norm (nan|inf)"):
        train(tmp_path, options)
    found = sorted((tmp_path / "state").glob("step-*"))
    assert all(step_is_finite(path) for path in found)


def step_is_finite(state: Path) -> bool:
    return all(bool(t.isfinite().all()) for t in load_file(state / "model.safetensors").values())


# --- options --------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    linear = FspadOptions(lr=1.0, warmup_steps=4)
    assert [linear.learning_rate(step, 12) for step in (0, 3, 4, 8, 12)] == [0.25, 1, 1, 0.5, 0]
    cosine = replace(linear, schedule="cosine")
    assert [round(cosine.learning_rate(step, 12), 3) for step in (4, 6, 8, 12)] == [
        1,
        0.854,
        0.5,
        0,
    ]
    default = FspadOptions(lr=1.0)
    assert default.learning_rate(0, 100) == 0.1 and default.learning_rate(0, 10**6) == 1 / 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", 0),
        ("max_steps", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("noise", -0.1),
        ("max_minutes", 0.0),
        ("clip_value", -1.0),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("save_dtype", "int8"),
    ],
)
def test_bad_option(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
        FspadOptions(**{name: value})  # type: ignore[arg-type]
