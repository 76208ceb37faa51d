"""Rounds of launches alone, on a GPU, simulated or real: one round late, and the same text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import BatchTables, Budget, DraftParams, EmptyDrafter, RoundPlan, StageTimes
from specrt.draft.prompt_lookup.on_device import DevicePromptLookupDrafter
from specrt.engine import launched
from specrt.engine.engine import Engine
from specrt.engine.launched import LaunchedRounds
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.tree import stack
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState
from tests.checkpoints import make_checkpoint
from tests.engine.support import RandomTreeDrafter, make_engine, texts
from tests.simulated_gpu import only_simulated

VOCAB = 97
SIZES = {
    "num_hidden_layers": 1,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[5, 9, 5, 9, 5] * 3, [3], [(11 * i * i + 3 * i) % VOCAB for i in range(70)], [7, 8] * 4]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, seed=4)
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.9, seed=4, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Weights]:
    path: Path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, **SIZES)
    config = ModelConfig.from_directory(path)
    return config, load_weights(path, config, torch.bfloat16)


@pytest.fixture
def model(loaded: tuple[ModelConfig, Weights], gpu: Device) -> LlamaModel:
    config, weights = loaded
    return LlamaModel(config, place_weights(weights, gpu), gpu)


class PlannedTrees(RandomTreeDrafter):
    """Random trees that are planned while a round is under way, so that the tokens in them stand
    where they may be right only if that round gave as many as was guessed."""

    def __init__(
        self,
        model: LlamaModel,
        answers: Sequence[list[int]],
        size: int = 6,
        prompts: Sequence[list[int]] = PROMPTS,
    ) -> None:
        known = {tuple(p): answer for p, answer in zip(prompts, answers, strict=True)}
        super().__init__(known, VOCAB, size, hit_rate=0.9)
        self._device, self._size = model.device, size
        self._placed: dict[int, Proposal] = {}
        self.reports: list[RoundReport] = []
        self.plans = 0

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan | None:
        if budget.params != DraftParams() or self._rng.random() < 0.1:
            return None
        self.plans += 1
        batch, size = len(states), min(self._size, budget.max_nodes)
        trees = stack([self._tree(self._further(state), size) for state in states])
        fields = torch.zeros(2, batch, size, dtype=torch.int32)
        for place, given in zip(fields, (trees.draft_tokens, trees.parents), strict=True):
            place[:, : given.shape[1]] = given
        if batch not in self._placed:
            tokens, parents = self._device.zeros(2, batch, size, dtype=torch.int32)
            counts = self._device.zeros(batch, dtype=torch.int32)
            self._placed[batch] = Proposal(tokens, parents, counts)
        there = self._placed[batch]
        for host, out in zip(
            (*fields, trees.num_nodes), (there.draft_tokens, there.parents, there.num_nodes),
            strict=True,
        ):  # fmt: skip
            self._device.upload(host.clone(), out)
        return RoundPlan(size, batch)

    def _further(self, state: SequenceState) -> SequenceState:
        answer = self._answers[tuple(state.token_ids[: state.prompt_len])]
        said = len(state.token_ids) - state.prompt_len
        more = answer[said : said + self._rng.randrange(3)]
        return replace(state, token_ids=state.token_ids + more)

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        return self._placed[len(tables.roots)]

    def launch_observe(
        self,
        plan: RoundPlan,
        tables: BatchTables,
        tree: DraftTree,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None: ...

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        self.reports.append(report)


class OneAfterAnother(EmptyDrafter):
    """Plain decoding that the host takes part in: what is made of an empty drafter may propose."""


def said(engine: Engine, params: Sequence[SamplingParams]) -> list[tuple[object, ...]]:
    results = engine.generate(PROMPTS, list(params))
    assert engine.cache.num_held_pages == 0
    return [(r.token_ids, r.text, r.logprobs, r.finish_reason, r.error) for r in results]


@pytest.mark.parametrize(
    ("sampling", "sizes"),
    [
        (GREEDY, {"max_batch": 3, "prefill_chunk": 7}),
        (SAMPLED, {"max_batch": 4, "max_cached_tokens": 128}),
    ],
    ids=["greedy", "sampled"],
)
def test_texts_are_those_of_rounds_one_after_another(
    model: LlamaModel,
    sampling: SamplingParams,
    sizes: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Sequences join and leave, end by limits, stop tokens and stop strings, and give way."""
    params = [replace(sampling, max_new_tokens=4 + 3 * i, logprobs=i == 2) for i in range(4)]
    plain = said(make_engine(model, OneAfterAnother(), max_batch=1), params)
    tokens = [one[0] for one in plain]
    params[0] = replace(params[0], stop_token_ids=[tokens[0][2]])
    params[3] = replace(params[3], stop=chr(32 + tokens[3][5]))
    expected = said(make_engine(model, OneAfterAnother(), max_batch=1), params)
    assert said(make_engine(model, **sizes), params) == expected
    drafter = PlannedTrees(model, [list(ids) for ids in tokens])
    assert said(make_engine(model, drafter, **sizes), params) == expected
    assert drafter.plans > 5
    assert sum(int(report.accept_length.clip(0).sum()) for report in drafter.reports) > 0
    lookup = DevicePromptLookupDrafter(model.device)
    assert said(make_engine(model, lookup, **sizes), params) == expected
    assert not caplog.messages


@only_simulated
def test_acceptance_reads_what_the_head_left(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that tells all, logits may hold anything."""
    params = [GREEDY, DRAWN, GREEDY, DRAWN]
    expected = said(make_engine(model, OneAfterAnother(), max_batch=4), params)
    bare, spoilt = launched.accept, dict[torch.Size, torch.Tensor]()

    def accept(tree: DraftTree, logits: torch.Tensor, *rest: Any, **options: Any) -> AcceptResult:
        assert options["maxima"] is not None
        if logits.shape not in spoilt:  # the first time, when nothing is captured yet
            spoilt[logits.shape] = torch.full_like(logits, float("nan"))
        return bare(tree, spoilt[logits.shape], *rest, **options)

    monkeypatch.setattr(launched, "accept", accept)
    assert said(make_engine(model, max_batch=4), params) == expected


def noting(name: str, call: Callable[..., object], events: list[str]) -> Callable[..., object]:
    def noted(*args: object, **options: object) -> object:
        events.append(name)
        return call(*args, **options)

    return noted


def test_the_next_round_is_launched_before_one_is_read(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[str]()
    for name in ("launch", "read"):
        bare: Callable[..., object] = getattr(LaunchedRounds, name)

        monkeypatch.setattr(LaunchedRounds, name, noting(name, bare, events))
    make_engine(model).generate(PROMPTS[0], GREEDY)
    # One round more than tokens: it was under way when the last one was read, and gave nothing.
    num = GREEDY.max_new_tokens
    assert num is not None
    assert events == ["launch", *["launch", "read"] * num, "read"]


@only_simulated
def test_a_plain_round_is_one_graph(model: LlamaModel, caplog: pytest.LogCaptureFixture) -> None:
    """Made when a round of these sizes comes for the second time, and launched from then on."""
    caplog.set_level("DEBUG", "specrt")
    engine = make_engine(model)
    engine.add(PROMPTS[1], GREEDY)
    caplog.clear()
    engine.step()
    assert not caplog.messages
    engine.step()
    (made,) = caplog.messages
    # Settle, embed, a layer of 7, norm and head, accept in 3, append and commit.
    assert "a graph of 20 launches" in made
    while not engine.is_idle:
        engine.step()
    assert len(caplog.messages) == 1


def test_buffers_may_move_between_rounds(model: LlamaModel) -> None:
    """As another engine's larger batch makes them, or a longer prompt: rounds hold addresses."""
    expected = texts(make_engine(model).generate(PROMPTS, SAMPLED))
    engine = make_engine(model)
    handles = [engine.add(prompt, SAMPLED) for prompt in PROMPTS]
    chunks = [chunk for _ in range(4) for chunk in engine.step()]
    version = model.device.version
    model.reserve(8, 64, 256, has_logits=True)
    assert model.device.version > version
    while not engine.is_idle:
        chunks += engine.step()
    results = {chunk.handle: chunk.result for chunk in chunks if chunk.result is not None}
    assert [results[handle].token_ids for handle in handles] == expected


@pytest.mark.parametrize("num_good", [0, 1], ids=["as it is", "captured"])
def test_a_round_that_cannot_be_launched_costs_only_its_drafter(
    model: LlamaModel, caplog: pytest.LogCaptureFixture, num_good: int
) -> None:
    answers = texts(make_engine(model).generate(PROMPTS, GREEDY))

    class Broken(PlannedTrees):
        num_launched = 0

        def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
            self.num_launched += 1
            if self.num_launched > num_good:
                raise ArithmeticError("broken")
            return super().launch_propose(plan, tables)

    drafter = Broken(model, answers)
    assert texts(make_engine(model, drafter).generate(PROMPTS, GREEDY)) == answers
    assert "broken" in caplog.text


def test_a_drafter_that_lacks_a_part_is_told_of(
    model: LlamaModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Partly(EmptyDrafter):
        def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
            return RoundPlan(1)

        def told(self, *args: object) -> None: ...

    answer = make_engine(model).generate(PROMPTS[1], GREEDY).token_ids
    assert not caplog.messages
    assert make_engine(model, Partly()).generate(PROMPTS[1], GREEDY).token_ids == answer
    assert caplog.messages == [
        "Partly: its rounds are not launched ahead: it lacks launch_propose, launch_observe"
    ]


@only_simulated
def test_an_abort_and_a_closed_engine_leave_nothing_under_way(model: LlamaModel) -> None:
    answers = texts(make_engine(model).generate(PROMPTS, GREEDY))
    engine = make_engine(model, max_batch=4)
    handles = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    chunks = [chunk for _ in range(5) for chunk in engine.step()]
    assert engine.abort(handles[1]) and not engine.abort(handles[1])
    while not engine.is_idle:
        chunks += engine.step()
    results = {chunk.handle: chunk.result for chunk in chunks if chunk.result is not None}
    for handle, answer in zip(handles, answers, strict=True):
        if handle != handles[1]:
            assert results[handle].token_ids == answer
    assert engine.cache.num_held_pages == 0
    engine.add(PROMPTS[2], GREEDY)
    engine.step(), engine.step()
    engine.close()
