"""The GPU benchmarks as far as they go without one: limits, inputs, contenders, reports."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from bench import (
    bench_small_kernels,
    bench_tree_attention,
    gpu,
    limits,
    one_of_each,
    small_kernels_cuda,
    tree_attention_cuda,
)
from bench.attention_inputs import ancestor_bits, attend, tree_mask
from bench.clocks import parse_smi
from bench.fake_gpu import FakeGpu
from specrt import ops
from tests.fake_cuda import FakeEvent

# --- limits and tables ------------------------------------------------------------------------


def test_bytes_and_flop_of_tree_attention() -> None:
    """Llama-3-8B, 60 nodes, prefix 2048: 8.6 MB of keys and values, 2.1 GFLOP."""
    llama = limits.MODELS["Llama-3-8B"]
    work = limits.tree_attention(llama, 1, 2048, 60, 300)
    assert work.num_bytes == 2 * 8 * 128 * 2 * 2108 + 2 * 60 * 32 * 128 * 2
    assert work.flop == 4 * 32 * 128 * (60 * 2048 + 300)
    assert limits.H200.bound_by(work) == "compute"
    assert limits.H200.seconds(work) == pytest.approx(2.6e-6, rel=0.05)
    vicuna = limits.tree_attention(limits.MODELS["Vicuna-7B"], 2, 2048, 60, 300)
    assert limits.H200.bound_by(vicuna) == "memory"
    assert limits.H200.seconds(vicuna) == pytest.approx(2 * 8.3e-6, rel=0.05)


def test_bytes_of_the_small_kernels() -> None:
    llama = limits.MODELS["Llama-3-8B"]
    assert limits.rms_norm(llama, 60).num_bytes == 4 * 60 * 4096 * 2 + 4096 * 4
    assert limits.activate(llama, 60).num_bytes == 3 * 60 * 14336 * 2
    assert limits.rope_append(llama, 60).num_bytes == 60 * 128 * ((2 * 32 + 4 * 8) * 2 + 4)
    assert limits.kv_commit(llama, 5).num_bytes == 2 * 5 * 32 * 2 * 8 * 128 * 2
    assert limits.tree_settle(llama, 65).num_bytes == 65 * (5 * 4 + 2 * 8)
    assert limits.history_append(llama, 65).num_bytes == 65 * 6 * 4
    assert limits.embed(llama, 60).num_bytes == 60 * (2 * 4096 * 2 + 4)
    assert limits.prompt_lookup(llama, 60).num_bytes == (8192 + 2 * 60) * 4
    plain = limits.feature_sample(llama, 10)
    assert plain.num_bytes == 2 * (2 * 4096**2 + 3 * 4096 * 14336) + 10 * 3 * 4096 * 2
    assert limits.H200.bound_by(plain) == "memory"
    folded = limits.feature_sample_folded(llama, 10)
    assert plain.num_bytes - folded.num_bytes == 2 * (4096**2 + (4096 - 10) * 14336)
    assert limits.draft_control(llama, 8).num_bytes == 8 * (26 * 8 + 18 * 4)
    assert limits.draft_control_update(llama, 8).num_bytes == 8 * (2 * 26 * 8 + 13 * 4)
    assert limits.tree_expand(llama, 10).num_bytes == 10 * 128256 * 4 + 100 * 12
    assert limits.tree_rerank(llama, 60).num_bytes == 610 * 4 + 2 * 60 * 12
    assert limits.recycle_propose(llama, 64).num_bytes == 64 * 16
    assert limits.recycle_learn(llama, 60).num_bytes == 60 * (128256 * 4 + 36)
    assert limits.tree_accept(llama, 60).num_bytes == 60 * (128256 * 4 + 16)


def test_figures_of_a_row() -> None:
    ceilings = limits.Ceilings(1e12, 1e14)
    row = limits.figures(limits.Work(10**6, 10**9), 20e-6, ceilings)
    assert row["bound by"] == "compute"
    assert (row["limit_us"], row["% of limit"]) == (pytest.approx(10), pytest.approx(50))
    assert (row["GB/s"], row["TFLOP/s"]) == (pytest.approx(50), pytest.approx(50))
    assert limits.figures(limits.Work(10**6), 2e-6, ceilings)["TFLOP/s"] is None


def test_input_sets() -> None:
    assert limits.input_sets(10, 30, 100, 10_000) == 20
    assert limits.input_sets(1, 3, 100, 10_000) == 64
    assert limits.input_sets(1000, 1000, 100, 10_000) == 1
    assert limits.input_sets(10, 30, 100, 95) == 3
    assert limits.input_sets(1000, 1000, 100, 900) == 0


def test_cases_begin_with_the_goals() -> None:
    quick = [str(case) for case in tree_attention_cuda.cases(is_quick=True)]
    assert quick[0] == "Llama-3-8B batch 1 prefix 2048 nodes 60" and len(quick) == 4
    every = [str(case) for case in tree_attention_cuda.cases(is_quick=False)]
    assert len(set(every)) == len(every) == 2 * 3 * 4 * 4
    assert set(quick[:2]) == set(every[:2])
    small = [str(case) for case in small_kernels_cuda.cases(is_quick=False)]
    assert len(set(small)) == len(small) == 2 * (6 * 5 + 10 * 4 + 3 * 3 + 2 * 2)
    assert small[0] == "rms_norm Llama-3-8B rows 60"


def test_passes_of_a_graph() -> None:
    assert gpu.passes_for(1, 1.0) == 1
    assert gpu.passes_for(64, 1e-6) == 6
    assert gpu.passes_for(10, 20e-6) == 10


def test_reasons_are_counted() -> None:
    missing = {"flashinfer: not installed": ["a", "b"], "ours: no memory": ["c"]}
    assert gpu.counted(missing, 2) == {
        "flashinfer: not installed": "all 2",
        "ours: no memory": "c",
    }
    assert gpu.reason(RuntimeError("no\nway")) == "RuntimeError: no"
    assert gpu.reason(RuntimeError()) == "RuntimeError: "


def test_parsing_nvidia_smi() -> None:
    found = parse_smi("580.159.04, 1980, 2619, 1980, 71.31, [N/A]\n")
    assert found == {
        "driver": "580.159.04",
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "max_sm_mhz": 1980.0,
        "power_w": 71.31,
        "temperature_c": "[N/A]",
    }


# --- inputs and contenders --------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 60, 64, 128])
def test_ancestor_bits(nodes: int) -> None:
    mask = tree_mask(nodes)
    bits = ancestor_bits(mask)
    assert bits.shape == (nodes, -(-nodes // 64))
    for i in range(nodes):
        line, node = {i}, i
        while node:
            node = (node - 1) // 2
            line.add(node)
        value = sum((int(word) % 2**64) << (64 * w) for w, word in enumerate(bits[i]))
        assert {j for j in range(nodes) if mask[i, j]} == line
        assert {j for j in range(nodes) if value >> j & 1} == line


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("batch", "prefix", "nodes"), [(1, 130, 1), (2, 70, 65)])
def test_baselines_compute_tree_attention(
    monkeypatch: pytest.MonkeyPatch, batch: int, prefix: int, nodes: int
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for model in (one_of_each.MODELS[0], one_of_each.MODELS[2]):
        case = tree_attention_cuda.Case("small", model, batch, prefix, nodes)
        bench = tree_attention_cuda.Bench(case, 1, FakeGpu.place)
        indices, tensors = bench.indices, bench.sets[0]
        ours = attend(tensors, indices, bench.scale)
        for baseline in (bench.sdpa, bench.flex):
            torch.testing.assert_close(baseline()[1](), ours, atol=1e-5, rtol=1e-5)


def arguments(save: Path, *, is_quick: bool = True, budget: float | None = None) -> Any:
    return argparse.Namespace(quick=is_quick, budget=budget, save=save)


def test_report_of_the_small_kernels(tmp_path: Path) -> None:
    small_kernels_cuda.run(arguments(tmp_path, budget=100.0), FakeGpu())
    result = json.loads((tmp_path / "small_kernels_cuda.json").read_text())
    assert [(row["op"], row["rows"]) for row in result["rows"][:2]] == [
        ("rms_norm", 60),
        ("activate", 60),
    ]
    assert all(row["torch/ours"] == 1 and row["us"] == 1 for row in result["rows"])
    assert result["environment"]["gpu"]["device"].startswith("no GPU")
    assert result["summary"]["not_measured"] == {}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_report_of_tree_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    tree_attention_cuda.run(arguments(tmp_path, is_quick=False, budget=1e-3), FakeGpu())
    result = json.loads((tmp_path / "tree_attention_cuda.json").read_text())
    (row,) = result["rows"]
    assert row["sdpa/ours"] == row["flex/ours"] == 1 and row["flashinfer/ours"] is None
    missing = result["summary"]["not_measured"]
    flashinfer = [reason for reason in missing if reason.startswith("flashinfer: ")]
    assert [missing[reason] for reason in flashinfer] == ["all 1"]  # whatever is installed here
    assert len(missing["ours: over the budget"].split("; ")) == 2 * 3 * 4 * 4 - 1


def test_a_case_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong result ends with exit code 1, but first the rest is measured and saved."""
    embed = ops.embed
    monkeypatch.setattr(ops, "embed", lambda *given: (embed(*given), given[2].add_(1)))
    with pytest.raises(SystemExit, match="2 cases failed; the first: embed Llama-3-8B rows 60"):
        small_kernels_cuda.run(arguments(tmp_path), FakeGpu())
    result = json.loads((tmp_path / "small_kernels_cuda.json").read_text())
    assert {row["op"] for row in result["rows"]} == set(small_kernels_cuda.KERNELS) - {"embed"}
    assert any("embed Llama-3-8B rows 8192" in one for one in _cases(result))


@pytest.mark.parametrize("stays_broken", [False, True])
def test_a_gpu_may_fail_at_any_point(
    tmp_path: Path, stays_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is saved, and the end is one line that says why. (Of two kernels, as
    points times cases are run.)"""
    some = dict(list(small_kernels_cuda.KERNELS.items())[:2])
    monkeypatch.setattr(small_kernels_cuda, "KERNELS", some)
    whole = FakeGpu()
    small_kernels_cuda.run(arguments(tmp_path / "whole"), whole)
    num_cases = len(json.loads((tmp_path / "whole/small_kernels_cuda.json").read_text())["rows"])
    for point in range(1, whole.num_asked + 1):
        folder = tmp_path / str(point)
        with pytest.raises(SystemExit) as left:
            small_kernels_cuda.run(arguments(folder), FakeGpu(point, stays_broken=stays_broken))
        assert "an illegal memory access" in str(left.value.code)
        assert "\n" not in str(left.value.code)
        saved = folder / "small_kernels_cuda.json"
        num_rows = len(json.loads(saved.read_text())["rows"]) if saved.exists() else 0
        before = max(0, point - 4) // 2  # facts, ceilings, clocks; memory and measuring a case
        assert num_rows == (before if stays_broken or point < 4 else num_cases - 1)


@pytest.mark.parametrize("module", [bench_small_kernels, bench_tree_attention])
def test_made_up_figures_are_not_kept(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cuda", "--dry", "--save"])
    with pytest.raises(SystemExit, match="none is kept in bench/results"):
        module.main()


def test_a_process_that_is_stopped_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_case, calls = small_kernels_cuda.one_case, []

    def stopped(*args: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return one_case(*args)

    monkeypatch.setattr(small_kernels_cuda, "one_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        small_kernels_cuda.run(arguments(tmp_path), FakeGpu())
    assert [path.name for path in tmp_path.iterdir()] == ["small_kernels_cuda.json"]
    result = json.loads((tmp_path / "small_kernels_cuda.json").read_text())
    assert [row["op"] for row in result["rows"]] == ["rms_norm", "activate"]


def _cases(result: dict[str, Any]) -> list[str]:
    return list(result["summary"]["not_measured"].values())


class FakeGraph:
    """Takes 8 ms."""

    def replay(self) -> None:
        FakeEvent.now += 8.0


def test_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay of 8 ms is shared by the launches in it; a baseline that fails is named."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(gpu, "passes_for", lambda num_launches, seconds: 2)
    calls: list[str] = []

    def broken() -> None:
        raise RuntimeError("no kernel image")

    ours = gpu.Contender([lambda: calls.append("a"), lambda: calls.append("b")], calls.clear)
    found = gpu.measure({"ours": ours, "torch": gpu.Contender([broken])})
    assert found.graph == {"ours": pytest.approx(2e-3)}
    assert calls == ["a", "b"] and list(found.eager) == ["ours"]
    assert found.failures == {"torch": "RuntimeError: no kernel image"}
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu.measure({"ours": gpu.Contender([broken])})


def test_contenders_that_differ_are_found() -> None:
    outputs = {"ours": lambda: torch.zeros(2), "sdpa": lambda: torch.ones(2)}
    with pytest.raises(AssertionError, match="sdpa: "):
        tree_attention_cuda.checked(outputs, {})


def test_one_that_differs_from_all_others_is_left_out() -> None:
    outputs = {name: lambda: torch.zeros(2) for name in ("ours", "sdpa")}
    failures: dict[str, str] = {}
    tree_attention_cuda.checked(outputs | {"flashinfer": lambda: torch.ones(2)}, failures)
    assert failures == {"flashinfer": "differs from ours, and sdpa does not"}
    with pytest.raises(AssertionError, match="ours: "):  # NaN is equal to nothing
        tree_attention_cuda.checked({"ours": lambda: torch.tensor([float("nan")])}, failures)


def test_contenders_that_cannot_run_are_noted() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel image")

    failures: dict[str, str] = {}
    tree_attention_cuda.checked({"ours": lambda: torch.zeros(2), "flex": broken}, failures)
    assert failures == {"flex": "RuntimeError: no kernel image"}


@pytest.mark.parametrize("module", [bench_small_kernels, bench_tree_attention])
def test_cuda_benchmarks_say_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cuda"])
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU"):
        module.main()
