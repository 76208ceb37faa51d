"""One-layer drafters' rounds as launches alone, on a GPU, simulated or real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams, LaunchedDrafter, RoundPlan, StageTimes
from specrt.draft.fspad.checkpoint import read_checkpoint, reduce_vocabulary, write_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.on_device import DeviceFspadDrafter, Step
from specrt.draft.fspad.pairs import MAX_PAIRS
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import RoundCost
from specrt.draft.length.envelope import GPU_ENVELOPES
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.models.step import FINAL_TAP
from specrt.sampling import SamplingParams
from specrt.sampling.rows import sampling_row
from specrt.types import Proposal, RoundReport, SequenceState
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter
from tests.drafters.launched_rig import Rounds
from tests.engine.support import make_engine
from tests.interrupts import interrupted

VOCAB = 41  # so few that random drafters are right now and then
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[(7 * i * i + i) % VOCAB for i in range(n)] for n in (9, 70, 2, 20)]
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(temperature=1.3, top_k=7, seed=6),
    SamplingParams(),
]
SHAPE = DraftParams(depth=3, top_k=3, total_tokens=10)
ROOTS = DraftParams(depth=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    target = folder / "target"
    make_checkpoint("llama", target, **SIZES)
    for arch in ("fspad", "eagle2"):
        make_draft_checkpoint(target, folder / arch, arch)
    config, tensors = read_checkpoint(folder / "fspad", ModelConfig.from_directory(target))
    few = reduce_vocabulary(config, tensors, torch.arange(VOCAB), 24)
    write_checkpoint(folder / "reduced", *few)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def model(checkpoints: Mapping[str, Path], gpu: Device) -> LlamaModel:
    path = checkpoints["target"]
    config = ModelConfig.from_directory(path)
    weights = place_weights(load_weights(path, config, torch.bfloat16), gpu)
    return LlamaModel(config, weights, gpu)


def rounds(
    model: LlamaModel,
    path: Path,
    batch: int = 2,
    draft: DraftParams | None = SHAPE,
    **options: Any,
) -> Rounds:
    drafter = make_drafter(model, path, **options)
    assert isinstance(drafter, DeviceFspadDrafter) and isinstance(drafter, LaunchedDrafter)
    made = Rounds(model, drafter, PROMPTS[:batch], PARAMS[:batch], draft)
    for state, params in zip(made.states, PARAMS, strict=False):
        state.sampling_row = sampling_row(params, state.prompt_len)
    return made


def same_trees(one: Rounds, other: Rounds) -> None:
    assert len(one.trees) == len(other.trees)
    for ours, theirs in zip(one.trees, other.trees, strict=True):
        for name in ("draft_tokens", "parents", "num_nodes"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert [s.token_ids for s in one.states] == [s.token_ids for s in other.states]


def test_batches_of_several_engines_keep_to_their_own(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    """Each has a round under way while the other's is planned, or asks the host."""
    shared = make_drafter(model, checkpoints["fspad"])

    shape = DraftParams(depth=2, top_k=2, total_tokens=5)

    def batch(row: int, drafter: FspadDrafter) -> Rounds:
        return Rounds(model, drafter, [PROMPTS[row]], [PARAMS[row]], shape)

    one, other = batch(0, shared), batch(3, shared)
    for step in (one.launch, other.launch, one.launch, other.catch_up):
        step()
    other.told_at_once(1)
    one.launched(1)
    alone, next_door = (batch(row, make_drafter(model, checkpoints["fspad"])) for row in (0, 3))
    alone.launched(3)
    next_door.launched(1)
    next_door.told_at_once(1)
    same_trees(one, alone)
    same_trees(other, next_door)


FEW = [("fspad", 2, {"fold": False}), ("eagle2", 1, {"fold": True})]
MORE = [
    (name, batch, {"fold": is_folded})
    for name in ("fspad", "eagle2", "reduced")
    for batch in (1, 2, 4)
    for is_folded in (False, True)
]


@pytest.mark.parametrize(
    ("name", "batch", "options"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_trees_are_those_of_rounds_that_are_told_at_once(
    checkpoints: Mapping[str, Path],
    model: LlamaModel,
    name: str,
    batch: int,
    options: dict[str, Any],
) -> None:
    """Whoever launched the round before: pairs go from rows to sequences and back."""
    launched, at_once = (rounds(model, checkpoints[name], batch, **options) for _ in range(2))
    launched.launched(2)
    launched.told_at_once(1)
    launched.launched(1)
    at_once.told_at_once(4)
    same_trees(launched, at_once)


def test_rounds_without_drafts_keep_their_features(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    """As many as there are places, and more; then a tree, which knows of them all."""
    launched, at_once = (rounds(model, checkpoints["fspad"], 1, ROOTS) for _ in range(2))
    launched.launched(MAX_PAIRS + 1)
    at_once.told_at_once(MAX_PAIRS + 1)
    for made, run in ((launched, launched.launched), (at_once, at_once.told_at_once)):
        made.shape(SHAPE)
        run(1)
    same_trees(launched, at_once)


def test_a_controller_closes_trees_on_the_device(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    """One that wants two levels of three: what the third leaves is in no tree."""
    control = ControlOptions("fixed", max_draft=3, draft_len=2)
    launched = rounds(model, checkpoints["fspad"], 2, None, control=control)
    two_levels = DraftParams(depth=2, top_k=4, total_tokens=8)
    fixed = rounds(model, checkpoints["fspad"], 2, two_levels)
    launched.launched(2)
    fixed.launched(2)
    same_trees(launched, fixed)


def test_a_controllers_sequences_have_depths_of_their_own(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    """Drawn by their own seeds and lengths."""
    control = ControlOptions("beta-ts", max_draft=4)
    made = rounds(model, checkpoints["fspad"], 2, None, control=control)
    made.launched(3)
    found = [depths(tree) for tree in made.trees]
    assert any(one != other for one, other in found) and len({*map(tuple, found)}) > 1


def depths(tree: Proposal) -> list[int]:
    """Of the deepest node of each."""
    found = []
    for parents, count in zip(tree.parents.tolist(), tree.num_nodes.tolist(), strict=True):
        depth = [0]
        for parent in parents[1:count]:
            depth.append(1 + depth[parent])
        found.append(max(depth))
    return found


def test_a_graph_drafts_what_its_launches_do(
    checkpoints: Mapping[str, Path], model: LlamaModel, gpu: Device
) -> None:
    outcomes = []
    params = replace(PARAMS[1], max_new_tokens=7, ignore_eos=True)
    for is_eager in (False, True):
        gpu._is_eager = is_eager
        drafter = make_drafter(model, checkpoints["fspad"])
        engine = make_engine(model, drafter, prefill_chunk=1024)
        result = engine.generate(PROMPTS[0], params, draft=SHAPE)
        stats = result.stats
        outcomes.append((result.token_ids, stats.accept_lengths, stats.proposed_by_depth))
    assert outcomes[0] == outcomes[1]


# --- what the host does ---------------------------------------------------------------------------


class Planning:
    """Plans for one sequence, whose rounds nobody runs."""

    def __init__(self, model: LlamaModel, path: Path, **options: Any) -> None:
        drafter = make_drafter(model, path, **options)
        assert isinstance(drafter, DeviceFspadDrafter)
        self.drafter, self._device = drafter, model.device
        self._hidden = drafter.layer.padded.hidden_size
        self.state = SequenceState([1] * 20, 20, 220, 0, 0.0)
        drafter.start(self.state)

    def prefill(self) -> None:
        dtype, count = self.drafter.layer.activation_dtype, len(self.state.token_ids) - 1
        features = self._device.zeros(1, count, self._hidden, dtype=dtype)
        self.drafter.prefill(self.state, 0, {FINAL_TAP: features})

    def plan(self, draft: DraftParams | None = SHAPE) -> RoundPlan | None:
        return self.drafter.plan([self.state], Budget(64, RoundCost(), draft))

    def told(self, plan: RoundPlan, taken: int = 1, num_nodes: int = 1, draft: float = 0.0) -> None:
        nodes, length, count = np.array([[num_nodes], [taken - 1], [taken]], dtype=np.int32)
        path = np.arange(plan.num_nodes, dtype=np.int32)[None]
        report = RoundReport(nodes, length, count, path)
        self.drafter.told([self.state], plan, report, StageTimes(draft, 1.0, 0.0))
        self.state.token_ids += [2] * taken


def test_when_the_host_is_needed(checkpoints: Mapping[str, Path], model: LlamaModel) -> None:
    """Where there are no features, or no pages for two rounds."""
    planning = Planning(model, checkpoints["fspad"])
    planning.drafter.cache.fix(2)
    assert planning.plan() is None
    planning.prefill()
    first = planning.plan()
    assert first is not None and first == planning.plan() and first.num_nodes == 10
    fits = 128 - (1 + 3) - 2 * 3  # under way; two levels of three nodes
    planning.state.token_ids += [2] * (fits - 20)
    assert planning.plan() is not None
    planning.state.token_ids.append(2)
    assert planning.plan() is None


def test_pairs_wait_until_there_is_a_tree_or_no_place(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    planning, counts = Planning(model, checkpoints["fspad"]), []
    planning.prefill()
    for _ in range(MAX_PAIRS + 3):
        plan = planning.plan(ROOTS)
        assert plan is not None and plan.num_nodes == 1
        counts.append(step_of(plan).num_pairs)
        planning.told(plan)
    # One waits at first, and a round might be under way.
    assert counts == [0] * (MAX_PAIRS - 2) + [MAX_PAIRS] + [0] * 4
    cached = planning.drafter._drafts[planning.state].cached
    assert cached.length == 19 + MAX_PAIRS - 2
    tree = planning.plan()
    assert tree is not None and step_of(tree).num_pairs == 8  # those that wait
    planning.told(tree)
    assert step_of(planning.plan()).num_pairs == 4  # a path's


def step_of(plan: RoundPlan | None) -> Step:
    assert plan is not None and isinstance(plan.shape, Step)
    return plan.shape


def test_sizes_are_learned_of_reports_and_times(
    checkpoints: Mapping[str, Path], model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    planning, seen = Planning(model, checkpoints["fspad"]), list[Any]()
    planning.prefill()
    measured = planning.drafter._measured
    monkeypatch.setattr(measured, "observe_draft", lambda *times: seen.append(times))
    observed = measured.observe_outcome

    def observe(scores: np.ndarray, is_accepted: np.ndarray, num_levels: int) -> None:
        seen.append(is_accepted.sum(axis=1).tolist())
        observed(scores, is_accepted, num_levels)

    monkeypatch.setattr(measured, "observe_outcome", observe)
    plan = planning.plan(None)
    assert plan is not None and plan.num_nodes in GPU_ENVELOPES
    levels = step_of(plan).num_levels
    assert levels > 1
    planning.told(plan, taken=3, draft=4.0)  # the first of its kind is not timed
    planning.told(plan, taken=0, draft=4.0)  # it has ended
    for _ in range(2):  # once for its kind, and once as it is captured anew
        again = planning.plan(None)
        assert again is not None
        planning.told(again, taken=0, draft=9.0)
        model.device.forget()
    level = 4.0 / levels
    assert seen == [[2.0], (level, level * (levels - 1), levels - 1)]
    for _ in range(30):
        planning.told(plan, taken=1)
    paused = planning.plan(None)
    assert paused is not None and paused.num_nodes < plan.num_nodes


def test_who_wants_no_draft_rests(checkpoints: Mapping[str, Path], model: LlamaModel) -> None:
    planning = Planning(model, checkpoints["fspad"], control=ControlOptions("cost-aware"))
    planning.prefill()
    drafted = planning.plan(None)
    assert drafted is not None and drafted.num_nodes == 32
    planning.told(drafted, num_nodes=1)
    sizes = []
    for _ in range(17):
        plan = planning.plan(None)
        assert plan is not None
        planning.told(plan)
        sizes.append(plan.num_nodes)
    assert sizes == [1] * 16 + [32]


def test_sequences_that_come_back_begin_anew(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    """In their old rows, and while another one's pairs lie beside."""
    planning = Planning(model, checkpoints["fspad"])
    planning.prefill()
    plan = planning.plan()
    assert plan is not None
    planning.told(plan, taken=3)
    drafter, state = planning.drafter, planning.state
    drafter.finish(state)
    drafter.start(state)
    assert planning.plan() is None  # no features
    planning.prefill()
    assert planning.plan() is not None
    assert drafter._drafts[state].cached.length == len(state.token_ids) - 2
    drafter.finish(state)
    assert drafter.cache.num_held_pages == 0


def test_an_interrupted_end_is_made_up_for(
    checkpoints: Mapping[str, Path], model: LlamaModel
) -> None:
    planning = Planning(model, checkpoints["fspad"], control=ControlOptions("beta-ts"))
    drafter, state = planning.drafter, planning.state
    assert drafter._control is not None
    control, number, was_interrupted = drafter._control._control, 1, True
    num_free = len(control._free)
    while was_interrupted:
        drafter.cache.reserve(drafter._drafts[state].cached, 70)
        was_interrupted = interrupted(lambda: drafter.finish(state), number)
        drafter.finish(state)
        assert drafter.cache.num_held_pages == 0 and not drafter._drafts, number
        drafter.start(state)
        assert len(control._free) == num_free
        number += 1
    assert number > 4
