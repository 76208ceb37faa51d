"""Drafters that run the target's first layers: what they ran is taken up, or it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from specrt.cache import CacheBatch, KVCache
from specrt.draft.base import Budget, EmptyDrafter
from specrt.models.layer_run import LayerRun, LowerLayers
from specrt.models.model import LlamaModel
from specrt.models.run_trees import RunShape
from specrt.models.step import layer_tap
from specrt.sampling import SamplingParams
from specrt.types import Proposal, SequenceState
from tests.engine.support import make_engine, make_model, prompts, sampled, texts

VOCAB, LEVELS = 97, 4
SAMPLING = (
    SamplingParams(max_new_tokens=25, ignore_eos=True),
    sampled(4, ignore_eos=True),
    sampled(5, ignore_eos=True),
)


class Level(NamedTuple):
    """``[B, F]`` each."""

    tokens: np.ndarray
    parents: np.ndarray


class SelfDrafter(EmptyDrafter):
    """Runs the first layers over trees in which the right tokens are, and proposes those trees.

    Args:
        model: the target.
        answers: for each prompt (as a tuple) what plain decoding says.
        width: nodes of a level.
        trick: what it does instead.
    """

    def __init__(
        self,
        model: LlamaModel,
        answers: Mapping[tuple[int, ...], list[int]],
        width: int,
        trick: Trick,
    ) -> None:
        self._model, self._answers, self._width, self._trick = model, answers, width, trick
        self._runs: dict[RunShape, list[LayerRun]] = {}
        self.former: tuple[LowerLayers, LayerRun] | None = None

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        lower = budget.lower
        assert lower is not None
        size = 1 + LEVELS * self._width
        self.make_room(lower, [size] * len(states))
        run = self.run_of(lower, len(states))
        lower.begin(run)
        wanted = [self._level(states, level) for level in range(1 + LEVELS)]
        self._trick(self, lower, run, wanted)
        self.former = lower, run
        return self.made(run, wanted)

    def made(self, run: LayerRun, wanted: Sequence[Level]) -> Proposal:
        """Of what was wanted, whatever was run."""
        tokens, parents = (
            torch.from_numpy(np.concatenate(rows, axis=1)) for rows in zip(*wanted, strict=True)
        )
        count = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)
        return Proposal(tokens, parents, count)

    def make_room(self, lower: LowerLayers, sizes: Sequence[int]) -> None:
        assert min(lower.reserve(sizes)) >= max(sizes)

    def run_of(self, lower: LowerLayers, batch: int, number: int = 0) -> LayerRun:
        shape = RunShape(batch, lower.table_width, self._width, LEVELS, num_layers=2)
        runs = self._runs.setdefault(shape, [])
        while len(runs) <= number:
            runs.append(LayerRun(self._model, shape))
        return runs[number]

    def launch(self, run: LayerRun, level: int) -> None:
        """By a captured graph, as a drafter would."""
        self._model.device.run((self, run, level), partial(run.launch, level))
        run.tell_launched(level)

    def run(self, run: LayerRun, levels: Sequence[Level]) -> None:
        for number, level in enumerate(levels):
            if number:
                run.stage(level.tokens, level.parents if self._width > 1 else None)
            self.launch(run, number)

    def _level(self, states: Sequence[SequenceState], level: int) -> Level:
        """The right token in its last place, below the right one; the others are wrong."""
        if level == 0:
            roots = np.array([[state.token_ids[-1]] for state in states], dtype=np.int32)
            return Level(roots, np.full_like(roots, -1))
        width, rows = self._width, []
        for state in states:
            answer = self._answers[tuple(state.token_ids[: state.prompt_len])]
            place = len(state.token_ids) - state.prompt_len + level - 1
            right = (answer + [0] * LEVELS)[place]
            rows.append([(right + width - 1 - node) % VOCAB for node in range(width)])
        tokens = np.array(rows, dtype=np.int32)
        return Level(tokens, np.full_like(tokens, (level - 1) * width))


Trick = Callable[[SelfDrafter, LowerLayers, LayerRun, list[Level]], None]


def other(levels: Sequence[Level], number: int) -> list[Level]:
    """The same levels, with other tokens from ``number`` on."""
    return [
        level if place < number else Level((level.tokens + 7) % VOCAB, level.parents)
        for place, level in enumerate(levels)
    ]


# --- what is what it says -------------------------------------------------------------------------


def honest(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    me.run(run, wanted)


def launches_again(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    me.run(run, wanted)
    for level in (1, 3, 0):
        me.launch(run, level)


def proposes_less(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    me.run(run, wanted)
    del wanted[3:]


def proposes_another_root(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    """Which nobody asked about."""
    me.run(run, wanted)
    wanted[:1] = other(wanted[:1], 0)


def begins_again(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    me.run(run, other(wanted, 0))
    lower.begin(run)
    me.run(run, wanted)


def runs_into_a_run(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    """What another run writes, after it has ended, would be the rows of this one."""
    former = me.run_of(lower, len(wanted[0].tokens), 1)
    lower.begin(former)
    me.run(former, other(wanted, 0))
    lower.begin(run)
    me.run(run, wanted)
    for level in range(1 + LEVELS):
        me.launch(former, level)


# --- what is not ----------------------------------------------------------------------------------


def ran_other_tokens(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    me.run(run, other(wanted, 2))


def ran_other_parents(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    me.run(run, [*wanted[:2], *(Level(tokens, parents * 0) for tokens, parents in wanted[2:])])


def ran_less(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    me.run(run, wanted[:3])


def ran_nothing(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    pass


def leaves_a_level_out(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    launch, me.launch = me.launch, lambda run, level: level == 2 or launch(run, level)  # type: ignore
    me.run(run, wanted)
    del me.launch


def leaves_the_last_out(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    launch, me.launch = me.launch, lambda run, level: level == 4 or launch(run, level)  # type: ignore
    me.run(run, wanted)
    del me.launch


def mixes_the_sequences_up(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    me.run(run, [Level(np.roll(tokens, 1, axis=0), parents) for tokens, parents in wanted])


def runs_what_it_had(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    """A round late: by a run whose round is over, and by what it was lent for that round."""
    if me.former is None:
        me.run(run, wanted)
        return
    late, former = me.former
    lower.begin(me.run_of(lower, len(wanted[0].tokens), 1))  # so that `former` has ended
    with pytest.raises(ValueError, match="while a proposal is made"):
        late.begin(former)
    with pytest.raises(ValueError, match="stage: expected at most 0 levels"):
        former.stage(wanted[0].tokens)
    for level in range(1 + LEVELS):
        me.launch(former, level)


HONEST = [
    honest,
    launches_again,
    proposes_less,
    proposes_another_root,
    begins_again,
    runs_into_a_run,
]
HOSTILE = [
    ran_other_tokens,
    ran_other_parents,
    ran_less,
    ran_nothing,
    leaves_a_level_out,
    leaves_the_last_out,
    mixes_the_sequences_up,
    runs_what_it_had,
]


# --- tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked() -> list[list[int]]:
    return prompts(3, VOCAB)


@pytest.fixture(scope="module")
def expected(model: LlamaModel, asked: list[list[int]]) -> list[list[int]]:
    return texts(make_engine(model).generate(asked, SAMPLING))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each round's tree was taken up behind the layers that were run."""
    seen: list[bool] = []
    take = LowerLayers.take

    def listen(self: LowerLayers, *arguments: object) -> LayerRun | None:
        run = take(self, *arguments)  # type: ignore[arg-type]
        seen.append(run is not None)
        return run

    monkeypatch.setattr(LowerLayers, "take", listen)
    return seen


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("trick", [*HONEST, *HOSTILE], ids=lambda trick: trick.__name__)
def test_a_text_is_what_plain_decoding_says(
    model: LlamaModel,
    asked: list[list[int]],
    expected: list[list[int]],
    taken: list[bool],
    trick: Trick,
    width: int,
    max_batch: int,
) -> None:
    if (trick is ran_other_parents and width == 1) or (
        trick is mixes_the_sequences_up and max_batch == 1
    ):
        pytest.skip("there is nothing else to run")
    answers = {tuple(p): answer for p, answer in zip(asked, expected, strict=True)}
    drafter = SelfDrafter(model, answers, width, trick)
    results = make_engine(model, drafter, max_batch=max_batch).generate(asked, SAMPLING)
    assert texts(results) == expected
    deepest = 2 if trick is proposes_less else LEVELS
    assert all(max(result.stats.accept_lengths) == deepest for result in results)
    if trick in HONEST:
        assert all(taken)
    elif trick is mixes_the_sequences_up:
        assert not all(taken)
    elif trick is not runs_what_it_had:
        assert not any(taken)


@pytest.mark.parametrize("tap", [0, 1, 2])
def test_states_below_the_last_layer_that_was_run_cost_a_whole_pass(
    model: LlamaModel,
    asked: list[list[int]],
    expected: list[list[int]],
    taken: list[bool],
    tap: int,
) -> None:
    """Layers 0 and 1 are run, and the states between them are not kept."""
    answers = {tuple(p): answer for p, answer in zip(asked, expected, strict=True)}
    read: dict[bool, list[torch.Tensor]] = {}
    for trick in (honest, ran_nothing):
        drafter = SelfDrafter(model, answers, 1, trick)
        drafter.taps = (layer_tap(tap),)
        states = read[trick is honest] = []
        drafter.observe = lambda *given, states=states: states.append(  # type: ignore[method-assign]
            next(iter(given[-1].values())).clone()
        )
        assert texts(make_engine(model, drafter).generate(asked, SAMPLING)) == expected
        assert any(taken) == (trick is honest and tap > 0)
        taken.clear()
    assert len(read[True]) == len(read[False])
    assert all(one.equal(two) for one, two in zip(read[True], read[False], strict=True))


def lent(model: LlamaModel, cache: KVCache) -> LowerLayers:
    """For a sequence that holds nothing yet."""
    roots = torch.tensor([5], dtype=torch.int32)
    return LowerLayers(model, CacheBatch(cache, [cache.open(9)]), roots)


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        ([1, 2], [0, 1]),
        ([1, 2], [-1, 0]),
        ([1, 2], None),
    ],
)
def test_what_cannot_be_run(
    model: LlamaModel, tokens: list[int], parents: list[int] | None
) -> None:
    lower = lent(model, model.new_cache())
    run = LayerRun(model, RunShape(1, lower.table_width, 2, LEVELS, num_layers=1))
    lower.begin(run)
    with pytest.raises(ValueError, match="parents"):
        run.stage(np.array([tokens]), None if parents is None else np.array([parents]))


def test_runs_that_do_not_fit(model: LlamaModel, checkpoint: Path) -> None:
    lower = lent(model, model.new_cache())
    fitting = RunShape(1, lower.table_width, 1, LEVELS, num_layers=1)
    for changes in ({"batch": 2}, {"table_width": 16}):
        with pytest.raises(ValueError, match="run: expected one of this target for 1 sequences"):
            lower.begin(LayerRun(model, fitting._replace(**changes)))
    run = LayerRun(model, fitting)
    lower.begin(run)
    with pytest.raises(ValueError, match="run: expected one of this cache"):
        lent(model, model.new_cache()).begin(run)
    with pytest.raises(ValueError, match="of another target"):
        lower.begin(LayerRun(make_model(checkpoint), fitting))
    for changes, message in (
        ({"num_layers": 0}, r"num_layers: expected 1..2, got 0"),
        ({"num_layers": 3}, r"num_layers: expected 1..2, got 3"),
        ({"num_levels": 128}, "expected at most 128 nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerRun(model, fitting._replace(**changes))
