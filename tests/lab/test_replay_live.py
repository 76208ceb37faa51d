"""Replay against the engine itself, with an EESD drafter: the same rounds, one for one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.draft.base import Budget
from specrt.draft.eesd.checkpoint import load_exit, read_exit
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.lab.record import measure_costs, measuring_control, record
from specrt.lab.replay import simulate
from specrt.lab.trace import Trace, TraceModels, read_trace, write_trace
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import Proposal, SequenceState
from tests.engine.exits import EXIT_LAYER, make_exit_pair
from tests.engine.support import make_engine, prompts

VOCAB, MAX_DRAFT = 97, 6
MODELS = TraceModels("target", "t0", "exit", "d0", EXIT_LAYER, "float32", MAX_DRAFT)
COSTS = DraftCosts(fixed=0.2, step=0.3, lower=0.4, verify=2.0, row=0.1)
GREEDY = SamplingParams(max_new_tokens=50, seed=5)
SAMPLED = SamplingParams(max_new_tokens=50, temperature=0.9, top_p=0.95, seed=5)
PROMPTS = prompts(7, VOCAB)
KINDS = {
    "fixed": ControlOptions("fixed", MAX_DRAFT, draft_len=3),
    "threshold": ControlOptions("threshold", MAX_DRAFT, threshold=0.1),
    "adaptive-threshold": ControlOptions("adaptive-threshold", MAX_DRAFT, adapt_rate=0.2),
    "beta-ts": ControlOptions("beta-ts", MAX_DRAFT),
    "calibration-ts": ControlOptions("calibration-ts", MAX_DRAFT),
    "cost-aware": ControlOptions("cost-aware", MAX_DRAFT),
}


class Exit:
    """A target and its exit, in memory once."""

    def __init__(self, folder: Path) -> None:
        target, directory = make_exit_pair(folder)
        config = ModelConfig.from_directory(target)
        weights = load_weights(target, config, torch.float32)
        self.model = LlamaModel(config, weights)
        loaded = read_exit(directory, config)
        exit_weights = load_exit(directory, loaded, weights)
        self.exit_model = ExitModel(loaded, exit_weights, self.model)

    def drafter(self, options: ControlOptions, costs: DraftCosts | None = COSTS) -> EesdDrafter:
        return EesdDrafter(self.exit_model, options, costs=costs)


class Watched:
    """An EESD drafter, and how long each of its chains was, by prompt."""

    def __init__(self, inner: EesdDrafter) -> None:
        self.taps = inner.taps
        self.start, self.prefill = inner.start, inner.prefill
        self.observe, self.finish = inner.observe, inner.finish
        self.costs = inner.costs
        self.lengths: dict[tuple[int, ...], list[int]] = {}
        self._inner = inner

    def propose(self, states: list[SequenceState], budget: Budget) -> Proposal:
        tree = self._inner.propose(states, budget)
        for state, size in zip(states, tree.num_nodes.tolist(), strict=True):
            prompt = tuple(state.token_ids[: state.prompt_len])
            self.lengths.setdefault(prompt, []).append(size - 1)
        return tree


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Exit:
    return Exit(tmp_path_factory.mktemp("exit"))


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def sampling(request: pytest.FixtureRequest) -> SamplingParams:
    chosen: SamplingParams = request.param
    return chosen


@pytest.fixture(scope="module")
def trace(exits: Exit, sampling: SamplingParams, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Read back from a file."""
    engine = make_engine(exits.model, exits.drafter(KINDS["fixed"]), max_batch=4)
    greedy, sampled = exits.exit_model.slope.tolist()
    slope = (greedy, sampled)
    made = record(engine, PROMPTS, sampling, MODELS, task="letters", slope=slope, costs=COSTS)
    file = tmp_path_factory.mktemp("trace") / "trace.jsonl.gz"
    write_trace(file, made)
    return read_trace(file)


def test_a_recording_says_what_plain_decoding_says(
    exits: Exit, sampling: SamplingParams, trace: Trace
) -> None:
    plain = make_engine(exits.model).generate(PROMPTS, sampling)
    assert [list(one.token_ids) for one in trace.sequences] == [one.token_ids for one in plain]
    assert len({one.finish_reason for one in plain}) == 2, "no output ended early"


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_replay_does_what_the_engine_did(
    exits: Exit, sampling: SamplingParams, trace: Trace, options: ControlOptions
) -> None:
    drafter = Watched(exits.drafter(options))
    engine = make_engine(exits.model, drafter, max_batch=1 if options.shares else 4)
    results = engine.generate(PROMPTS, sampling)
    replayed = simulate([trace], options)
    for result, rounds in zip(results, replayed, strict=True):
        assert drafter.lengths[tuple(result.prompt_token_ids)] == rounds.verified.tolist()
        assert result.stats.accept_lengths == rounds.accepted.tolist()
    drafted = [length for rounds in replayed for length in rounds.verified.tolist()]
    assert len(set(drafted)) > 2, "one length is no test"


def test_no_controller_hears_of_rounds_without_room(exits: Exit) -> None:
    """Many short outputs, whose last rounds may draft nothing, and one posterior for all."""
    many, few = prompts(60, VOCAB, seed=1), replace(SAMPLED, max_new_tokens=6, ignore_eos=True)
    engine = make_engine(exits.model, exits.drafter(KINDS["fixed"]))
    greedy, sampled = exits.exit_model.slope.tolist()
    short = record(engine, many, few, MODELS, task="", slope=(greedy, sampled), costs=COSTS)
    for max_draft in (1, 2, 3):
        options = ControlOptions("cost-aware", max_draft)
        results = make_engine(exits.model, exits.drafter(options), max_batch=1).generate(many, few)
        for result, rounds in zip(results, simulate([short], options), strict=True):
            assert result.stats.accept_lengths == rounds.accepted.tolist()
            assert result.stats.num_draft_tokens == rounds.verified.sum()


def test_engines_may_share_a_drafter(exits: Exit, sampling: SamplingParams) -> None:
    """Steps are recorded over a target's cache, and a recording has an engine of its own."""
    plain = [one.token_ids for one in make_engine(exits.model).generate(PROMPTS, sampling)]
    drafter = exits.drafter(KINDS["fixed"])
    engines = [make_engine(exits.model, drafter, max_batch=4) for _ in range(2)]
    for engine in engines * 2:
        assert [one.token_ids for one in engine.generate(PROMPTS, sampling)] == plain


def test_measured_costs_are_times(exits: Exit, sampling: SamplingParams) -> None:
    control = measuring_control(MAX_DRAFT)
    drafter = Watched(exits.drafter(control, costs=None))
    engine = make_engine(exits.model, drafter)
    costs = measure_costs(engine, [3, 4, 5], sampling)
    for name, value in asdict(costs).items():
        assert 0 <= value < 1000, name  # a line through times of a busy machine may be level
    assert min(costs.step, costs.lower, costs.verify) > 0
    # Chains of many lengths, or the time of a row could not be told from that of a round.
    assert {0, 1, MAX_DRAFT} <= set(drafter.lengths[3, 4, 5])
    given = make_engine(exits.model, exits.drafter(control))
    assert measure_costs(given, [3, 4, 5], sampling) == COSTS
