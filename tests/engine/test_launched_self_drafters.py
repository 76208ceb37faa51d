"""Drafters that run the target's first layers in launched rounds, and are not to be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from specrt import ops
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import BatchTables, Budget, EmptyDrafter, RoundPlan, StageTimes
from specrt.models.launched_run import LaunchedRun
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.types import AcceptResult, DraftTree, Proposal, RoundReport, SequenceState
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_engine, raise_what_drafters_raise, texts

VOCAB, LEVELS, NUM_LAYERS = 97, 3, 2
PROMPTS = [[5, 9, 5, 9, 5], [7, 8]]
GREEDY = SamplingParams(max_new_tokens=7, ignore_eos=True)
PARAMS = [GREEDY, replace(GREEDY, max_new_tokens=5, temperature=0.9, seed=3)]


@dataclass(frozen=True, eq=False)
class Drafts:
    """Of a batch, on the device."""

    tokens: torch.Tensor
    """``[B, LEVELS]`` int32, the host's guess."""
    parents: torch.Tensor
    """``[B, 1 + LEVELS]``"""
    whole: torch.Tensor
    """``[B, 1 + LEVELS]``: what would be proposed besides."""
    num_nodes: torch.Tensor
    closed: torch.Tensor
    """``[B]`` int32: zeros."""
    rows: torch.Tensor
    """``[B, H]``: scratch."""


class LaunchedSelfDrafter(EmptyDrafter):
    """Runs chains of what it was told that the target says, as a trick has it.

    Args:
        model: the target.
        answers: by prompt.
        trick: runs levels, and proposes.
    """

    def __init__(
        self, model: LlamaModel, answers: Mapping[tuple[int, ...], list[int]], trick: Trick
    ) -> None:
        self._model, self._answers, self._trick = model, answers, trick
        self._drafts: dict[int, Drafts] = {}
        self.runs: list[LaunchedRun] = []
        self.proposals: list[Proposal] = []
        self.num_accepted = 0

    def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
        device, batch = self._model.device, len(states)
        if batch not in self._drafts:
            ints = [device.zeros(batch, n, dtype=torch.int32) for n in (LEVELS, LEVELS + 1)]
            whole, closed = torch.zeros_like(ints[1]), device.zeros(batch, dtype=torch.int32)
            counts, rows = torch.full_like(closed, LEVELS + 1), device.zeros(batch, 64)
            self._drafts[batch] = Drafts(*ints, whole, counts, closed, rows)
        drafts = self._drafts[batch]
        rows = [self._guess(state) for state in states]
        device.upload(torch.tensor(rows, dtype=torch.int32), drafts.tokens)
        return RoundPlan(1 + LEVELS, drafts, NUM_LAYERS)

    def _guess(self, state: SequenceState) -> list[int]:
        """As if the round under way gave one token, where one is."""
        answer = self._answers[tuple(state.token_ids[: state.prompt_len])]
        said = len(state.token_ids) - state.prompt_len
        return [*answer[said + (said > 0) :], *[1] * LEVELS][:LEVELS]

    def launch_propose(self, plan: RoundPlan, tables: BatchTables) -> Proposal:
        assert isinstance(plan.shape, Drafts) and tables.lower is not None
        self.runs.append(tables.lower)
        self.proposals.append(self._trick(self, plan.shape, tables.lower))
        return self.proposals[-1]

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
        self.num_accepted += int(report.accept_length.clip(0).sum())


Trick = Callable[[LaunchedSelfDrafter, Drafts, LaunchedRun], Proposal]


def run_levels(drafts: Drafts, run: LaunchedRun, count: int = LEVELS) -> None:
    run.launch()
    for level in range(count):
        run.launch(drafts.tokens[:, level])


# --- what it runs, and what it proposes -----------------------------------------------------------


def honest(me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun) -> Proposal:
    run_levels(drafts, run)
    return run.proposal(drafts.num_nodes)


def runs_what_is_nothing(me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun) -> Proposal:
    """Tokens that there are not: what they point to are lengths and addresses."""
    run.launch()
    for level in range(LEVELS):
        run.launch(run.levels[level].rows.ancestors.view(torch.int32)[:, 0, 0])
    return run.proposal(drafts.num_nodes)


def closes_a_level(me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun) -> Proposal:
    """And says that it was run."""
    run.launch(is_open=drafts.closed)
    for level in range(LEVELS):
        run.launch(drafts.tokens[:, level], drafts.closed if level == 1 else None)
    return run.proposal(drafts.num_nodes)


def writes_to_what_it_sees(me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun) -> Proposal:
    """By a kernel, which torch does not see: tokens, parents and where rows stand."""
    run.launch()
    for level in range(LEVELS):
        here = run.launch(drafts.tokens[:, level])
        for ids in (here.rows.depth[:, 0], here.rows.ancestors.view(torch.int32)[:, 0, 0]):
            ops.embed(drafts.closed, me._model.weights.embed, drafts.rows, ids=ids)
    proposal = run.proposal(drafts.num_nodes)
    for ids in (proposal.draft_tokens[:, 1], proposal.parents[:, 2]):
        ops.embed(drafts.num_nodes, me._model.weights.embed, drafts.rows, ids=ids)
    return proposal


def proposes_what_it_did_not_run(
    me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun
) -> Proposal:
    run_levels(drafts, run)
    run.proposal(drafts.num_nodes)
    return Proposal(drafts.whole, drafts.parents, drafts.num_nodes)


def runs_fewer_levels(me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun) -> Proposal:
    run_levels(drafts, run, LEVELS - 1)
    with pytest.raises(ValueError, match="proposal: expected 4 levels, got 3"):
        run.proposal(drafts.num_nodes)
    return Proposal(drafts.whole, drafts.parents, drafts.num_nodes)


def proposes_the_round_before(
    me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun
) -> Proposal:
    run_levels(drafts, run)
    made = run.proposal(drafts.num_nodes)
    fitting = [p for p in me.proposals if len(p.num_nodes) == len(drafts.closed)]
    return fitting[0] if fitting else made


def launches_the_round_before(
    me: LaunchedSelfDrafter, drafts: Drafts, run: LaunchedRun
) -> Proposal:
    for other in me.runs:
        if other is not run:
            with pytest.raises(ValueError, match="launch: expected at most 0 levels"):
                other.launch()
    run_levels(drafts, run)
    with pytest.raises(ValueError, match="launch: expected at most 4 levels"):
        run.launch(drafts.tokens[:, 0])
    return run.proposal(drafts.num_nodes)


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
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch that was made, whether verification began behind the layers that it ran."""
    raise_what_drafters_raise(monkeypatch)
    seen: list[bool] = []
    take = LaunchedRun.taken

    def listen(self: LaunchedRun, proposal: Proposal) -> Proposal | None:
        chains = take(self, proposal)
        seen.append(chains is not None)
        return chains

    monkeypatch.setattr(LaunchedRun, "taken", listen)
    return seen


@pytest.mark.parametrize(
    ("trick", "is_taken"),
    [
        (honest, {True}),
        (closes_a_level, {True}),
        (writes_to_what_it_sees, {True}),
        (runs_fewer_levels, {False}),
        (proposes_the_round_before, {True, False}),
        pytest.param(runs_what_is_nothing, {True}, marks=pytest.mark.slow),
        pytest.param(launches_the_round_before, {True}, marks=pytest.mark.slow),
        pytest.param(proposes_what_it_did_not_run, {False}, marks=pytest.mark.slow),
    ],
)
def test_a_text_is_what_plain_decoding_says(
    loaded: Loaded,
    gpu: Device,
    taken: list[bool],
    caplog: pytest.LogCaptureFixture,
    trick: Trick,
    is_taken: set[bool],
) -> None:
    model = loaded.on(gpu)
    if str(gpu) not in loaded.answers:
        loaded.answers[str(gpu)] = texts(make_engine(model).generate(PROMPTS, PARAMS))
    expected = loaded.answers[str(gpu)]
    answers = {tuple(p): [*ids, 1] for p, ids in zip(PROMPTS, expected, strict=True)}
    drafter = LaunchedSelfDrafter(model, answers, trick)
    assert texts(make_engine(model, drafter).generate(PROMPTS, PARAMS)) == expected
    assert set(taken) == is_taken and not caplog.messages
    if trick is honest:
        assert drafter.num_accepted > 3
