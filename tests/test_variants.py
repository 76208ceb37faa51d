"""Which variant wins, and the table that its win is written into."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import attention_variants, linear_variants, variant_table, variants
from bench.attention_variants import TABLED
from bench.fake_gpu import FakeGpu
from bench.gpu import Contender, Timings
from bench.gpu_report import run_bench
from bench.variant_table import AGAIN, IN_USE
from specrt import ops
from specrt.ops import AttentionPlan
from specrt.ops.linear import LinearPlan

FAST = attention_variants.name_of(AttentionPlan(8, 2))
FAST_LINEAR = linear_variants.name_of(LinearPlan(128, 4))


@pytest.mark.parametrize(
    ("again", "other", "winner"),
    [
        (100, 97, FAST),
        (100, 98.5, IN_USE),  # quicker, but by less than 2 %
        (103, 95, IN_USE),  # by 5 %, where the same thing differs by 3 %
        (103, 93, FAST),
        (95, 94, IN_USE),  # the better of the two measurements counts
        (100, 120, IN_USE),
    ],
)
def test_a_variant_wins_beyond_the_spread(again: float, other: float, winner: str) -> None:
    assert variant_table.judged({IN_USE: 100, AGAIN: again, FAST: other}).winner == winner


@pytest.mark.parametrize(
    ("kernel", "fast"), [(attention_variants, FAST), (linear_variants, FAST_LINEAR)]
)
def test_a_row_has_every_variant(kernel: ModuleType, fast: str) -> None:
    class Quick(FakeGpu):
        def measure(self, contenders: Mapping[str, Contender]) -> Timings:
            timings = super().measure(contenders)
            timings.graph[fast] = 0.5e-6
            return timings

    case = next(kernel.cases(True, FakeGpu()))
    row, failures = kernel.one_case(case, Quick(), FakeGpu().ceilings(), 1 << 20)
    assert row is not None and not failures
    assert (row["winner"], row["gain_%"], row["spread_%"]) == (fast, 50, 0)
    others = {f"{name}_us" for name in (*kernel.TABLED.choices, AGAIN)}
    assert {name for name in row if name.endswith("_us")} == others | {"limit_us", "H200_limit_us"}


def test_a_variant_with_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attention_variants.Bench.ours

    def wrong(self: Any, plan: AttentionPlan | None = None) -> Any:
        contender, output = ours(self, plan)
        if plan != AttentionPlan(8, 2):
            return contender, output
        return contender, lambda: torch.nextafter(output(), torch.tensor(2.0))

    monkeypatch.setattr(attention_variants.Bench, "ours", wrong)
    case = next(attention_variants.cases(True, FakeGpu()))
    with pytest.raises(AssertionError, match=f"{FAST}: other bits than the one in use"):
        attention_variants.one_case(case, FakeGpu(), FakeGpu().ceilings(), 1 << 20)


def test_a_layout_of_linear_with_other_bits_or_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, num_launches = ops.linear, 0

    def planned(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        nonlocal num_launches
        num_launches += 1
        if num_launches == 3:  # the one in use, and of its variants the second
            raise ValueError("plan: expected room for 6 stages")
        out = linear(x, weight, out=rest["out"])
        return out.add_(1) if num_launches == wrong_at else out

    monkeypatch.setattr(ops, "linear", planned)
    case, wrong_at = next(linear_variants.cases(True, FakeGpu())), 0
    row, failures = linear_variants.one_case(case, FakeGpu(), FakeGpu().ceilings(), 1 << 20)
    refused = list(linear_variants.CHOICES)[1]
    assert failures == {refused: "ValueError: plan: expected room for 6 stages"}
    assert row is not None and f"{refused}_us" not in row
    num_launches, wrong_at = 0, 4
    with pytest.raises(AssertionError, match="64 rows, 6 stages: other bits than the one in use"):
        linear_variants.one_case(case, FakeGpu(), FakeGpu().ceilings(), 1 << 20)


def result(*winners: tuple[int, int, str]) -> dict[str, Any]:
    """Of a GPU: nodes, prefix and winner of each row."""
    environment = {
        "gpu": {"capability": "9.0", "device": "NVIDIA H100 80GB HBM3"},
        "date": "2027-01-02T03:04:05+00:00",
    }
    rows = [
        {"model": "Llama-3-8B", "batch": 1, "prefix": prefix, "nodes": nodes, "winner": winner}
        for nodes, prefix, winner in winners
    ]
    return {"name": "variants_h100", "environment": environment, "rows": rows}


def result_of_linear(*winners: tuple[int, str, str]) -> dict[str, Any]:
    """Likewise: rows, shape and winner of each row."""
    rows = [{"rows": rows, "shape": shape, "winner": winner} for rows, shape, winner in winners]
    return result() | {"name": "linear_variants_h100", "rows": rows}


def test_lines_of_linear_are_for_one_matrix() -> None:
    rows = (64, "4096x14336", FAST_LINEAR), (8, "4096x14336", IN_USE), (8, "4096x4096", IN_USE)
    found = variant_table.table_lines(linear_variants.TABLED, result_of_linear(*rows), "")
    origin = "// NVIDIA H100 80GB HBM3, 2027-01-02\n"
    assert found == [
        f"    {{90, 4096, 14336, 8, {{0, 0}}}},  {origin}",
        f"    {{90, 4096, 14336, 64, {{128, 4}}}},  {origin}",
    ]
    said = {(4096, 14336, 9): (128, 4), (4096, 14336, 8): (0, 0), (4096, 4096, 64): (0, 0)}
    table = "".join(found)
    for key, choice in said.items():
        assert variant_table.in_use(linear_variants.TABLED, table, 90, key) == choice


def test_lines_go_from_narrow_to_wide() -> None:
    """A shape at which the one in use won keeps it below a wider one that was quicker."""
    rows = (60, 8192, FAST), (8, 8192, IN_USE), (60, 512, FAST)
    found = variant_table.table_lines(TABLED, result(*rows), "")
    origin = "// NVIDIA H100 80GB HBM3, 2027-01-02\n"
    assert found == [
        f"    {{90, 128, 32, 8, 8256, {{0, 0}}}},  {origin}",
        f"    {{90, 128, 240, 8, 576, {{8, 2}}}},  {origin}",
        f"    {{90, 128, 240, 8, 8256, {{8, 2}}}},  {origin}",
    ]
    assert variant_table.table_lines(TABLED, result((60, 8192, IN_USE)), "") == []
    again = result((60, 8192, IN_USE), (8, 8192, IN_USE), (60, 512, IN_USE))
    kept = variant_table.table_lines(TABLED, again, "".join(found))
    assert kept == found  # the one in use is the table's


def test_what_a_table_says_of_a_shape() -> None:
    table = """
// markers, as {90, 128, 64, 32, kAny, {4, 4}},  // card, date
    {80, 128, 240, 8, 8256, {8, 4}},  // a card
    {90, 128, 240, 8, 8256, {8, 2}},  // a card
    {90, 128, kAny, 8, kAny, {4, 1}},  // a card
"""
    said = {(128, 240, 8, 8256): (8, 2), (128, 241, 8, 64): (4, 1), (128, 240, 9, 64): (0, 0)}
    said |= {(64, 240, 8, 64): (0, 0), (128, 32, 8, 8257): (4, 1)}
    assert {key: variant_table.in_use(TABLED, table, 90, key) for key in said} == said


def test_a_line_replaces_only_that_of_its_own_shape() -> None:
    """A run that was cut takes nothing from the shapes that it did not measure."""
    old = [
        "    {90, 64, 8, 1, kAny, {4, 1}},  // old\n",
        "    {80, 64, 8, 1, 64, {4, 1}},  // old\n",
    ]
    table = variant_table.with_lines(TABLED.path.read_text(), old)
    new = ["    {90, 64, 8, 1, 64, {8, 1}},  // new\n", "    {80, 64, 8, 1, 64, {8, 1}},  // new\n"]
    both = variant_table.with_lines(table, new)
    assert re.findall(r"^    \{.*(old|new)$", both, re.MULTILINE) == ["new", "new", "old"]
    assert variant_table.in_use(TABLED, both, 90, (64, 8, 1, 64)) == (8, 1)
    assert variant_table.in_use(TABLED, both, 90, (64, 8, 1, 65)) == (4, 1)


def test_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TABLED.path.read_text()
    monkeypatch.setattr(variant_table, "_CSRC", tmp_path)
    for kernel in variants.KERNELS.values():
        kernel.TABLED.path.parent.mkdir()
        kernel.TABLED.path.write_text(text)
    table, all_tabled = TABLED.path, [kernel.TABLED for kernel in variants.KERNELS.values()]
    file = tmp_path / "variants_H100.json"
    file.write_text(json.dumps(result((60, 8192, FAST))))
    variant_table.record(file, all_tabled)
    assert "{90, 128, 240, 8, 8256, {8, 2}}" in table.read_text()
    assert capsys.readouterr().out == (
        "tree_attention/variants.h: 1 lines for compute capability 9\n"
    )
    file.write_text(json.dumps(result_of_linear((64, "4096x4096", FAST_LINEAR))))
    variant_table.record(file, all_tabled)
    assert "{90, 4096, 4096, 64, {128, 4}}" in linear_variants.TABLED.path.read_text()
    before = table.read_text()
    dry = result((60, 8192, FAST))
    dry["environment"]["gpu"]["device"] = FakeGpu().facts()["device"]
    unknown = json.dumps(result((60, 8192, "16 warps, 2 blocks/SM")))
    refused = {json.dumps(dry): "a dry run", "{": "no result of this", unknown: "no variant: '16"}
    for text, words in refused.items():
        file.write_text(text)
        with pytest.raises(SystemExit, match=words):
            variant_table.record(file, all_tabled)
    assert table.read_text() == before


def test_the_result_is_named_after_the_gpu() -> None:
    class H100(FakeGpu):
        def facts(self) -> dict[str, Any]:
            return super().facts() | {"device": "NVIDIA H100 80GB HBM3"}

    assert variants.result_name(TABLED, H100()) == "variants_h100_80gb_hbm3"
    assert variants.result_name(TABLED, FakeGpu()) == "variants_no_gpu"
    of_linear = variants.result_name(linear_variants.TABLED, H100())
    assert of_linear == "linear_variants_h100_80gb_hbm3"


def test_a_gpu_may_fail_at_any_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(attention_variants.cases(True, FakeGpu()))
    small = [replace(case, prefix=70, nodes=nodes) for nodes in (1, 2)]
    args = argparse.Namespace(budget=None, save=tmp_path)
    for point in range(1, 8):
        with pytest.raises(SystemExit, match="an illegal memory access"):
            run_bench("variants", small, attention_variants.one_case, args, FakeGpu(point))
