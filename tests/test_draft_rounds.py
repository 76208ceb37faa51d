"""What is predicted of rounds with our drafters: their launches and bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_round, draft_launches, draft_rounds, limits
from bench.draft_launches import DEPTH, Draft
from bench.random_target import Spec, hf_config, random_weights
from bench.whole_rounds import FSPAD, whole_round
from specrt.config import ModelConfig
from specrt.models.model import LlamaModel

NAME = "Llama-3-8B"
LLAMA = limits.TARGETS[NAME]


@pytest.mark.parametrize(
    ("has_sampling", "is_folded", "expected"),
    [(True, True, 14), (True, False, 15), (False, True, 10), (False, False, 10)],
)
def test_launches_of_a_level(has_sampling: bool, is_folded: bool, expected: int) -> None:
    """Of level 0 one more: keys and values of the pairs before the last."""
    draft = Draft(has_sampling, is_folded, 32_000)
    levels = [list(draft_launches.level_launches(LLAMA, draft, n, 2048)) for n in range(DEPTH)]
    counts = [sum(launch.count for launch in level) for level in levels]
    assert counts == [expected + 1, *[expected] * (DEPTH - 1)]
    assert all(level[-1].kernel == "tree_expand" for level in levels)
    # Its weights, and what ten rows bring: less than a hundredth.
    streamed = sum(one.work.num_bytes for one in levels[1] if one.is_linear)
    assert streamed == pytest.approx(draft_launches.weight_bytes(LLAMA, draft), rel=0.01)


def test_bytes_of_a_step_are_the_drafters() -> None:
    """As it is made, of a small target's shape, in 32 bits."""
    model = limits.Model(256, 208, 2, 4, 2, 64, 500)
    config = ModelConfig.from_dict(hf_config(model, Spec(500, 10000.0, 256)))
    made = whole_round(FSPAD, LlamaModel(config, random_weights(config, "cpu", torch.float32)))
    expected = draft_launches.weight_bytes(model, Draft(True, True, 500, weight_size=4))
    assert made.draft_bytes == DEPTH * expected


def test_eesd_verifies_from_where_it_drafted() -> None:
    rows, said = draft_rounds.prediction("eesd", {NAME: LLAMA}, 2048, 3.0)
    launches = {row["stage"]: row["launches"] for row in rows}
    # Embedding, four layers of seven, the exit's keys and values, the decision; its other half,
    # norm, head, calibration, ranking.
    assert launches["a token"] == 1 + 4 * 7 + 3 + 1 + 5 + 4
    assert launches["the last token"] == 1 + 4 * 7 + 3 + 1
    assert launches["target"] == 28 * 7 + 2 + 6  # settle, three of acceptance, history, commit
    assert launches["draft"] == 4 * 42 + 33 + 1 and said == {}


@pytest.mark.parametrize("drafter", draft_rounds.DRAFTERS)
def test_every_figure_of_a_prediction_says_so(drafter: str) -> None:
    rows, said = draft_rounds.prediction(drafter, {NAME: LLAMA}, 2048, 3.0)
    told = {"model", "drafter", "nodes", "stage", "launches", "GB"}
    assert all(name in told or name.endswith(", predicted") for name in rows[0])
    for row in rows:
        is_round, ratio = row["stage"] == "round", row["H100 x plain round, predicted"]
        assert (ratio is not None) == is_round and (not is_round or 1.1 < ratio < 2)
    assert len(said) == (20 if drafter == "fspad" else 0)
    assert all(words.startswith("predicted") and "goal" in words for words in said.values())


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--predict", "--drafter", "eesd", "--save", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_round", *options])
    bench_round.main()
    result = json.loads((tmp_path / "round_predicted_eesd.json").read_text())
    assert {row["model"] for row in result["rows"]} == {NAME}


def test_the_stages_of_a_tree_are_its_round() -> None:
    rows, _ = draft_rounds.prediction("fspad", {NAME: LLAMA}, 2048, 3.0)
    ms = {row["stage"]: row["H200 ms, predicted"] for row in rows[:8]}
    levels = ms["level 0"] + (DEPTH - 1) * ms["a level below"]
    assert ms["draft"] == pytest.approx(levels + ms["rerank"] + ms["observe"], rel=0.01)
    assert ms["round"] == pytest.approx(ms["draft"] + ms["target"])
