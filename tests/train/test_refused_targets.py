"""Targets that drafters are not trained for are refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrt.train.loop.options import DataOptions, EesdOptions, FspadOptions
from specrt.train.run import TrainJob, train_eesd, train_fspad
from tests.families import build
from tests.family_cases import Case


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case("x", "gemma", {}), "norm_offset"),
        (Case("x", "gpt2", {}), "is_gated"),
        (Case("x", "mistral", {"sliding_window": 8}), "a window of 8 below max_length 64"),
    ],
)
def test_another_form_is_refused(case: Case, said: str, tmp_path: Path) -> None:
    build(case, tmp_path / "target")
    data = DataOptions(max_length=64)
    job = TrainJob(tmp_path / "target", "x", (tmp_path / "none.jsonl",), tmp_path / "out", data)
    with pytest.raises(ValueError, match=f"^target: .*Llama.*{case.model_type}.*{said}"):
        train_eesd(job, EesdOptions(), [1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "said"), [("cohere", "logit_scale"), ("phi", "has_head_bias")])
def test_another_law_is_refused(family: str, said: str, tmp_path: Path) -> None:
    build(Case("x", family, {}), tmp_path / "target")
    data = DataOptions(max_length=64)
    job = TrainJob(tmp_path / "target", "x", (tmp_path / "none.jsonl",), tmp_path / "out", data)
    with pytest.raises(ValueError, match=f"^target: .*alone.*{family}.*{said}"):
        train_fspad(job, FspadOptions())
    assert not (tmp_path / "out").exists()
