"""Levels of a tree under a draft controller: by hand, over many rounds, and in a drafter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from specrt.draft.fspad.checkpoint import read_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.fspad.weights import pack_weights
from specrt.draft.length.control import CONTROLLERS, ControlOptions, Posterior
from specrt.draft.length.controlled import ControlledPolicy
from specrt.draft.length.costs import RoundCost
from specrt.draft.length.measured import ENVELOPES, MeasuredPolicy, TreePolicy, TreeRound
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from tests.checkpoints import make_draft_checkpoint
from tests.engine.support import make_engine, make_model, prompts, sampled, texts

VOCAB = 97
ONE_MS, SLOPE = 10.0, 0.03
NODES = 63
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)


def belief_of(policy: ControlledPolicy) -> Posterior:
    return policy._control.posterior(policy._batch)


def begun(policy: TreePolicy) -> TreeRound:
    """A round that drafts, the first of twenty."""
    return next(one for one in (policy.begin() for _ in range(20)) if one is not None)


@dataclass
class World:
    """A batch whose paths go on with the same chance at each level; the drafter believes in
    ``belief``. A level costs ``level`` plain rounds."""

    policy: TreePolicy
    belief: float = 0.8
    truth: float = 0.8
    level: float = 0.1
    batch: int = 1
    cost: RoundCost = field(default_factory=RoundCost)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def grow(self, choice: TreeRound) -> tuple[int, np.ndarray]:
        """Levels drafted, and all nodes' scores ``[B, N - 1]``."""
        chances = self.belief ** np.arange(1, 10)[None].repeat(self.batch, axis=0)
        masses: list[float] = []
        for number in range(1, 10):
            masses.append(choice.mass(np.log(chances[:, number - 1 : number]), number - 1))
            if not choice.expands(masses, self.batch, self.cost):
                break
        time = self.level * ONE_MS
        self.policy.observe_draft(time, time * (number - 1), number - 1)
        scores = np.full((self.batch, NODES), -np.inf)
        scores[:, :number] = np.log(chances[:, :number])
        return number, scores

    def round(self) -> tuple[int, int, float, float]:
        """Levels, envelope, tokens a sequence and time in plain rounds."""
        levels, size, tokens = 0, 1, 1.0
        if (choice := self.policy.begin()) is not None:
            levels, scores = self.grow(choice)
            size = choice.size(scores, levels, self.cost)
            holds = self.rng.random((self.batch, NODES)) < self.truth
            is_accepted = (holds.cumprod(axis=1) * (scores > -np.inf))[:, : size - 1]
            choice.observe_outcome(scores[:, : size - 1], is_accepted, levels)
            tokens += is_accepted.sum() / self.batch
        plain, rows = 1.0 + SLOPE * (self.batch - 1), size * self.batch
        verify = 1.0 + SLOPE * (rows - 1)
        self.cost.observe(rows, ONE_MS * verify)
        return levels, size, tokens, (levels * self.level + verify) / plain

    def play(self, num_rounds: int) -> np.ndarray:
        """``[rounds, 4]``, a row as of :meth:`round`."""
        return np.array([self.round() for _ in range(num_rounds)])

    def speed(self, num_rounds: int) -> float:
        _, _, tokens, times = self.play(num_rounds).sum(axis=0)
        return float(tokens / times)


# --- one round ------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 3, 5, 8])
def test_fixed_drafts_its_levels_and_two_nodes_for_each(levels: int) -> None:
    world = World(ControlledPolicy(ControlOptions("fixed", draft_len=levels)))
    drafted, size, _, _ = world.round()
    assert drafted == levels
    assert size == min(n for n in ENVELOPES if n >= 1 + 2 * levels)


def test_no_more_nodes_than_there_are() -> None:
    policy = ControlledPolicy(ControlOptions("fixed", draft_len=8))
    scores, choice = np.zeros((2, 4)), begun(policy)
    assert choice.expands([1.0], 2, RoundCost())
    assert choice.size(scores, 8, RoundCost()) == 5
    assert choice.size(np.empty((2, 0)), 8, RoundCost()) == 1


def test_a_level_is_judged_by_the_chance_that_the_path_goes_on_into_it() -> None:
    policy, cost = ControlledPolicy(ControlOptions("threshold", threshold=0.5)), RoundCost()
    choice = begun(policy)
    assert choice.expands([0.6], 1, cost)
    assert choice.expands([0.6, 0.35], 1, cost)  # 0.58 of what came so far
    assert not choice.expands([0.6, 0.35, 0.1], 1, cost)
    choice = begun(policy)
    assert choice.expands([0.9], 1, cost)
    assert choice.expands([0.9, 0.9000001], 1, cost)  # rounding may lift a mass


@pytest.mark.parametrize("kind", CONTROLLERS)
@pytest.mark.parametrize("masses", [[math.nan], [0.0], [0.9, 0.0], [0.9, math.nan], [0.0, 0.0]])
def test_what_is_not_reached_is_not_followed(kind: str, masses: list[float]) -> None:
    policy, cost = ControlledPolicy(ControlOptions(kind, threshold=0.0)), RoundCost()
    choice = begun(policy)
    for number in range(1, len(masses) + 1):
        is_open = choice.expands(masses[:number], 1, cost)
    assert not is_open
    choice.size(np.zeros((1, NODES)), len(masses), cost)
    choice.observe_outcome(np.zeros((1, NODES)), np.zeros((1, NODES)), len(masses))
    belief = belief_of(policy)
    assert math.isfinite(belief.bias_mean) and math.isfinite(belief.gain_mean)


def test_the_mean_of_the_batch_is_learned() -> None:
    policy = ControlledPolicy(ControlOptions("beta-ts", prior=(1e9, 1.0), discount=None))
    choice = begun(policy)
    for levels in range(1, 5):
        choice.expands([1.0] * levels, 3, RoundCost())
    is_accepted = np.zeros((3, 8))
    is_accepted[0, :4] = is_accepted[1, :2] = 1.0
    choice.size(np.zeros((3, 8)), 4, RoundCost())
    choice.observe_outcome(np.zeros((3, 8)), is_accepted, 4)
    belief = belief_of(policy)
    assert (belief.alpha - 1e9, belief.beta) == (2.0, 2.0)


def test_outcomes_may_come_after_later_rounds_have_begun() -> None:
    """Each is learned from its own round's levels: four of four, then none of one."""

    def alpha_and_beta(is_late: bool) -> tuple[float, float]:
        policy = ControlledPolicy(ControlOptions("beta-ts", prior=(1e9, 1.0), discount=None))
        late = []
        for num_levels in (4, 1):
            choice, is_accepted = begun(policy), np.zeros((1, 8))
            for levels in range(1, num_levels + 1):
                choice.expands([1.0] * levels, 1, RoundCost())
            choice.size(np.zeros((1, 8)), num_levels, RoundCost())
            is_accepted[:, :num_levels] = num_levels > 1
            late.append((choice, is_accepted))
            if not is_late:
                choice.observe_outcome(np.zeros((1, 8)), is_accepted, num_levels)
        for choice, is_accepted in late if is_late else ():
            choice.observe_outcome(np.zeros((1, 8)), is_accepted, 4)
        belief = belief_of(policy)
        return belief.alpha - 1e9, belief.beta - 1.0

    assert alpha_and_beta(is_late=True) == alpha_and_beta(is_late=False) == (4.0, 1.0)


def test_undrafted_rounds_are_learned_without_an_outcome() -> None:
    policy = ControlledPolicy(ControlOptions())
    world = World(policy, belief=0.1, truth=0.0, level=0.5)
    idle = []
    for _ in range(60):
        levels = world.round()[0]
        idle.append(belief_of(policy).idle)
        assert idle[-1] == (0 if levels else (idle[-2] if len(idle) > 1 else 0) + 1)
    assert max(idle) > 5


def test_rounds_repeat_from_the_seed() -> None:
    runs = [
        World(ControlledPolicy(ControlOptions("beta-ts"), seed=seed)).play(60) for seed in (1, 1, 2)
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


# --- many rounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chance", [0.7, 0.9])
def test_it_keeps_up_with_the_rule_by_belief_alone(chance: float, batch: int) -> None:
    ours = World(ControlledPolicy(ControlOptions()), chance, chance, batch=batch)
    theirs = World(MeasuredPolicy(), chance, chance, batch=batch)
    assert (ours.play(200)[100:, 0] > 0).mean() > 0.97
    assert ours.speed(600) > 0.93 * theirs.speed(800)


@pytest.mark.parametrize(("belief", "truth"), [(0.1, 0.1), (0.9, 0.1), (0.99, 0.0)])
def test_where_drafting_never_pays_little_is_lost(belief: float, truth: float) -> None:
    world = World(ControlledPolicy(ControlOptions()), belief, truth, level=0.3)
    assert world.speed(1500) > 0.975


def test_it_comes_back_when_drafting_pays() -> None:
    world = World(ControlledPolicy(ControlOptions()), belief=0.9, truth=0.05, level=0.2)
    assert (world.play(600)[:, 0] > 0).mean() < 0.15
    world.truth, world.level = 0.9, 0.1
    world.play(150)
    assert (world.play(200)[:, 0] > 0).mean() > 0.95


def test_confidence_is_corrected_by_how_it_turns_out() -> None:
    """A drafter that is sure and mostly wrong: few levels, though it believes in many."""
    world = World(ControlledPolicy(ControlOptions("threshold")), belief=0.95, truth=0.3)
    assert world.play(1)[0, 0] == 8
    world.play(200)
    assert world.play(100)[:, 0].mean() < 2


# --- in a drafter ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafter_path(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafter") / "fspad"
    make_draft_checkpoint(checkpoint, path, "fspad")
    return path


def make_drafter(model: LlamaModel, path: Path, control: ControlOptions | None) -> FspadDrafter:
    config, tensors = read_checkpoint(path, model.config)
    embed, head = model.weights.embed, model.weights.lm_head
    weights = pack_weights(config, tensors, embed, head, config.layer.dtype)
    layer = DraftLayer(config, weights, model.device)
    return FspadDrafter(layer, control=control)


@pytest.mark.parametrize("kind", CONTROLLERS)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_new_tokens=40, ignore_eos=True), sampled(1)],
    ids=["greedy", "seed"],
)
def test_bits_do_not_change(
    checkpoint: Path, drafter_path: Path, kind: str, params: SamplingParams
) -> None:
    model = make_model(checkpoint)
    expected = texts(make_engine(model, max_batch=1).generate(prompts(6, VOCAB), params))
    # A random drafter is sure of nothing: without a low threshold and a high prior it draws little.
    control = ControlOptions(kind, threshold=0.02, prior=(3.0, 1.0))
    for max_batch in (4, 1):
        drafter = make_drafter(model, drafter_path, control)
        results = make_engine(model, drafter, max_batch=max_batch).generate(
            prompts(6, VOCAB), params
        )
        assert texts(results) == expected
        assert sum(result.stats.num_draft_tokens for result in results) > 0
        assert drafter._cache.num_free_pages == drafter._cache.num_pages


def test_the_rule_decides_how_deep_trees_are(checkpoint: Path, drafter_path: Path) -> None:
    model = make_model(checkpoint)
    depths = []
    for levels in (1, 2, 5):
        control = ControlOptions("fixed", draft_len=levels)
        engine = make_engine(model, make_drafter(model, drafter_path, control))
        (result,) = engine.generate(prompts(1, VOCAB), GREEDY)
        nodes = result.stats.num_draft_tokens / result.stats.num_rounds
        depths.append((len(result.stats.proposed_by_depth) <= levels, nodes))
    assert all(is_bound for is_bound, _ in depths)
    assert depths[0][1] < depths[1][1] < depths[2][1]
