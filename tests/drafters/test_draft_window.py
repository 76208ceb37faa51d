"""A drafter that sees a window of the text: what is outside moves nothing, and texts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.builtin import target_path
from specrt.draft.base import DraftParams
from specrt.draft.kind import DraftWindow
from specrt.loading import load
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import VOCAB, Rig, budget, make_drafter
from tests.engine.support import make_engine, make_model, prompts, texts

IDS = [(3 * i) % VOCAB for i in range(90)]
needs_target = pytest.mark.skipif(
    not (target_path() / "config.json").is_file(), reason="the bundled target is not here"
)
SHAPE = {"depth": 4, "top_k": 3, "total_tokens": 12}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint)


@pytest.fixture(scope="module")
def path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window") / "fspad"
    make_draft_checkpoint(checkpoint, folder, "fspad")
    return folder


def scores(
    model: LlamaModel, path: Path, window: DraftWindow | None, broken: slice = slice(0, 0)
) -> torch.Tensor:
    """Of a tree behind 80 tokens, some of whose keys and values were lost."""
    rig = Rig(model, make_drafter(model, path, window=window), IDS)
    state = rig.state(80)
    rig.begin(state)
    drafter, size = rig.drafter, rig.drafter.cache.page_size
    cached = drafter._drafts[state].cached
    for slot in range(cached.length)[broken]:
        drafter.cache.kv[:, :, cached.pages[slot // size], slot % size] = float("nan")
    drafter.propose([state], budget(**SHAPE))
    (buffers,) = drafter._rounds.values()
    return buffers.choice(SHAPE["total_tokens"]).node_scores


def test_what_is_outside_of_a_window_is_not_read(model: LlamaModel, path: Path) -> None:
    """79 pairs are committed when levels run; the first step sees one less."""
    window = DraftWindow(20, 3)
    expected = scores(model, path, window)
    assert torch.equal(scores(model, path, window, slice(3, 78 - 20)), expected)
    for inside in (slice(2, 3), slice(79 - 20, 60)):
        assert not torch.equal(scores(model, path, window, inside), expected)


def test_a_window_that_holds_the_text_changes_nothing(model: LlamaModel, path: Path) -> None:
    assert torch.equal(scores(model, path, DraftWindow(79)), scores(model, path, None))


def test_no_text_changes(model: LlamaModel, path: Path) -> None:
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, temperature=1.0, seed=3)
    expected = texts(make_engine(model).generate(prompts(4, VOCAB), params))
    drafter = make_drafter(model, path, window=DraftWindow(5, 1))
    results = make_engine(model, drafter).generate(prompts(4, VOCAB), params, DraftParams(**SHAPE))
    assert texts(results) == expected
    assert sum(result.stats.num_draft_tokens for result in results) > 0


WRONG = [(0, 0), (-1, 2), (4, -1), (True, 0), (2.0, 0), ("64", 0), (4, 1.5), (4, "1")]


@pytest.mark.parametrize(("size", "num_sinks"), WRONG)
def test_a_window_that_cannot_be_is_refused(size: Any, num_sinks: Any) -> None:
    with pytest.raises(ValueError, match=r"^(draft_window|num_sinks): expected"):
        DraftWindow(size, num_sinks)


@pytest.mark.parametrize("window", ["16", 2.5, True])
def test_a_window_that_is_no_number_is_refused(checkpoint: Path, path: Path, window: Any) -> None:
    """And not met in each round, which would go undrafted."""
    with pytest.raises(ValueError, match=r"^draft_window: expected a number of tokens from 1, got"):
        load(checkpoint, path, draft_window=window, progress=False)


@needs_target
def test_a_number_is_a_window_without_sinks() -> None:
    engine = load("builtin", "eagle2", draft_window=7, progress=False)
    assert engine.drafter.layer.window == DraftWindow(7)  # type: ignore[attr-defined]
