"""Drafters that run the target's first layers on a GPU, where the host can compare nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.layer_run import LayerRun, LowerLayers
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.models.run_trees import DeviceTrees, HostTrees, RunShape
from specrt.sampling import SamplingParams
from specrt.types import Proposal
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_engine, raise_what_drafters_raise, texts
from tests.engine.test_self_drafters import (
    LEVELS,
    VOCAB,
    Level,
    SelfDrafter,
    Trick,
    begins_again,
    honest,
    launches_again,
    leaves_a_level_out,
    leaves_the_last_out,
    other,
    proposes_another_root,
    proposes_less,
    ran_less,
    ran_nothing,
    runs_what_it_had,
)

PROMPTS = [[5, 9, 5, 9, 5], [7, 8]]
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
WIDTH = 3


class Fields(NamedTuple):
    tokens: torch.Tensor
    parents: torch.Tensor


Spoil = Callable[[Fields], Fields]


class DeviceSelfDrafter(SelfDrafter):
    """Proposes what its run holds, or what becomes of it.

    Args:
        spoil: makes something else of that.
    """

    def __init__(
        self,
        model: LlamaModel,
        answers: Mapping[tuple[int, ...], list[int]],
        trick: Trick,
        spoil: Spoil,
        width: int = WIDTH,
    ) -> None:
        super().__init__(model, answers, width, trick)
        self._spoil = spoil

    def made(self, run: LayerRun, wanted: Sequence[Level]) -> Proposal:
        size = 1 + (len(wanted) - 1) * self._width
        tokens, parents = self._spoil(Fields(*run.staged(size)))
        return Proposal(tokens, parents, torch.ones_like(tokens[:, 0]) * size)


# --- what it runs, and what it proposes -----------------------------------------------------------


def runs_what_is_nothing(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    """Tokens and parents that there are not become those that there are."""
    odd = [Level(level.tokens * 1000 - 500, level.parents * 70 - 9) for level in wanted]
    me.run(run, odd)


def runs_wrong_tokens(
    me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
) -> None:
    me.run(run, other(wanted, 2))


def moves_its_rows(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    me.run(run, wanted)
    run.levels[2].rows.depth.fill_(9)


def writes_between(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
    """To level 1, before level 2 is staged."""
    me.run(run, wanted[:2])
    run.staged(3)[0].fill_(7)
    for number, level in enumerate(wanted[2:], start=2):
        run.stage(level.tokens, level.parents)
        me.launch(run, number)


def as_it_is(fields: Fields) -> Fields:
    return fields


def a_copy(fields: Fields) -> Fields:
    return Fields(*(field.clone() for field in fields))


def other_parents(fields: Fields) -> Fields:
    return fields._replace(parents=fields.parents.clone())


def a_token_written(fields: Fields) -> Fields:
    fields.tokens[:, 2].fill_(7)
    return fields


def a_parent_written(fields: Fields) -> Fields:
    fields.parents.view(-1, fields.parents.shape[1])[:, -1].zero_()
    return fields


def one_further(fields: Fields) -> Fields:
    return Fields(*(field[:, 1:] for field in fields))


def swapped(fields: Fields) -> Fields:
    return Fields(fields.parents, fields.tokens)


CASES: list[tuple[Trick, Spoil, bool]] = [
    (honest, as_it_is, True),
    (proposes_less, as_it_is, True),
    (runs_what_is_nothing, as_it_is, True),
    (ran_less, as_it_is, False),
    (leaves_a_level_out, as_it_is, False),
    (writes_between, as_it_is, False),
    (honest, other_parents, False),
    (honest, a_token_written, False),
]
MORE_CASES: list[tuple[Trick, Spoil, bool]] = [
    (launches_again, as_it_is, True),
    (proposes_another_root, as_it_is, True),
    (begins_again, as_it_is, True),
    (runs_wrong_tokens, as_it_is, True),
    (ran_nothing, as_it_is, False),
    (leaves_the_last_out, as_it_is, False),
    (moves_its_rows, as_it_is, False),
    (honest, a_copy, False),
    (honest, a_parent_written, False),
    (honest, one_further, False),
    (honest, swapped, False),
]


# --- tests ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    config: ModelConfig
    weights: Weights
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    """What plain decoding says, by device."""

    def on(self, gpu: Device) -> LlamaModel:
        return LlamaModel(self.config, place_weights(self.weights, gpu), gpu)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("target")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    make_checkpoint("llama", path, head_dim=64, dtype=torch.bfloat16, **sizes)
    config = ModelConfig.from_directory(path)
    return Loaded(config, load_weights(path, config, torch.bfloat16))


@pytest.fixture
def expected(loaded: Loaded, gpu: Device) -> list[list[int]]:
    """Plain decoding's texts there."""
    if str(gpu) not in loaded.answers:
        engine = make_engine(loaded.on(gpu))
        loaded.answers[str(gpu)] = texts(engine.generate(PROMPTS, PARAMS))
    return loaded.answers[str(gpu)]


@pytest.fixture
def taken(expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each round's trees were taken up behind the layers that were run."""
    raise_what_drafters_raise(monkeypatch)
    seen: list[bool] = []
    take = LowerLayers.take

    def listen(self: LowerLayers, *arguments: object) -> LayerRun | None:
        run = take(self, *arguments)  # type: ignore[arg-type]
        seen.append(run is not None)
        return run

    monkeypatch.setattr(LowerLayers, "take", listen)
    return seen


def params_of(cases: list[tuple[Trick, Spoil, bool]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [
        pytest.param(*case, marks=marks, id=f"{case[0].__name__}-{case[1].__name__}")
        for case in cases
    ]


@pytest.mark.parametrize(
    ("trick", "spoil", "is_taken"),
    params_of(CASES) + params_of(MORE_CASES, pytest.mark.slow),
)
def test_a_text_is_what_plain_decoding_says(
    loaded: Loaded,
    gpu: Device,
    expected: list[list[int]],
    taken: list[bool],
    trick: Trick,
    spoil: Spoil,
    is_taken: bool,
) -> None:
    model = loaded.on(gpu)
    answers = {tuple(p): ids for p, ids in zip(PROMPTS, expected, strict=True)}
    drafter = DeviceSelfDrafter(model, answers, trick, spoil)
    results = make_engine(model, drafter).generate(PROMPTS, PARAMS)
    assert texts(results) == expected
    assert set(taken) == {is_taken}
    if trick is honest and spoil in (as_it_is, a_copy):
        assert all(max(result.stats.accept_lengths) == LEVELS for result in results)


def test_a_run_of_an_earlier_round(
    loaded: Loaded, gpu: Device, expected: list[list[int]], taken: list[bool]
) -> None:
    """What it launches, by graphs from when it ran, writes nobody's rows, and what it holds is not
    taken up."""

    def runs_twice_then_late(
        me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]
    ) -> None:
        if len(taken) == 2:
            runs_what_it_had(me, lower, run, wanted)
            return
        me.run(run, wanted)
        for level in range(len(wanted)):  # the second time, by which it is captured
            me.launch(run, level)
        del wanted[2:]

    model = loaded.on(gpu)
    answers = {tuple(p): ids for p, ids in zip(PROMPTS, expected, strict=True)}
    drafter = DeviceSelfDrafter(model, answers, runs_twice_then_late, as_it_is)
    results = make_engine(model, drafter).generate(PROMPTS, PARAMS)
    assert texts(results) == expected
    assert taken == [True, True, False]


class Roomless(DeviceSelfDrafter):
    def make_room(self, lower: LowerLayers, sizes: Sequence[int]) -> None: ...


def test_rows_that_had_no_page(loaded: Loaded, gpu: Device, taken: list[bool]) -> None:
    """They went to the scratch page, and verification finds pages for them afterwards."""
    model, prompt = loaded.on(gpu), [(11 * i * i + 3 * i) % VOCAB for i in range(63)]
    expected = texts(make_engine(model).generate([prompt], PARAMS))
    taken.clear()
    drafter = Roomless(model, {tuple(prompt): expected[0]}, honest, as_it_is)
    results = make_engine(model, drafter).generate([prompt], PARAMS)
    assert texts(results) == expected
    assert results[0].stats.accept_lengths[0] == LEVELS
    assert not taken[0] and all(taken[1:]) and len(taken) > 1


@pytest.mark.parametrize("width", [1, 3])
def test_rows_moved_in_an_earlier_round(
    loaded: Loaded, gpu: Device, expected: list[list[int]], taken: list[bool], width: int
) -> None:
    """Of a chain no round writes where its rows stand; all the same they stand right again."""

    def moves_once(me: SelfDrafter, lower: LowerLayers, run: LayerRun, wanted: list[Level]) -> None:
        me.run(run, wanted)
        if not taken:
            run.levels[2].rows.depth.fill_(9)
            run.levels[3].rows.ancestors.zero_()
            del wanted[2:]

    model = loaded.on(gpu)
    answers = {tuple(p): ids for p, ids in zip(PROMPTS, expected, strict=True)}
    drafter = DeviceSelfDrafter(model, answers, moves_once, as_it_is, width)
    results = make_engine(model, drafter).generate(PROMPTS, PARAMS)
    assert texts(results) == expected
    assert not taken[0] and len(taken) > 1 and all(taken[1:])


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_trees_are_what_they_are_on_the_host(gpu: Device, batch: int, width: int) -> None:
    shape = RunShape(batch, 8, width, 25 // width, num_layers=1)
    rows = shape.batch * shape.num_nodes
    host, there = HostTrees(shape, torch.zeros(rows, 4)), DeviceTrees(shape, VOCAB, gpu)
    generator = np.random.default_rng(batch + 10 * width)
    for trees in (host, there):
        trees.begin()
    for level in range(1, 1 + shape.num_levels):
        tokens, parents = (
            generator.integers(0, most, (batch, width), dtype=np.int32)
            for most in (VOCAB, shape.place(level).start)
        )
        for trees in (host, there):
            trees.stage(level, tokens, parents)
        assert gpu.read(there.ids(level)).equal(host.ids(level))
    assert gpu.read(there.depth).equal(host.depth)
    assert gpu.read(there.ancestors).equal(host.ancestors)
    for size in (1, 1 + width, shape.num_nodes):
        for ours, theirs in zip(there.staged(size), host.staged(size), strict=True):
            assert gpu.read(ours).equal(theirs)


def test_levels_of_another_shape(gpu: Device) -> None:
    trees = DeviceTrees(RunShape(2, 8, 3, 4, num_layers=1), VOCAB, gpu)
    trees.begin()
    good = gpu.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tokens: expected \[2, 3\] int32 for level 1"):
        trees.stage(1, gpu.zeros(2, 4, dtype=torch.int32), good)
    with pytest.raises(ValueError, match=r"parents: expected \[2, 3\] int32 .* got \[3\] float32"):
        trees.stage(1, good, gpu.zeros(3))
    with pytest.raises(ValueError, match=r"parents: expected nodes 0\.\.0, got None"):
        trees.stage(1, good, None)


def test_writes_are_counted_where_torch_does_not_by_default() -> None:
    with torch.inference_mode():
        trees = DeviceTrees(RunShape(1, 8, 1, 4, num_layers=1), VOCAB, Device(is_gpu=True))
        trees.begin()
        assert trees._are_only_mine()
        trees.staged(2)[0].fill_(3)
        assert not trees._are_only_mine()
