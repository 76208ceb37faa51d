"""The benchmark of ``linear`` against cuBLAS, on a made-up GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_linear, goals, library_linear, linear_cuda
from bench.fake_gpu import FakeGpu
from bench.gpu import Contender, Timings
from bench.linear_shapes import SHAPES, layer_shapes
from specrt import ops


def arguments(save: Path | None = None) -> Any:
    return argparse.Namespace(quick=True, budget=None, save=save)


class Slower(FakeGpu):
    """Ours takes 2 microseconds, others 1."""

    def measure(self, contenders: dict[str, Contender]) -> Timings:  # type: ignore[override]
        timings = super().measure(contenders)
        timings.graph["ours"] = 2e-6
        return timings


def test_cases_begin_with_the_goals() -> None:
    every = [str(case) for case in linear_cuda.cases(is_quick=False)]
    assert len(set(every)) == len(every) == 2 * 3 + 13 * 7 + 11 * 2
    assert every[0] == "Llama-3-8B layer rows 60" and every[6] == "Llama-3-8B qkv rows 60"
    assert {str(case) for case in linear_cuda.cases(is_quick=True)} < set(every)


def test_a_layer_has_four_matrices() -> None:
    for model, size in (("Llama-3-8B", 436.2), ("Vicuna-7B", 404.8), ("Llama-3-70B/4", 427.8)):
        layer = layer_shapes(model)
        assert [shape.matrix for shape in layer] == ["qkv", "o", "gate_up", "down"]
        assert sum(shape.num_weights for shape in layer) * 2e-6 == pytest.approx(size, abs=0.1)
    assert set(layer_shapes("Llama-3-8B")) < set(SHAPES)


def test_report(tmp_path: Path) -> None:
    linear_cuda.run(arguments(tmp_path), Slower())
    result = json.loads((tmp_path / "linear_cuda.json").read_text())
    layer, qkv, *_, down = result["rows"]
    assert result["failed"] == [] and result["summary"]["not_measured"] == {}
    assert (layer["matrix"], layer["rows"], layer["x one row"]) == ("layer", 60, 2)
    assert qkv["cublas/ours"] == qkv["cublas 128/ours"] == 0.5 and qkv["x one row"] is None
    small = 24 * 64 * 4  # of float32, in 2 us, of 1 TB/s
    assert qkv["% of copy"] == pytest.approx(100 * small / 2e-6 / 1e12)
    assert qkv["MB"] == pytest.approx(50.3, abs=0.1)
    assert (down["rows"], down["cublas 128/ours"]) == (512, None)


def test_another_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args, **rest: linear(*args, **rest).mul_(1.1))
    with pytest.raises(SystemExit, match="ours: differs from cublas by 0.1 of the largest"):
        linear_cuda.run(arguments(), FakeGpu())


def test_the_command_goes_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_linear", "--device", "cuda", "--dry", "--quick"])
    monkeypatch.setattr(linear_cuda, "run", lambda args, device: print(args.quick, device.place))
    bench_linear.main()
    assert capsys.readouterr().out.startswith("True Place(device='cpu'")


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_the_librarys_product(is_gated: bool, has_bias: bool, has_residual: bool) -> None:
    x, weight = torch.randn(3, 40), torch.randn(32, 40)
    bias = torch.randn(32) if has_bias else None
    residual = torch.randn(3, 32) if has_residual and not is_gated else None
    found = library_linear.library_linear(x, weight, bias, residual, is_gated=is_gated)
    both = ops.linear(x, weight, bias, residual)
    expected = ops.activate(both) if is_gated else both
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_librarys_in_place_of_ours() -> None:
    ours = ops.linear
    with library_linear.in_place_of_ours():
        assert ops.linear is library_linear.library_linear
    assert ops.linear is ours


# --- goals ------------------------------------------------------------------------------------


def lines(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> list[str]:
    environment = {"date": "2020-01-02"}
    result = {"environment": environment, "summary": {"bytes_per_s": 3.0e12}, "rows": rows}
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return goals.lines(tmp_path, "2020-01-01")


def test_of_goals_for_all_matrices_the_worst_is_told(tmp_path: Path) -> None:
    def row(matrix: str, megabytes: float, share: float, ratio: float) -> dict[str, Any]:
        row = {"model": "Vicuna-7B", "matrix": matrix, "rows": 60, "MB": megabytes}
        return row | {"% of copy": share, "cublas/ours": ratio, "x one row": None}

    rows = [row("qkv", 101, 90, 1.1), row("down", 90, 87, 1.2), row("o", 34, 70, 0.9)]
    rows.append(row("layer", 400, 50, 0.5) | {"x one row": 1.04})
    assert lines(tmp_path, "linear_cuda", rows) == [
        "60: % of copy 87, goal >= 88: missed (worst of 2: Vicuna-7B down)",
        "60: cublas/ours 0.9, goal >= 1: missed (worst of 3: Vicuna-7B o)",
        "Vicuna-7B layer 60: x one row 1.04, goal <= 1.05: reached",
    ]


def test_goals_of_rounds(tmp_path: Path) -> None:
    row = {"model": "Llama-3-8B", "contender": "plain", "ms a token": 5.7, "host gap %": 2.5}
    rows = [row | {"price %": 3.0}, row | {"model": "Vicuna-7B", "price %": 6.0}]
    assert lines(tmp_path, "round_cuda", rows) == [
        "Llama-3-8B plain: ms a token 5.7, goal <= 5.73 (4 at an H200's 4.3 TB/s): reached",
        "Llama-3-8B plain: host gap % 2.5, goal <= 2: missed",
        "all: price % 6, goal <= 5: missed (worst of 2: Vicuna-7B)",
    ]
