"""The benchmark of ``linear`` on a made-up GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import linear_rows, linear_shapes, linear_variants
from bench.fake_gpu import FakeGpu
from specrt import ops
from specrt.ops.linear import LinearPlan


def arguments(save: Path | None = None, *, budget: float | None = None) -> Any:
    return argparse.Namespace(quick=True, budget=budget, save=save)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_the_shapes_are_those_of_three_models() -> None:
    by_model: dict[str, set[str]] = {}
    for shape in linear_shapes.SHAPES:
        by_model.setdefault(shape.model, set()).add(shape.matrix)
    assert [len(matrices) for matrices in by_model.values()] == [5, 4, 4]
    weights = [shape.num_outputs * shape.num_inputs for shape in linear_shapes.SHAPES]
    assert 2 * sum(weights) == pytest.approx(2548e6, rel=1e-3)  # bytes


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear_rows.run(arguments(tmp_path), FakeGpu())
    result = last_line(capsys)
    assert result == json.loads((tmp_path / "linear_rows.json").read_text())
    assert [row["matrix"] for row in result["rows"]] == ["qkv", "o", "gate_up", "down", "head"]
    assert all(row["equal"] and row["us"] == 1 for row in result["rows"])
    assert result["rows"][1]["GB/s"] == pytest.approx(2 * 4096**2 / 1e-6 / 1e9)
    assert result["failed"] == []
    assert result["environment"]["blas"]["library"] in ("Default", "Cublas")


def test_wrong_bits_are_kept_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their place, far from the library's, or other than those of the layout in use."""
    linear, faults = ops.linear, {4096 // 256: "place", 28672 // 256: "far", 128256 // 256: "plan"}

    def faulty(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        out = linear(x, weight, out=rest["out"])
        fault = faults.get(len(weight), "")
        if fault == "place":
            out[100:].add_(1)
        elif fault == "far":
            out.mul_(1.01)
        elif fault == "plan" and rest.get("plan") == LinearPlan(128, 4):
            out.mul_(1.0001)
        return out

    monkeypatch.setattr(linear_rows, "PLANS", _SOME_PLANS)
    monkeypatch.setattr(ops, "linear", faulty)
    with pytest.raises(SystemExit, match="4 cases failed; the first: Llama-3-8B o 4096x4096 bf"):
        linear_rows.run(arguments(), FakeGpu())
    result = last_line(capsys)
    assert [row["equal"] for row in result["rows"]] == [True, False, False, False, False]
    _, o, gate_up, _, head = (row["differ"] for row in result["rows"])
    assert o.startswith("in use: 128 at other places, 28 alone; 64 rows, 3 stages: ")
    assert gate_up == "0.01 of the largest off the library's"
    assert head == "128 rows, 4 stages: not the bits in use"
    assert len(result["failed"]) == 4 and "of 128 rows differ" in result["failed"][0]


_SOME_PLANS = {
    name: linear_variants.PLANS[name] for name in ("64 rows, 3 stages", "128 rows, 4 stages")
}


@pytest.mark.parametrize("fail", [lambda: FakeGpu(4), lambda: FakeGpu(5, stays_broken=True)])
def test_a_gpu_that_fails(fail: Callable[[], FakeGpu], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="an illegal memory access"):
        linear_rows.run(arguments(budget=1e-3), fail())
    assert last_line(capsys)["failed"][0].endswith("an illegal memory access was encountered")
