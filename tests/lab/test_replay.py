"""Replay: what a controller did live, it does on the trace; times and regret by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specrt.draft.length.control import ControlOptions, ControlRound
from specrt.draft.length.costs import DraftCosts
from specrt.lab.record import record
from specrt.lab.replay import ALL_TASKS, PLAIN, Replay, Rounds, compare, simulate
from specrt.lab.trace import Trace, TraceHeader, TraceModels, TraceSequence
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import GenerationError, SequenceState
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.engine.chains import COSTS, SLOPE, ChainDrafter, ControlledDrafter
from tests.engine.support import make_engine, make_model, prompts

VOCAB = 97
MAX_DRAFT = 6
MODELS = TraceModels("target", "t0", "drafter", "d0", 2, "float32", MAX_DRAFT)
GREEDY = SamplingParams(max_new_tokens=40, seed=5)
SAMPLED = SamplingParams(max_new_tokens=40, temperature=0.9, top_p=0.95, seed=5)
KINDS = {
    "fixed": ControlOptions("fixed", MAX_DRAFT, draft_len=3),
    "short cap": ControlOptions("fixed", 4, draft_len=4),
    "threshold": ControlOptions("threshold", MAX_DRAFT),
    "adaptive-threshold": ControlOptions("adaptive-threshold", MAX_DRAFT, adapt_rate=0.2),
    "beta-ts": ControlOptions("beta-ts", MAX_DRAFT),
    "calibration-ts": ControlOptions("calibration-ts", MAX_DRAFT),
    "cost-aware": ControlOptions("cost-aware", MAX_DRAFT),
    "cost-aware, apart": ControlOptions("cost-aware", MAX_DRAFT, is_shared=False),
}
Answers = dict[tuple[int, ...], list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return make_model(path)


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def sampling(request: pytest.FixtureRequest, model: LlamaModel) -> SamplingParams:
    """With a stop token that ends some outputs early, and not all."""
    chosen = {"greedy": GREEDY, "sampled": SAMPLED}[request.param]
    free = replace(chosen, ignore_eos=True)
    said = [one.token_ids for one in make_engine(model).generate(prompts(6, VOCAB), free)]
    ends = next(
        token
        for token in range(VOCAB)
        if sum(token in ids[8:] for ids in said) > 1 and not all(token in ids for ids in said)
    )
    return replace(free, stop_token_ids=[ends])


@pytest.fixture(scope="module")
def answers(model: LlamaModel, sampling: SamplingParams) -> Answers:
    """What the target says, past its stop token too."""
    free = replace(sampling, stop_token_ids=None)
    results = make_engine(model).generate(prompts(6, VOCAB), free)
    return {tuple(one.prompt_token_ids): one.token_ids for one in results}


@pytest.fixture(scope="module")
def trace(model: LlamaModel, sampling: SamplingParams, answers: Answers) -> Trace:
    engine = make_engine(model, ChainDrafter(answers, VOCAB, MAX_DRAFT), max_batch=4)
    return record(engine, list(answers), sampling, MODELS, task="letters", slope=SLOPE, costs=COSTS)


# --- against the engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_replay_does_what_the_engine_did(
    model: LlamaModel,
    sampling: SamplingParams,
    answers: Answers,
    trace: Trace,
    options: ControlOptions,
) -> None:
    drafter = ControlledDrafter(answers, VOCAB, options)
    engine = make_engine(model, drafter, max_batch=1 if options.shares else 4)
    results = engine.generate(list(answers), sampling)
    for result, rounds in zip(results, simulate([trace], options), strict=True):
        live = drafter.rounds[tuple(result.prompt_token_ids)]
        assert result.stats.accept_lengths == rounds.accepted.tolist()
        assert live == list(zip(rounds.drafted.tolist(), rounds.verified.tolist(), strict=True))
        assert rounds.emitted.sum() == len(result.token_ids)
        assert len(rounds.ms) + rounds.accepted.sum() == len(result.token_ids)


def test_a_recording_has_every_output_and_what_lies_behind(
    model: LlamaModel, sampling: SamplingParams, answers: Answers, trace: Trace
) -> None:
    results = make_engine(model).generate(list(answers), sampling)
    assert len({len(result.token_ids) for result in results}) > 1, "no output was stopped"
    for index, (result, sequence) in enumerate(zip(results, trace.sequences, strict=True)):
        prompt = tuple(result.prompt_token_ids)
        assert (sequence.task, sequence.index, sequence.seed) == ("letters", index, 5)
        assert (sequence.prompt_len, sequence.max_len) == (len(prompt), len(prompt) + 40)
        assert list(sequence.token_ids) == result.token_ids
        known = sequence.token_ids + sequence.overrun_ids
        assert list(known) == answers[prompt][: len(result.token_ids) + MAX_DRAFT - 1]
        assert sequence.lengths.tolist() == [
            min(MAX_DRAFT, 40 - place - 1) for place in range(len(result.token_ids))
        ]


def test_the_row_of_the_calibration_head_is_the_temperatures(
    model: LlamaModel, sampling: SamplingParams, answers: Answers, trace: Trace
) -> None:
    drafter, ids = ChainDrafter(answers, VOCAB, MAX_DRAFT), list(next(iter(answers)))
    state = SequenceState(ids, len(ids), len(ids) + 2, seed=5, temperature=sampling.temperature)
    said, first = drafter.chains([state], 1).evidence[0, 0], trace.sequences[0]
    mode = int(sampling.temperature > 0)
    assert first.evidence[0, 0] == said[mode]
    assert first.evidence[0, 0] != said[1 - mode]


def test_sequences_together_are_sequences_alone(trace: Trace) -> None:
    for options in KINDS.values():
        if options.shares:
            continue
        together = simulate([trace], options)
        alone = [
            rounds
            for sequence in trace.sequences
            for rounds in simulate([replace(trace, sequences=(sequence,))], options)
        ]
        for one, other in zip(together, alone, strict=True):
            assert np.array_equal(one.drafted, other.drafted)
            assert np.array_equal(one.accepted, other.accepted)


# --- recording ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "num_prompts", "max_draft", "named"),
    [
        (GREEDY, 0, 4, "prompts: expected at least one"),
        (replace(GREEDY, seed=None), 1, 4, "seed: expected one"),
        (replace(GREEDY, repetition_penalty=1.1), 1, 4, "no penalties"),
        (GREEDY, 1, 0, "max_draft: expected 1..15"),
        (GREEDY, 1, 16, "max_draft: expected 1..15"),
    ],
)
def test_what_cannot_be_recorded(
    model: LlamaModel, sampling: SamplingParams, num_prompts: int, max_draft: int, named: str
) -> None:
    engine = make_engine(model, ChainDrafter({}, VOCAB, 4), max_nodes=16)
    models = replace(MODELS, max_draft=max_draft)
    with pytest.raises(ValueError, match=named):
        record(engine, [[3]] * num_prompts, sampling, models, task="", slope=SLOPE, costs=COSTS)


def test_a_failed_sequence_is_no_recording(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    engine = make_engine(make_model(tmp_path), ChainDrafter({(3,): []}, VOCAB, 4))
    with pytest.raises(GenerationError, match="prompt 1: logits: NaN"):
        record(engine, [[3]], GREEDY, MODELS, task="", slope=SLOPE, costs=COSTS)


# --- by hand --------------------------------------------------------------------------------------


def handmade(chains: list[list[int]], token_ids: list[int], **changes: object) -> Trace:
    """A trace of one sequence whose every score is 0."""
    width = max(map(len, chains))
    drafts = np.full((len(chains), width), -1, dtype=np.int32)
    for row, chain in enumerate(chains):
        drafts[row, : len(chain)] = chain
    zeros = np.where(drafts >= 0, 0.0, np.nan).astype(np.float32)
    values: dict[str, object] = {
        "task": "hand",
        "index": 0,
        "seed": 0,
        "prompt_len": 3,
        "max_len": 3 + len(token_ids),
        "overrun_ids": (),
        "scores": zeros,
        "evidence": zeros,
    }
    values.update(changes)
    sequence = TraceSequence(token_ids=tuple(token_ids), draft_tokens=drafts, **values)  # type: ignore[arg-type]
    header = TraceHeader(replace(MODELS, max_draft=width), 0.0, 0, 1.0, 0.0, COSTS, SLOPE)
    return Trace(header, (sequence,))


#            right, right | right, wrong | wrong | right (and no room for more) | nothing
CHAINS = [[11, 12], [12, 99], [98, 14], [14], []]
TOKENS = [11, 12, 13, 14, 15]


def fixed(length: int) -> ControlOptions:
    return ControlOptions("fixed", length, draft_len=length)


def lists(rounds: Rounds) -> list[list[int]]:
    return [part.tolist() for part in (rounds.drafted, rounds.accepted, rounds.emitted)]


def test_rounds_and_times_by_hand() -> None:
    trace = handmade(CHAINS, TOKENS)
    (one,) = simulate([trace], fixed(1))
    # Root 0 accepts 11; root 2 drafts 98 for 13, in vain; root 3 accepts 14.
    assert lists(one) == [[1, 1, 1], [1, 0, 1], [2, 1, 2]]
    plain = COSTS.verify + COSTS.lower
    drafted = COSTS.fixed + COSTS.step + COSTS.row
    assert one.ms.tolist() == pytest.approx([plain + drafted] * 3)
    (two,) = simulate([trace], fixed(2))
    assert lists(two) == [[2, 1], [2, 1], [3, 2]]
    more = COSTS.step + COSTS.row
    assert two.ms.tolist() == pytest.approx([plain + drafted + more, plain + drafted])


def test_controllers_learn_from_what_lies_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not counted, for it is not emitted."""
    learned: list[int] = []
    monkeypatch.setattr(ControlRound, "update", lambda *args: learned.extend(args[-1]))
    trace = handmade([[11, 12], [12, 13]], [11, 12], max_len=20, overrun_ids=(13,))
    (rounds,) = simulate([trace], fixed(1))
    assert lists(rounds) == [[1], [1], [2]]
    chains = [[7, 12, 13], [12, 13, 14], [13, 14, 15]]
    trace = handmade(chains, [11, 12, 13], max_len=20, overrun_ids=(14, 16))
    (rounds,) = simulate([trace], fixed(3))
    assert lists(rounds) == [[3, 3], [0, 1], [1, 2]]
    trace = handmade(chains, [11, 12, 13], max_len=20)
    assert lists(*simulate([trace], fixed(3))) == [[3, 3], [0, 1], [1, 2]]
    assert learned == [1, 0, 3, 0, 2]


def test_a_controller_may_not_draft_more_than_was_recorded() -> None:
    with pytest.raises(ValueError, match="max_draft: expected at most the traces' 2, got 3"):
        simulate([handmade(CHAINS, TOKENS)], fixed(3))


# --- regret ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replay(trace: Trace) -> Replay:
    """Two tasks between which the best length differs, since drafting costs more in one."""
    dear = replace(trace.header, costs=DraftCosts(0.5, 1.5, 0.25, 2.0, 0.5))
    renamed = tuple(replace(one, task="dear") for one in trace.sequences[:4])
    traces = [trace, Trace(dear, renamed)]
    return compare(traces, {name: KINDS[name] for name in ("beta-ts", "cost-aware")})


def test_regret_is_against_the_best_fixed_length_of_each_task(replay: Replay) -> None:
    assert set(replay.fixed) == {PLAIN, *(f"fixed-{k}" for k in range(1, MAX_DRAFT + 1))}
    bests = set()
    for task in (*replay.tasks, ALL_TASKS):
        times = {name: replay.outcomes[name][task].ms for name in replay.fixed}
        best = replay.best_fixed(task)
        bests.add(best)
        assert times[best] == min(times.values())
        assert replay.regret_ms(best, task) == replay.regret_share(best, task) == 0.0
        for name, by_task in replay.outcomes.items():
            outcome = by_task[task]
            assert outcome.num_tokens == replay.outcomes[PLAIN][task].num_tokens
            lost = replay.regret_ms(name, task) * outcome.num_tokens
            assert lost == pytest.approx(outcome.ms - times[best])
            assert replay.regret_share(name, task) == pytest.approx(lost / times[best])
            assert replay.speedup(name, task) == pytest.approx(times[PLAIN] / outcome.ms)
            assert outcome.num_rounds + outcome.num_accepted == outcome.num_tokens
            assert outcome.tau == outcome.num_tokens / outcome.num_rounds
    assert len(bests) > 1, "the tasks do not differ"


def test_all_tasks_are_the_sum_of_tasks(replay: Replay) -> None:
    for by_task in replay.outcomes.values():
        for part in ("num_tokens", "num_rounds", "num_drafted", "num_verified", "num_accepted"):
            parts = [getattr(by_task[task], part) for task in replay.tasks]
            assert getattr(by_task[ALL_TASKS], part) == sum(parts)
        times = [by_task[task].ms for task in replay.tasks]
        assert by_task[ALL_TASKS].ms == pytest.approx(sum(times))


def test_a_task_does_not_depend_on_the_tasks_before(trace: Trace, replay: Replay) -> None:
    alone = compare([trace], {"cost-aware": KINDS["cost-aware"]})
    (task,) = alone.tasks
    assert alone.outcomes["cost-aware"][task].ms == replay.outcomes["cost-aware"][task].ms


def test_the_curve_ends_at_the_regret(replay: Replay) -> None:
    for task in replay.tasks:
        for name in replay.outcomes:
            tokens, lost = replay.regret_curve(name, task, num_points=50)
            outcome = replay.outcomes[name][task]
            assert (len(tokens), tokens[0], lost[0]) == (50, 0.0, 0.0)
            assert tokens[-1] == outcome.num_tokens
            assert lost[-1] == pytest.approx(
                replay.regret_ms(name, task) * outcome.num_tokens, abs=1e-9
            )


def test_draws_are_other_draws_of_the_same_rule(trace: Trace) -> None:
    names = ("threshold", "beta-ts", "cost-aware")
    replay = compare([trace], {name: KINDS[name] for name in names}, num_draws=3)
    (task,) = replay.tasks
    for name in replay.outcomes:
        draws = replay.regret_draws(name, task)
        assert len(draws) == (3 if name in names else 1)
        assert draws[0] == pytest.approx(replay.regret_share(name, task))
        assert len(set(draws.tolist())) == (3 if name in names[1:] else 1)
    (first, *_), (again, *_) = (simulate([trace], KINDS["beta-ts"], draw) for draw in (0, 0))
    assert np.array_equal(first.drafted, again.drafted)
    with pytest.raises(ValueError, match="num_draws: expected at least 1, got 0"):
        compare([trace], {}, num_draws=0)


def test_another_temperature_is_another_task(trace: Trace) -> None:
    warm = replace(trace, header=replace(trace.header, temperature=0.25))
    cold = replace(trace, header=replace(trace.header, temperature=0.0))
    assert compare([warm, cold, cold], {}).tasks == ("letters at 0.25", "letters")


def test_a_task_may_be_called_as_their_sum_is(trace: Trace) -> None:
    named = replace(trace, sequences=tuple(replace(s, task=ALL_TASKS) for s in trace.sequences))
    both = compare([trace, named], {})
    assert both.tasks[1] != ALL_TASKS
    alone = compare([trace], {}).outcomes[PLAIN][ALL_TASKS].num_tokens
    assert both.num_tokens(both.tasks[1]) == alone
    assert both.num_tokens(ALL_TASKS) == 2 * alone
