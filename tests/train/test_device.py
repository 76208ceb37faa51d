"""Training on a GPU: nobody waits for it, its runs go on elsewhere, and what it lacks is named."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from specrt.device import Device
from specrt.draft.eesd.checkpoint import NUM_MODES
from specrt.train import run as running
from specrt.train.batches import BatchPlan
from specrt.train.device import TrainDevice, _Fused, parse_place
from specrt.train.features import source as sources
from specrt.train.features.cache import cache_features
from specrt.train.features.frozen import PackedTarget, load_frozen_target
from specrt.train.features.source import HeldFeatures
from specrt.train.head import TargetHead
from specrt.train.loop.options import DataOptions, FspadOptions
from specrt.train.loop.processes import make_accelerator
from specrt.train.loop.progress import Progress, speed
from specrt.train.loop.report import Reporter
from specrt.train.loop.trainer import Trainer, TrainingError
from specrt.train.losses import FrozenHead, draft_losses
from specrt.types import CheckpointError
from tests.simulated_gpu import SimulatedGpu
from tests.train import exit_support, support
from tests.train.feature_support import error, make_dataset
from tests.train.support import HIDDEN, OPTIONS, VOCAB, curve, make_source, train

CUDA = TrainDevice(Device(torch.device("cuda", 0)))
"""Tells what it would do; nothing is asked of it."""


def options_on(gpu: Device, options: Any) -> Any:
    return replace(options, device=gpu.place.type, max_steps=4)


@contextmanager
def quiet() -> Iterator[Reporter]:
    with Path(os.devnull).open("w") as sink, Reporter(True, None, Console(file=sink)) as reporter:
        yield reporter


def run_on(gpu: Any, make: Callable[[], Trainer], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a trainer on a GPU; only what comes before the steps, between and after may wait."""
    for name in ("_save", "_finish"):
        monkeypatch.setattr(Trainer, name, moving(gpu, getattr(Trainer, name)))
    with gpu.moving():
        trainer = make()
    if isinstance(gpu, SimulatedGpu):
        for tensor in chain(trainer._model.parameters(), trainer._model.buffers()):
            gpu.hold(tensor)
        # torch takes norms to one device by its name, which is the host's here.
        norms = moving(gpu, Accelerator.clip_grad_norm_)
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: gpu.hold(norms(*args)))
    with quiet() as reporter:
        return trainer.run(reporter)


def moving(gpu: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with gpu.moving():
            return method(*args, **options)

    return call


MAKERS: dict[str, Any] = {
    "fspad": (support.make_trainer, OPTIONS),
    "eesd": (exit_support.make_exit_trainer, exit_support.OPTIONS),
}


# --- no step waits --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_no_step_waits_and_all_is_logged(
    gpu: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = MAKERS[kind]
    options = options_on(gpu, options)
    with gpu.moving(), quiet() as reporter:
        wanted = make(tmp_path / "cpu", replace(options, device="cpu")).run(reporter)
    got = run_on(gpu, lambda: make(tmp_path / "gpu", options, device=TrainDevice(gpu)), monkeypatch)
    assert gpu.num_reads == 4  # a step
    if gpu.place.type == "cpu":  # the same sums
        assert curve(got) == curve(wanted)
    else:  # the same sums in another order; what is drawn for later steps is a GPU's
        losses, cpu = ([entry["loss"] for entry in out.summary["history"]] for out in (got, wanted))
        assert losses[0] == pytest.approx(cpu[0], rel=1e-4)
        assert losses == pytest.approx(cpu, rel=0.05)


def test_a_bad_step_is_named_when_it_is_read(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after it is under way by then, and its state would be due; the one from before
    stays."""
    source = make_source()
    plan = BatchPlan(range(len(source) - 2), source.lengths, OPTIONS.batch_size, OPTIONS.seed)
    bad = plan.step(3)[1][0]
    source.samples[bad].features[2, 5] = float("nan")
    options = replace(options_on(gpu, OPTIONS), max_steps=8, save_steps=2)
    monkeypatch.setattr(Trainer, "_not_finite", moving(gpu, Trainer._not_finite))
    with pytest.raises(TrainingError, match=rf"step 4: .*; sequences {bad} \(features") as caught:
        run_on(
            gpu,
            lambda: support.make_trainer(tmp_path, options, source, device=TrainDevice(gpu)),
            monkeypatch,
        )
    assert str(caught.value).endswith(str(tmp_path / "state/step-00000002"))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000002"]


def test_a_gpus_state_is_taken_up_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are marked as a GPU's, of which there is none."""
    whole = curve(train(tmp_path / "whole"))
    source = make_source()
    source.on_batch = lambda number: signal.raise_signal(signal.SIGINT) if number == 3 else None
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        train(tmp_path / "out", source=source)
    (state,) = (tmp_path / "out/state").iterdir()
    assert b"cuda:0" in (state / "optimizer.bin").read_bytes()
    assert curve(train(tmp_path / "out", replace(OPTIONS, device="cpu"))) == whole


# --- which device ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("tpu", 1, "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ("meta", 1, "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got 'meta'"),
        ("cuda", 0, "device: expected 'cpu', got 'cuda': torch sees no CUDA GPU"),
        ("cuda:1", 1, "device: only cuda:0 is there, got 'cuda:1'"),
        ("cuda:4", 2, "device: cuda:0 .. cuda:1 are there, got 'cuda:4'"),
    ],
)
def test_a_device_that_is_not_there(
    name: str, count: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError) as caught:
        parse_place(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("variable", "value", "name", "message"),
    [
        ("ACCELERATE_USE_CPU", "true", "cuda", "expected 'cpu' where ACCELERATE_USE_CPU is set"),
        ("WORLD_SIZE", "2", "cuda:0", "expected 'cuda' for several processes, got 'cuda:0'"),
    ],
)
def test_a_device_that_the_launcher_does_not_mean(
    variable: str, value: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(replace(OPTIONS, device=name))


def test_the_cpu_can_be_asked_for_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    accelerator = make_accelerator(FspadOptions(device="cpu", precision="float32"))
    assert accelerator.device.type == "cpu"


def test_memory_that_is_not_enough_names_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(running, "_train", full)
    job = running.TrainJob(tmp_path, "t", (), tmp_path / "out")
    message = (
        r"out of memory on cpu: lower --batch \(4\) or --max-length \(2048\), raise --accumulate "
        r"\(1\).*--features DIRECTORY\); torch says: CUDA out of memory. Tried to allocate 2 GiB\."
    )
    with pytest.raises(TrainingError, match=message):
        running.train(job, FspadOptions(), SimpleNamespace())


# --- features held there --------------------------------------------------------------------------


def test_held_features_are_those_of_a_cache(target: Path, tmp_path: Path) -> None:
    dataset = make_dataset()
    held = HeldFeatures(dataset, target, TrainDevice(), taps=(1,))
    cached = cache_features(tmp_path, dataset, target, taps=(1,))
    assert (len(held), held.lengths, held.hidden_size) == (8, cached.lengths, 64)
    for one, other in zip(held.batch([3, 0]), cached.batch([3, 0]), strict=True):
        assert all(map(torch.equal, one, other))
        assert one.features.dtype == other.features.dtype
    assert HeldFeatures.num_bytes(dataset, 64, 1) == sum(x.nbytes for x in held._rows)


def test_bad_features_are_named_before_training(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        config = SimpleNamespace(hidden_size=2)

        def features(self, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.full((len(one), 2), float("inf")) for one in sequences]

    monkeypatch.setattr(sources, "load_frozen_target", lambda *_: Broken())
    with pytest.raises(CheckpointError, match="NaN or infinite features of example 0"):
        HeldFeatures(make_dataset(), target, TrainDevice())


@pytest.mark.parametrize(
    ("features", "room", "kind"),
    [
        (None, 10**9, "HeldFeatures"),
        (None, 0, "CachedFeatures"),
        ("memory", 0, "HeldFeatures"),
        ("there", 10**9, "CachedFeatures"),
    ],
)
def test_features_are_held_where_they_fit(
    target: Path,
    tmp_path: Path,
    features: str | None,
    room: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TrainDevice, "feature_room", room)
    chosen = features and (str(tmp_path / features) if features == "there" else features)
    data = DataOptions(features=chosen)
    job = running.TrainJob(target, "t", (), tmp_path, data)
    accelerator = make_accelerator(OPTIONS)
    found = running._features(job, (), make_dataset(), accelerator, is_online=False)
    assert type(found).__name__ == kind


# --- how fast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fspad", "eagle2", "eesd"])
def test_products_are_counted_as_they_are_run(tmp_path: Path, kind: str) -> None:
    make, options = MAKERS["eesd" if kind == "eesd" else "fspad"]
    trainer = make(tmp_path, options, **({} if kind == "eesd" else {"arch": kind}))
    task = trainer._task
    batch: Any = task.collate(trainer._data.source, [0, 5, 9], 0)
    with FlopCounterMode(display=False) as counter:
        task.losses(trainer._model, batch, has_hits=False).total.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    # Of two exits, forward and by their weights.
    calibration = 2 * 2 * 2 * NUM_MODES * HIDDEN * batch.is_counted.numel() if kind == "eesd" else 0
    assert task.num_flop(batch) == products - calibration


def test_speed_is_of_all_processes_and_the_peak_of_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = Progress(num_tokens=300, num_flop=4 * 10**12)
    assert speed(work, 2.0, None) == {"tokens_per_second": 150.0}
    assert speed(work, 2.0, 8e12)["peak_share"] == 0.25
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("another", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda place, name=name: name)
        assert CUDA.product_peak == peak
    assert TrainDevice().product_peak is None


# --- one kernel out of many -----------------------------------------------------------------------


def losses_of(head: FrozenHead) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randn(9, HIDDEN, generator=generator, requires_grad=True) for _ in range(3)]
    losses = draft_losses(rows[0], rows[1], rows[2].detach(), head)
    losses.classification.backward()
    assert rows[0].grad is not None
    return losses.classification.detach(), rows[0].grad


def test_what_cannot_be_compiled_is_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    weight = torch.randn(VOCAB, HIDDEN)
    heads = FrozenHead(TargetHead(weight), CUDA), FrozenHead(TargetHead(weight))
    for head in heads:
        head.num_rows = 4
    with caplog.at_level(logging.WARNING, "specrt"):
        assert all(map(torch.equal, *map(losses_of, heads)))
    assert [record.getMessage() for record in caplog.records] == [
        "_divergence is not compiled, which is slower: no compiler"
    ]


def test_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    with pytest.raises(torch.OutOfMemoryError):
        losses_of(FrozenHead(TargetHead(torch.randn(VOCAB, HIDDEN)), CUDA))


@pytest.mark.slow
def test_the_losses_compile_whole_and_once() -> None:
    """To one graph for any number of rows, to the same bits."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    weight = torch.randn(VOCAB, HIDDEN)
    heads = FrozenHead(TargetHead(weight)), FrozenHead(TargetHead(weight))
    heads[1].divergence = _Fused(heads[0].divergence, backend)
    for num_rows in (4, 5, 7, 3):  # and rests of 1, 4, 2 and none
        for head in heads:
            head.num_rows = num_rows
        assert all(map(torch.equal, *map(losses_of, heads)))
    assert len(graphs) == 2  # a single row is another


def test_attention_of_all_sequences_together(target: Path) -> None:
    """As on a GPU."""
    dataset = make_dataset()
    sequences = [dataset[index].token_ids for index in range(len(dataset))]
    alone, together = (load_frozen_target(target, device="cpu") for _ in range(2))
    assert isinstance(together, PackedTarget)
    together._device.is_gpu = True
    together._device.there = lambda host: host  # type: ignore[method-assign]
    for got, wanted in zip(together.features(sequences), alone.features(sequences), strict=True):
        assert error(got, wanted) < 1e-5
