"""The benchmark of ``linear`` on a made-up GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import linear_rows
from bench.fake_gpu import FakeGpu
from specrt import ops


def arguments(save: Path | None = None, *, budget: float | None = None) -> Any:
    return argparse.Namespace(quick=True, budget=budget, save=save)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_the_shapes_are_those_of_three_models() -> None:
    by_model: dict[str, set[str]] = {}
    for shape in linear_rows.SHAPES:
        by_model.setdefault(shape.model, set()).add(shape.matrix)
    assert [len(matrices) for matrices in by_model.values()] == [5, 4, 4]
    weights = [shape.num_outputs * shape.num_inputs for shape in linear_rows.SHAPES]
    assert 2 * sum(weights) == pytest.approx(2548e6, rel=1e-3)  # bytes


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear_rows.run(arguments(tmp_path), FakeGpu())
    result = last_line(capsys)
    assert result == json.loads((tmp_path / "linear_rows.json").read_text())
    assert [row["matrix"] for row in result["rows"]] == ["qkv", "o", "gate_up", "down", "head"]
    assert all(row["equal"] and row["us"] == 1 for row in result["rows"])
    assert result["rows"][1]["product GB/s"] == pytest.approx(2 * 4096**2 / 1e-6 / 1e9)
    assert result["failed"] == []


def test_wrong_bits_are_kept_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ops.linear

    def by_place(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        out = linear(x, weight, **rest)
        if len(weight) == 4096 // 256:
            out[100:].add_(1)
        return out

    monkeypatch.setattr(ops, "linear", by_place)
    with pytest.raises(SystemExit, match="2 cases failed; the first: Llama-3-8B o 4096x4096 bf"):
        linear_rows.run(arguments(), FakeGpu())
    result = last_line(capsys)
    assert [row["equal"] for row in result["rows"]] == [True, False, True, False, True]
    assert result["rows"][1]["differ"] == "128 at other places, 28 alone"
    assert len(result["failed"]) == 2 and "of 128 rows differ" in result["failed"][0]


@pytest.mark.parametrize("fail", [lambda: FakeGpu(4), lambda: FakeGpu(5, stays_broken=True)])
def test_a_gpu_that_fails(fail: Callable[[], FakeGpu], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="an illegal memory access"):
        linear_rows.run(arguments(budget=1e-3), fail())
    assert last_line(capsys)["failed"][0].endswith("an illegal memory access was encountered")
