"""Prompts' passes on a made-up GPU: the report, and what other bits would do to it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_prefill
from bench.bench_prefill import Target
from bench.fake_gpu import FakeGpu


def arguments(save: Path | None = None) -> Any:
    return argparse.Namespace(quick=True, budget=None, save=save, model="Llama-3-8B", prompt=2048)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_prefill.run(arguments(tmp_path), FakeGpu())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "prefill_cuda.json").read_text())
    ours, theirs = result["rows"]
    assert (ours["rows"], ours["equal"]) == (512, "all bits")
    assert (theirs["contender"], theirs["rows"], theirs["equal"]) == ("transformers", 300, None)
    assert ours["x transformers"] == pytest.approx(ours["ms"] / theirs["ms"])
    for row in (ours, theirs):
        assert row["tokens/s"] == pytest.approx(300 / (row["ms"] / 1e3))


def test_other_bits_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Target.run

    def last_bit(self: Target, rows: int) -> torch.Tensor:
        kept = run(self, rows).clone()
        if rows == 512:
            kept.view(torch.int32)[-1, -1, -1, -1, -1] ^= 1
        return kept

    monkeypatch.setattr(Target, "run", last_bit)
    with pytest.raises(SystemExit, match="1 cases failed; the first: 512: other keys and values"):
        bench_prefill.run(arguments(), FakeGpu())
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["equal"] for row in rows] == ["other bits", None]
