"""Rounds with our drafters on a made-up GPU: what the benchmark of them measures and says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import draft_rounds_cuda, random_target
from bench.draft_rounds_cuda import Case
from bench.end_to_end_contenders import Job, Ours
from bench.end_to_end_cuda import Bench
from bench.fake_gpu import FakeGpu
from bench.planted import PlantedRounds, Trace
from bench.whole_rounds import LayerKind, layer_round, random_layer
from specrt import ops
from specrt.device import Device
from specrt.draft.base import DraftParams, EmptyDrafter, LaunchedDrafter
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights

NAME = "Llama-3-8B"


def arguments(drafter: str, save: Path) -> Any:
    return argparse.Namespace(
        quick=True, budget=None, save=save, model=None, prefix=2048, drafter=drafter
    )


@pytest.mark.parametrize(("drafter", "nodes"), [("fspad", 60), ("eagle2", 60), ("eesd", 5)])
def test_report(drafter: str, nodes: int, tmp_path: Path) -> None:
    draft_rounds_cuda.run(arguments(drafter, tmp_path), FakeGpu())
    result = json.loads((tmp_path / f"round_cuda_{drafter}.json").read_text())
    row, *narrow = result["rows"]
    assert len(narrow) == (drafter != "eesd") and all(
        one["equal"] == row["equal"] for one in narrow
    )
    assert result["failed"] == [] and result["summary"]["not_measured"] == {}
    assert (row["model"], row["nodes"]) == (NAME, nodes)
    assert row["x plain round"] == pytest.approx(row["ms a round"] / row["plain ms a round"])
    assert row["host gap %"] == pytest.approx(100 * (1 - row["gpu ms"] / row["ms a round"]))
    assert min(row["draft ms"], row["verify ms"], row["accept ms"]) > 0
    is_planted = drafter != "eesd"  # whose trees nobody has recorded
    assert (row["planted tau"] is not None) == is_planted
    assert not is_planted or row["planted tau"] > 2 > row["tau by chance"]


def test_cases() -> None:
    """What the goals are stated for comes first."""
    found = list(draft_rounds_cuda.cases(NAME, "fspad", 128_256, is_quick=False))
    assert [str(case) for case in found] == [
        f"{NAME} fspad, head of 32,000, folded",
        f"{NAME} fspad, head of 32,000, folded, fp8",
        f"{NAME} fspad, whole head",
    ]
    first, _ = draft_rounds_cuda.cases(NAME, "eagle2", 128_256, is_quick=True)
    assert first == Case(NAME, "eagle2", LayerKind("eagle2", 32_000, False))


def test_planted_rounds_draft_and_are_launches_alone(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much is accepted as was planted, and the drafter's launches are among them."""
    bench = Bench(FakeGpu(), NAME, Job([(7 * i * i + i) % 500 for i in range(20)], 9, repeats=1))
    weights = random_target.random_weights(bench.config, "cpu", torch.bfloat16)
    model = LlamaModel(bench.config, place_weights(weights, gpu), gpu)
    answer = Ours(model, EmptyDrafter(), None).checked(bench.job).token_ids
    inner = layer_round(model, random_layer(model, LayerKind("eagle2", 100))).drafter
    assert isinstance(inner, FspadDrafter)
    trace, shape = Trace(8, 3, [2, 0, 3]), DraftParams(depth=3, top_k=2, total_tokens=8)
    drafter = PlantedRounds(inner, answer, trace, bench.config.vocab_size, gpu)
    assert isinstance(drafter, LaunchedDrafter)
    drafter.propose = None  # type: ignore[assignment, method-assign]
    expanded, expand = [], ops.tree_expand

    def counted(*args: Any, **options: Any) -> None:
        expanded.append(1)
        expand(*args, **options)

    monkeypatch.setattr(ops, "tree_expand", counted)
    found = Ours(model, drafter, None, shape).checked(bench.job)
    assert found.token_ids == answer and found.num_rounds + 1 == 4  # 3, 1, 4, 1 tokens
    # Twice before a graph is there: as it runs for the first time, and as it is captured.
    assert len(expanded) == 2 * shape.depth
