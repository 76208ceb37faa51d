"""The benchmark of whole rounds on a made-up GPU, and what it predicts without one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench import (
    bench_round,
    library_linear,
    limits,
    random_target,
    round_cuda,
    round_model,
    round_runs,
)
from bench.end_to_end_contenders import Job, Ours
from bench.end_to_end_cuda import Bench
from bench.fake_gpu import FakeGpu
from bench.planted import PlantedDrafter, Trace
from bench.round_cuda import Case
from bench.round_model import Launch
from bench.timed_steps import TimedSteps, TorchGraphs
from bench.transformers_graph import TransformersStep
from specrt import ops
from specrt.device import CPU, Device
from specrt.draft.base import BatchTables, Budget, EmptyDrafter, LaunchedDrafter, RoundPlan
from specrt.draft.length.costs import RoundCost
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.types import SequenceState
from tests.oracles.linear import slices_of

NAME = "Llama-3-8B"


@pytest.fixture(scope="module")
def target() -> Bench:
    prompt = [(7 * i * i + i) % 500 for i in range(20)]
    return Bench(FakeGpu(), NAME, Job(prompt, num_tokens=10, repeats=1))


def arguments(save: Path | None = None) -> Any:
    return argparse.Namespace(quick=True, budget=None, save=save, model=NAME, prefix=2048)


# --- measured ---------------------------------------------------------------------------------


def test_report(tmp_path: Path) -> None:
    round_cuda.run(arguments(tmp_path), FakeGpu())
    result = json.loads((tmp_path / "round_cuda.json").read_text())
    plain, replayed = result["rows"]
    assert result["failed"] == [] and result["summary"]["not_measured"] == {}
    assert (plain["contender"], plain["nodes"], plain["tau"]) == ("plain", 1, 1)
    assert replayed["contender"] == "replayed acceptance, drafting not counted"
    assert replayed["nodes"] == 60 and replayed["tau"] > 2 and plain["x plain"] is None
    for row in (plain, replayed):
        assert row["equal"] == "all tokens" and row["% of limit"] > 0
        assert row["host gap %"] == pytest.approx(100 * (1 - row["gpu ms"] / row["ms a round"]))
        ratio = row["ours gpu ms"] / row["cublas gpu ms"]
        assert row["price %"] == pytest.approx(100 * (ratio - 1))
        assert min(row[f"{stage} ms"] for stage in ("settle", "verify", "commit")) > 0
        assert row["ms a round"] == pytest.approx(row["ms a token"] * row["tau"])
    assert plain["transformers ms"] == pytest.approx(1e-3) and replayed["transformers ms"] is None


def test_cases_go_from_target_to_target() -> None:
    cases = list(round_cuda.cases(is_quick=False))
    assert [case.nodes for case in cases] == [1, 60, 8, 1, 60, 1, 60]
    assert cases[0] == Case("Llama-3-8B", 1) and cases[-1] == Case("Llama-3-70B/4", 60)


def test_no_case_is_begun_that_cannot_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(round_cuda, "one_case", lambda case, *rest: ({"nodes": case.nodes}, {}))
    clock = iter([0.0, 70.0])  # at the beginning, and before the second case
    monkeypatch.setattr("bench.gpu_report.time.monotonic", lambda: next(clock))
    budget = argparse.Namespace(**{**vars(arguments()), "budget": 100.0})
    round_cuda.run(budget, FakeGpu())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["nodes"] for row in result["rows"]] == [1]
    assert result["summary"]["not_measured"] == {"ours: over the budget": "all 1"}


def test_parts_that_fail_leave_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(round_cuda, "cases", lambda is_quick: [Case(NAME, 1)])
    monkeypatch.setattr(round_cuda, "price", broken)
    monkeypatch.setattr(round_cuda, "TransformersStep", broken)
    round_cuda.run(arguments(), FakeGpu())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (plain,) = result["rows"]
    assert plain["price %"] is None is plain["transformers ms"] and plain["verify ms"] > 0
    missing = result["summary"]["not_measured"]
    assert missing["cublas: RuntimeError: no room"] == "all 1"
    assert missing["transformers: RuntimeError: no room"] == "all 1"


def test_other_tokens_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = round_cuda.whole

    def other(case: Case, bench: Bench) -> Any:
        found = whole(case, bench)
        return replace(found, token_ids=[*found.token_ids[:-1], -1])

    monkeypatch.setattr(round_cuda, "cases", lambda is_quick: [Case(NAME, 1)])
    monkeypatch.setattr(round_cuda, "price", lambda case, bench: None)
    monkeypatch.setattr(round_cuda, "whole", other)
    with pytest.raises(SystemExit, match="1 cases failed; the first: Llama-3-8B 1 nodes: tokens"):
        round_cuda.run(arguments(), FakeGpu())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["equal"] for row in result["rows"]] == ["not in graphs"]


@pytest.mark.parametrize("point", [1, 4])
def test_a_gpu_that_fails(point: int) -> None:
    with pytest.raises(SystemExit, match="an illegal memory access"):
        round_cuda.run(arguments(), FakeGpu(point, stays_broken=True))


def test_transformers_step_by_step(target: Bench) -> None:
    """As from the beginning, whenever it is reset."""
    step = TransformersStep(target.twin, target.job.prompt, 10)
    assert step.decode(10) == target.expected.token_ids
    assert step.decode(4) == target.expected.token_ids[:4]
    assert len(step.launches) == 8


# --- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TimedSteps, TorchGraphs])
def test_steps_are_timed_from_the_second_time_on(kind: Callable[..., TimedSteps]) -> None:
    device, x, out = kind(CPU), torch.randn(2, 8), torch.empty(2, 8)

    def inner() -> None:
        ops.rms_norm(x, torch.ones(8), 1e-6, out=out)

    for _ in range(3):
        device.run("step", inner)
    assert len(device.take_seconds()) == 2 and device.take_seconds() == []


def test_a_step_within_a_step_is_counted_once() -> None:
    device = TimedSteps(CPU, is_eager=True)
    for _ in range(3):
        device.run("outer", lambda: device.run("inner", lambda: None) and None)
    assert len(device.take_seconds()) == 2


def test_marks_of_ops() -> None:
    rms_norm, x = ops.rms_norm, torch.randn(2, 8)
    with round_runs.marked(Device(), {"rms_norm": ops}) as marks:
        ops.rms_norm(x, torch.ones(8), 1e-6)
    ((start, end),) = marks["rms_norm"]
    assert end > start and ops.rms_norm is rms_norm


def test_stages_lie_between_marks() -> None:
    """In seconds, of two rounds, the second of which is longer in all."""
    marks = {
        "tree_settle": [(1.0, 2.0), (31.0, 33.0)],
        "tree_accept": [(6.0, 7.0), (43.0, 45.0)],
        "kv_commit": [(9.0, 10.0), (55.0, 57.0)],
    }
    found = round_runs.stages_ms(Device(), marks)
    assert list(found) == list(round_runs.STAGES)
    assert list(found.values()) == [21e3, 1.5e3, 7e3, 7.5e3, 1.5e3]
    assert round_runs.stages_ms(Device(), marks | {"kv_commit": []}) == {}


# --- replayed acceptance ----------------------------------------------------------------------


def _state(token_ids: list[int]) -> SequenceState:
    return SequenceState(list(token_ids), 2, 100, seed=0, temperature=0.0)


def test_a_launched_round_proposes_what_an_asked_one_does() -> None:
    """Ahead of the reports, for as much is accepted as was planted."""
    answer, trace = list(range(100, 140)), Trace(8, 3, [2, 0, 3])
    asked, ahead = (PlantedDrafter(answer, trace, 500, Device()) for _ in range(2))
    assert isinstance(ahead, LaunchedDrafter)
    state = _state([1, 2])
    budget, tables = Budget(64, RoundCost()), cast(BatchTables, None)  # nothing of it is read
    for drafter in (asked, ahead):
        drafter.start(state)
    plans = set()
    for accepted in islice(trace.accept_lengths * 2, 5):
        said = len(state.token_ids) - state.prompt_len
        expected = asked.propose([state], budget)
        late = _state(state.token_ids[: max(2, len(state.token_ids) - 1)])
        plan = ahead.plan([late], budget)
        plans.add(plan)
        found = ahead.launch_propose(plan, tables)
        for name in ("draft_tokens", "parents", "num_nodes"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        state.token_ids.extend(answer[said : said + accepted + 1])
    assert plans == {RoundPlan(8)}


def test_replayed_rounds_need_no_host(target: Bench, gpu: Device) -> None:
    """As much is accepted as was planted, with a round under way."""
    weights = random_target.random_weights(target.config, "cpu", torch.bfloat16)
    model = LlamaModel(target.config, place_weights(weights, gpu), gpu)
    job = Job(target.job.prompt, num_tokens=12, repeats=1)
    expected = Ours(model, EmptyDrafter(), None).checked(job)
    trace = Trace(8, 3, [2, 0, 3])
    drafter = PlantedDrafter(expected.token_ids, trace, target.config.vocab_size, gpu)
    drafter.propose = None  # type: ignore[assignment, method-assign]
    found = Ours(model, drafter, None).checked(job)
    assert found.token_ids == expected.token_ids
    assert found.num_rounds + 1 == 5 and found.num_timed == 12 - 3  # 3, 1, 4, 3, 1


def test_the_librarys_rounds_need_no_host(
    target: Bench, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are launched too, though it leaves no keys for acceptance."""

    def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x.float() @ weight.float().t())  # a CPU's has no float32 result

    if gpu.place.type == "cpu":
        monkeypatch.setattr(library_linear, "product", product)
    weights = random_target.random_weights(target.config, "cpu", torch.bfloat16)
    model = LlamaModel(target.config, place_weights(weights, gpu), gpu)
    gpu._is_eager = True  # its graphs hold kernels alone
    with library_linear.in_place_of_ours():
        found = Ours(model, EmptyDrafter(), None).checked(Job(target.job.prompt, 6, repeats=1))
    assert len(found.token_ids) == 6


# --- predicted --------------------------------------------------------------------------------


def test_bytes_of_a_predicted_pass_are_the_weights() -> None:
    """And a layer is seven launches."""
    model = limits.TARGETS[NAME]
    launches = list(round_model.pass_launches(model, 1, 0, 1))
    assert sum(launch.count for launch in launches) == 7 * 32 + 3
    num_bytes = sum(launch.count * launch.work.num_bytes for launch in launches)
    assert num_bytes == pytest.approx(32 * 436.2e6 + 1050.7e6, rel=2e-3)


@pytest.mark.parametrize(("rows", "expected"), [(128, 222), (256, 253), (512, 347), (2048, 911)])
def test_launches_of_a_piece(rows: int, expected: int) -> None:
    """K of qkv, o and down is in slices, so they are launched for every 256 rows."""
    row = round_model.prompt_row(NAME, limits.TARGETS[NAME], rows, rows)
    assert row["launches"] == expected
    for num_outputs, num_inputs in ((6144, 4096), (28672, 4096), (16320, 1024), (16384, 1024)):
        is_cut = slices_of(num_outputs, num_inputs)[0] > 1
        assert round_model.has_slices(num_outputs, num_inputs) == is_cut


def test_time_of_a_launch() -> None:
    card, work = limits.Ceilings(1e12, 1e14), limits.Work(10**6)
    streamed = Launch("verify", "qkv", work, 2, is_linear=True)
    apart, together = (streamed.seconds(card, overlaps=overlaps) for overlaps in (False, True))
    assert apart == pytest.approx(2 * (1.3e-6 + 2.5e-6 + 1e-6 / 0.92))
    assert together == pytest.approx(2 * (0.4e-6 + 0.3e-6 + 1e-6 / 0.92))
    norm = Launch("verify", "rms_norm", work, is_before_linear=True)
    saved = norm.seconds(card, overlaps=False) - norm.seconds(card, overlaps=True)
    assert saved == pytest.approx(0.9e-6 + 1.5e-6)
    multiplied = Launch("verify", "gate_up", limits.Work(1, 10**9), is_linear=True)
    took = multiplied.seconds(card, overlaps=True, product_rate=0.5)
    assert took == pytest.approx(0.7e-6 + 20e-6)


@pytest.mark.parametrize("asked", [["--predict"], []], ids=["asked for", "no GPU"])
def test_every_figure_of_a_prediction_says_so(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_round", *asked, "--save", str(tmp_path)])
    bench_round.main()
    result = json.loads((tmp_path / "round_predicted.json").read_text())
    told = {"model", "nodes", "stage", "launches", "GB"}
    assert all(name in told or name.endswith(", predicted") for name in result["rows"][0])
    stages = [row["stage"] for row in result["rows"] if row["model"] == NAME]
    of_a_round = ["settle", "verify", "accept", "commit", "round"]
    assert stages == [*of_a_round, *of_a_round, "prompt of 2048"]
    plain = [row["H100 ms, predicted"] for row in result["rows"][:5]]
    assert plain[4] == pytest.approx(sum(plain[:4])) and 5.3 < plain[4] < 6.5
    said = {name: words for name, words in result["summary"].items() if "goal" in words}
    assert len(said) == 4 and all(words.startswith("predicted") for words in said.values())


def test_a_round_on_the_cpu_is_another_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_round", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--device cuda or --predict"):
        bench_round.main()
