"""Draft control as a drafter uses it: options, each rule's behaviour, and many simulated rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from specrt.draft.length.control import CONTROLLERS, ControlOptions, DraftControl, parse_control
from specrt.draft.length.costs import DraftCosts
from specrt.ops.graph import CpuGraph
from specrt.types import SequenceState

COSTS = DraftCosts(fixed=0.06, step=0.2, lower=0.12, verify=0.9, row=0.07)
CHEAP = DraftCosts(fixed=0.02, step=0.08, lower=0.05, verify=0.95, row=0.03)
DEAR = DraftCosts(fixed=0.05, step=0.3, lower=0.25, verify=0.75, row=0.15)
LEARNING = CONTROLLERS[2:]


def sequence(length: int = 9, seed: int = 0, temperature: float = 0.0, left=10**6) -> SequenceState:
    return SequenceState([0] * length, length, length + left, seed, temperature)


class Run:
    """Sequences under one controller; confidences are given as such."""

    def __init__(
        self, options: ControlOptions, states: Sequence[SequenceState], costs: DraftCosts = COSTS
    ) -> None:
        self.control, self.states, self.costs = DraftControl(options), list(states), costs
        self.round = self.control.new_round(len(self.states))
        for state in states:
            self.control.start(state)

    def draft(self, confidence: np.ndarray) -> np.ndarray:
        """``[B, steps]`` confidences to ``[B]`` tokens to verify."""
        scores = torch.from_numpy(np.log(confidence.astype(np.float32)))
        self.round.stage(self.control, self.states, self.costs)
        self.round.decide(0)
        for step in range(1, scores.shape[1] + 1):
            if self.round.is_open.any():
                self.round.decide(step, scores[:, step - 1])
        return self.round.length.copy()

    def verify(self, agrees: np.ndarray) -> np.ndarray:
        """``[B, steps]`` whether the target agrees, to ``[B]`` accepted tokens."""
        lengths = self.round.length
        accepted = agrees.astype(int).cumprod(axis=1).sum(axis=1)
        accepted = np.minimum(accepted, lengths)
        self.round.update(self.control, self.states, accepted.tolist())
        for state, count in zip(self.states, accepted.tolist(), strict=True):
            state.token_ids += [0] * (count + 1)
        return accepted


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("kind: expected one of fixed, threshold", {"kind": "beta"}),
        ("max_draft: expected an int in 1..62, got 0", {"max_draft": 0}),
        ("max_draft: expected", {"max_draft": 63}),
        ("max_draft: expected", {"max_draft": 2.5}),
        ("draft_len: expected", {"draft_len": 0}),
        ("draft_len: expected an int in 1..3", {"kind": "fixed", "draft_len": 4, "max_draft": 3}),
        ("threshold: expected", {"threshold": -0.1}),
        ("threshold: expected", {"threshold": math.nan}),
        ("adapt_rate: expected", {"adapt_rate": 1.1}),
        ("target_rejection: expected", {"target_rejection": 2}),
        ("prior: expected two numbers > 0", {"prior": (0.0, 1.0)}),
        ("prior: expected", {"prior": (1.0, -1.0)}),
        ("prior: expected two numbers > 0, got 1.0", {"prior": 1.0}),
        ("prior: expected two numbers > 0", {"prior": (1.0,)}),
        ("prior: expected", {"prior": ("a", 1.0)}),
        ("bias_prior: expected", {"bias_prior": None}),
        ("threshold: expected a number", {"threshold": "x"}),
        ("noise_var: expected a number", {"noise_var": None}),
        ("discount: expected None or a number", {"discount": "x"}),
        ("prior: expected", {"prior": (math.nan, 1.0)}),
        ("bias_prior: expected", {"bias_prior": (0.0, 0.0)}),
        ("bias_prior: expected", {"bias_prior": (math.inf, 1.0)}),
        ("noise_var: expected", {"noise_var": 0}),
        ("discount: expected None or a number in", {"discount": 0.0}),
        ("discount: expected", {"discount": 1.01}),
    ],
)
def test_options_refuse(match: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=match):
        ControlOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fixed", "step", "lower", "verify", "row"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_costs_refuse(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected milliseconds >= 0"):
        replace(COSTS, **{name: value})


def test_a_plain_round_takes_time() -> None:
    with pytest.raises(ValueError, match="lower, verify: expected a plain round's time > 0"):
        DraftCosts(fixed=0, step=1, lower=0, verify=0, row=0)


def test_the_time_of_a_round() -> None:
    """The lower layers of the last token run only if it is verified."""
    assert COSTS.plain_ms() == COSTS.round_ms(0, 0) == pytest.approx(1.02)
    assert COSTS.round_ms(1, 1) == pytest.approx(0.06 + 0.2 + 0.12 + 0.9 + 0.07)
    assert COSTS.round_ms(3, 3) == pytest.approx(0.06 + 0.6 + 0.12 + 0.9 + 0.21)
    assert COSTS.round_ms(3, 2) == pytest.approx(0.06 + 0.6 + 0.9 + 0.14)


def test_a_fixed_length_is_bound_by_the_cap_of_its_kind_alone() -> None:
    assert ControlOptions("beta-ts", max_draft=2).draft_len == 4


def test_rules_have_names() -> None:
    assert parse_control("fixed-3") == ControlOptions("fixed", draft_len=3)
    assert parse_control("fixed-62").max_draft == 62
    for kind in CONTROLLERS[1:]:
        assert parse_control(kind) == ControlOptions(kind)
    for name in ("fixed", "fixed-0", "fixed-63", "fixed--1", "fixed-²", "Beta-TS", "", "-4"):
        with pytest.raises(ValueError, match="controller: expected one of fixed-1 .. fixed-62, "):
            parse_control(name)


# --- the baselines --------------------------------------------------------------------------------


def test_fixed_drafts_what_it_is_told() -> None:
    run = Run(ControlOptions("fixed", draft_len=3), [sequence(), sequence(4)])
    assert run.draft(np.full((2, 8), 0.01)).tolist() == [3, 3]
    assert np.isnan(run.round.confidence[:, 3:]).all()
    assert run.round.confidence[:, :3] == pytest.approx(0.01)


def test_threshold_goes_on_while_the_last_token_is_sure() -> None:
    run = Run(ControlOptions("threshold", threshold=0.6, max_draft=5), [sequence()] * 1)
    row = np.array([[0.9, 0.61, 0.59, 0.9, 0.9]])
    assert run.draft(row).tolist() == [3]
    assert run.draft(np.full((1, 5), 0.6)).tolist() == [5]  # at least; then the cap
    assert run.draft(np.full((1, 5), 0.1)).tolist() == [1]


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_the_adaptive_threshold_settles_at_its_share_of_rejections(target: float) -> None:
    """64 sequences, 400 rounds after 400 to settle: the standard error is about 0.003."""
    rng = np.random.default_rng(0)
    options = ControlOptions("adaptive-threshold", target_rejection=target, adapt_rate=0.05)
    run = Run(options, [sequence(seed=n) for n in range(64)])
    rejected = []
    for number in range(800):
        chance = rng.uniform(0.7, 1.0, (64, 8))  # the first token is drafted in any case
        lengths = run.draft(chance)
        accepted = run.verify(rng.random((64, 8)) < chance)
        if number >= 400:
            rejected.append(accepted < lengths)
    assert np.mean(rejected) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_no_more_than_the_sequence_has_room_for(kind: str) -> None:
    """One of k tokens left drafts k - 1: the bonus token takes the last place."""
    options = ControlOptions(kind, threshold=0.1, prior=(1e6, 1.0), bias_prior=(0.0, 1e-9))
    states = [sequence(left=left) for left in (0, 1, 2, 3)]
    run = Run(options, states, replace(COSTS, step=1e-6, row=1e-6, fixed=0.0))
    for state in states:
        state.seed = next(s for s in range(99) if drafts_at(options, s))
    assert run.draft(np.full((4, 8), 0.99)).tolist() == [0, 0, 1, 2]


def drafts_at(options: ControlOptions, seed: int) -> bool:
    return bool(Run(options, [sequence(seed=seed)]).draft(np.full((1, 1), 0.99))[0])


# --- Thompson sampling ----------------------------------------------------------------------------


def test_beta_ts_lengths_follow_the_posterior() -> None:
    """P(a second token) is the posterior's mean; of 4000 rounds its standard error is 0.007."""
    for prior, mean in (((1.0, 1.0), 0.5), ((0.5, 1.5), 0.25), ((80.0, 20.0), 0.8)):
        options = ControlOptions("beta-ts", prior=prior, max_draft=3)
        run = Run(options, [sequence(seed=n) for n in range(4000)])
        lengths = run.draft(np.full((4000, 3), 0.5))
        assert lengths.min() == 1
        assert np.mean(lengths >= 2) == pytest.approx(mean, abs=0.03)
        assert np.mean(lengths >= 3) == pytest.approx(mean * mean, abs=0.03)


def test_calibration_ts_lengths_follow_the_corrected_confidence() -> None:
    options = ControlOptions("calibration-ts", bias_prior=(-0.2, 1e-4), max_draft=2)
    for confidence, share in ((0.9, 0.7), (0.5, 0.3), (0.15, 0.0)):
        run = Run(options, [sequence(seed=n) for n in range(4000)])
        lengths = run.draft(np.full((4000, 2), confidence))
        assert np.mean(lengths == 2) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("chance", [0.3, 0.9])
def test_beta_ts_learns_the_acceptance(chance: float) -> None:
    rng = np.random.default_rng(1)
    run = Run(ControlOptions("beta-ts"), [sequence()])
    for _ in range(600):
        run.draft(np.full((1, 8), 0.5))
        run.verify(rng.random((1, 8)) < chance)
    belief = run.control.posterior(run.states[0])
    assert belief.alpha / (belief.alpha + belief.beta) == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("kind", ["calibration-ts", "cost-aware"])
def test_the_bias_of_the_confidence_is_learned(kind: str) -> None:
    rng = np.random.default_rng(2)
    run = Run(ControlOptions(kind), [sequence()], CHEAP)
    for _ in range(900):
        chance = rng.uniform(0.3, 0.7, (1, 8))
        run.draft(chance + 0.25)
        run.verify(rng.random((1, 8)) < chance)
    belief = run.control.posterior(run.states[0])
    assert belief.bias_mean == pytest.approx(-0.25, abs=0.08)
    assert belief.bias_var < 0.01


def test_a_discount_forgets() -> None:
    """Without one, 300 rounds of the other kind do not turn the belief; with one they do."""
    means = []
    for discount in (None, 0.95):
        run = Run(ControlOptions("beta-ts", discount=discount, max_draft=1), [sequence()])
        for is_good in [True] * 900 + [False] * 300:
            run.draft(np.full((1, 1), 0.5))
            run.verify(np.full((1, 1), is_good))
        belief = run.control.posterior(run.states[0])
        means.append(belief.alpha / (belief.alpha + belief.beta))
    assert means[0] == pytest.approx(901 / 1202) and means[1] < 0.06


# --- sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNING)
def test_sequences_learn_for_themselves_or_for_all(kind: str) -> None:
    for is_shared in (False, True):
        run = Run(ControlOptions(kind, is_shared=is_shared), [sequence(), sequence()], CHEAP)
        prior = run.control.posterior(run.states[0])
        while run.draft(np.full((2, 8), 0.7)).min() == 0:
            run.verify(np.ones((2, 8)))
        run.round.update(run.control, run.states, [0, -1])
        first, second = map(run.control.posterior, run.states)
        assert first != prior
        assert (second == first) is is_shared
        later = sequence()
        run.control.start(later)
        assert (run.control.posterior(later) == first) is is_shared


def test_only_cost_aware_shares_by_default() -> None:
    assert [kind for kind in CONTROLLERS if ControlOptions(kind).shares] == ["cost-aware"]


def test_a_finished_sequence_is_forgotten() -> None:
    control, state = DraftControl(ControlOptions("beta-ts")), sequence()
    control.start(state)
    control.finish(state)
    control.finish(state)  # an engine may do so after an error
    with pytest.raises(KeyError):
        control.posterior(state)


@pytest.mark.parametrize("kind", LEARNING)
def test_a_failed_sequence_teaches_nothing(kind: str) -> None:
    run = Run(ControlOptions(kind), [sequence()])
    prior = run.control.posterior(run.states[0])
    run.draft(np.full((1, 8), 0.7))
    run.round.update(run.control, run.states, [-1])
    assert str(run.control.posterior(run.states[0])) == str(prior)  # NaN equals itself


@pytest.mark.parametrize("kind", LEARNING)
def test_lengths_depend_on_the_seed_and_not_on_the_batch(kind: str) -> None:
    def lengths(seeds: list[int]) -> dict[int, list[int]]:
        options = ControlOptions(kind, is_shared=False)
        run = Run(options, [sequence(seed=seed, length=5) for seed in seeds], CHEAP)
        rows: list[np.ndarray] = []
        for number in range(20):
            rngs = [np.random.default_rng([number, seed % 997]) for seed in seeds]
            chance = np.array([rng.uniform(0.4, 1.0, 8) for rng in rngs])
            rows.append(run.draft(chance))
            run.verify(np.array([rng.random(8) for rng in rngs]) < chance)
        return {seed: [int(row[b]) for row in rows] for b, seed in enumerate(seeds)}

    seeds = [0, 1, -1, 2**63, 2**64 - 5, 12, 13]
    together = lengths(seeds)
    assert lengths(seeds[::-1]) == together
    assert lengths([12])[12] == together[12]
    assert len({tuple(row) for row in together.values()}) == len(seeds)


def test_the_temperature_chooses_the_heads_row() -> None:
    states = [sequence(temperature=0.0), sequence(temperature=0.7)]
    control = DraftControl(ControlOptions("fixed"))
    for state in states:
        control.start(state)
    round_ = control.new_round(2, slope=torch.tensor([1.0, 0.0]))
    round_.stage(control, states, COSTS)
    round_.decide(0)
    evidence = torch.tensor([[0.0, 9.0], [9.0, math.log(3.0)]])
    round_.decide(1, torch.full((2,), math.log(0.8)), evidence)
    assert round_.confidence[:, 0] == pytest.approx([0.8, 0.75])


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_decisions_can_be_captured(kind: str) -> None:
    states = [sequence(seed=n) for n in range(8)]
    eager = Run(ControlOptions(kind, is_shared=False), states, CHEAP)
    captured = Run(ControlOptions(kind, is_shared=False), states, CHEAP)
    scores = torch.zeros(8, 8)

    def launch() -> None:
        captured.round.decide(0)
        for step in range(1, 9):
            captured.round.decide(step, scores[:, step - 1])

    captured.round.stage(captured.control, states, CHEAP)
    graph = CpuGraph.capture(launch)
    rng = np.random.default_rng(3)
    for _ in range(10):
        chance = rng.uniform(0.3, 1.0, (8, 8)).astype(np.float32)
        scores.copy_(torch.from_numpy(np.log(chance)))
        captured.round.stage(captured.control, states, CHEAP)
        graph.launch()
        assert eager.draft(chance).tolist() == captured.round.length.tolist()
        accepted = np.minimum(rng.integers(0, 4, 8), eager.round.length).tolist()
        for run in (eager, captured):
            run.round.update(run.control, states, accepted)
        for state in states:
            assert str(eager.control.posterior(state)) == str(captured.control.posterior(state))
            state.token_ids += [0, 0]


# --- cost-aware -----------------------------------------------------------------------------------


def settled(options: ControlOptions, costs: DraftCosts, num: int = 64) -> Run:
    """Sequences that have just drafted well, so that none of them pauses."""
    run = Run(options, [sequence(seed=n) for n in range(num)], costs)
    for _ in range(30):
        run.draft(np.full((num, 8), 0.95))
        run.verify(np.ones((num, 8)))
    return run


def test_an_unlikely_last_token_is_dropped_where_a_row_is_dear() -> None:
    confidence = np.array([[0.95, 0.95, 0.02] + [0.95] * 5]).repeat(64, axis=0)
    for costs, kept in ((replace(CHEAP, row=0.3), 2), (replace(CHEAP, row=0.0, lower=0.0), 3)):
        run = settled(ControlOptions("cost-aware", bias_prior=(0.0, 1e-6)), costs)
        lengths = run.draft(confidence)
        assert np.mean((run.round.drafted == 3) & (lengths == kept)) > 0.8


def test_a_dropped_token_teaches_nothing() -> None:
    run = settled(ControlOptions("cost-aware", is_shared=False), replace(CHEAP, row=0.4), num=1)
    state = run.states[0]
    before = run.control.posterior(state)
    assert run.draft(np.full((1, 8), 1e-3)).tolist() == [0] and run.round.drafted.tolist() == [1]
    run.round.update(run.control, run.states, [0])
    after = run.control.posterior(state)
    assert (after.bias_mean, after.next_alpha) == (before.bias_mean, before.next_alpha)
    assert after.gain_mean < before.gain_mean


def test_length_falls_with_the_price_of_a_step() -> None:
    means = []
    for step in (0.02, 0.1, 0.3):
        run = settled(ControlOptions("cost-aware"), replace(CHEAP, step=step))
        means.append(run.draft(np.full((64, 8), 0.85)).mean())
    assert means[0] > means[1] + 0.5 > means[2] + 1.0


@dataclass
class Text:
    """What drafting finds at each place of ``B`` texts: ``[B, T]`` confidences and agreement."""

    confidence: np.ndarray
    agrees: np.ndarray

    @classmethod
    def flat(cls, chance: float, confidence: float, length: int, seed: int = 0) -> Text:
        """Each token with the same chance; the confidence says nothing."""
        rng = np.random.default_rng(seed)
        shape = (_TEXTS, length)
        return cls(np.full(shape, confidence), rng.random(shape) < chance)

    @classmethod
    def uneven(cls, mean: float, length: int, seed: int = 0) -> Text:
        """Easy and hard stretches: the chance's log-odds drift around ``mean`` (deviation 1.5,
        correlation 0.6), and the confidence is the best guess from a noisy look at them."""
        rng = np.random.default_rng(seed)
        level, odds = rng.normal(size=_TEXTS), np.empty((_TEXTS, length))
        for place in range(length):
            level = 0.6 * level + 0.8 * rng.normal(size=_TEXTS)
            odds[:, place] = mean + 1.5 * level
        seen = odds + rng.normal(size=odds.shape)
        guess = mean + (seen - mean) * 1.5**2 / (1.5**2 + 1.0)
        agrees = rng.random(odds.shape) < 1 / (1 + np.exp(-odds))
        return cls(1 / (1 + np.exp(-guess)), agrees)

    def then(self, other: Text) -> Text:
        """One text behind the other."""
        pairs = ((self.confidence, other.confidence), (self.agrees, other.agrees))
        return Text(*(np.concatenate(pair, axis=1) for pair in pairs))


_TEXTS, _CAP, _TOKENS = 24, 8, 1000


@dataclass
class Trace:
    """``[rounds, B]``: where each round began, how many tokens it drafted and said, its time."""

    place: np.ndarray
    drafted: np.ndarray
    said: np.ndarray
    ms: np.ndarray

    def speed(self, costs: DraftCosts, first: int = 0, last: int = _TOKENS) -> float:
        """Tokens a plain round's time, of the rounds that begin in [first, last)."""
        counts = (self.place >= first) & (self.place < last)
        return float(self.said[counts].sum() / self.ms[counts].sum() * costs.plain_ms())


def speak(options: ControlOptions, text: Text, costs: DraftCosts, tokens: int = _TOKENS) -> Trace:
    """Each of the texts, with a posterior of its own."""
    run = Run(replace(options, is_shared=False), [sequence(seed=n) for n in range(_TEXTS)], costs)
    place, rows = np.zeros(_TEXTS, int), []
    while place.min() < tokens:
        ahead = np.minimum(place[:, None] + np.arange(_CAP), text.agrees.shape[1] - 1)
        across = np.arange(_TEXTS)[:, None]
        lengths = run.draft(text.confidence[across, ahead])
        drafted = run.round.drafted.copy()
        said = run.verify(text.agrees[across, ahead]) + 1
        times = map(costs.round_ms, drafted.tolist(), lengths.tolist())
        rows.append((place.copy(), drafted, said, np.array(list(times))))
        place += said
    return Trace(*(np.array(column) for column in zip(*rows, strict=True)))


def best_fixed(text: Text, costs: DraftCosts) -> float:
    """The speed of the best fixed length in hindsight, 0 (plain) among them."""
    options = [ControlOptions("fixed", draft_len=k) for k in (1, 2, 3, 4, 6, 8)]
    return max(1.0, *(speak(o, text, costs).speed(costs) for o in options))


@pytest.mark.parametrize("costs", [COSTS, DEAR], ids=["usual", "dear"])
@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.95])
def test_where_drafting_never_pays_little_is_lost(confidence: float, costs: DraftCosts) -> None:
    """The cost of finding out and of looking again; the rules that always draft lose 10 to 30 %."""
    text = Text.flat(0.1, confidence, _TOKENS + 20)
    trace = speak(ControlOptions("cost-aware"), text, costs)
    assert trace.speed(costs) > 0.975
    late = trace.speed(costs, first=_TOKENS // 2)
    assert late > 0.98
    looks = trace.drafted[trace.place >= _TOKENS // 2]
    assert 0.005 < np.mean(looks > 0) < 0.15
    assert np.mean(looks[looks > 0] == 1) > 0.7  # mostly a single token
    for kind in ("beta-ts", "calibration-ts"):
        assert speak(ControlOptions(kind), text, costs).speed(costs) < 0.9


@pytest.mark.parametrize("costs", [COSTS, CHEAP, DEAR], ids=["usual", "cheap", "dear"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 2.5])
def test_where_confidence_tells_it_beats_every_fixed_length(mean: float, costs: DraftCosts) -> None:
    text = Text.uneven(mean, _TOKENS + 20)
    speed = speak(ControlOptions("cost-aware"), text, costs).speed(costs)
    assert speed > best_fixed(text, costs)


@pytest.mark.parametrize("costs", [COSTS, CHEAP, DEAR], ids=["usual", "cheap", "dear"])
@pytest.mark.parametrize("chance", [0.6, 0.85])
def test_where_confidence_says_nothing_it_comes_near_the_best_fixed_length(
    chance: float, costs: DraftCosts
) -> None:
    text = Text.flat(chance, 0.5, _TOKENS + 20)
    speed = speak(ControlOptions("cost-aware"), text, costs).speed(costs)
    assert speed > 0.96 * best_fixed(text, costs)


@pytest.mark.parametrize(("confidence", "within"), [(0.85, 60), (0.5, 110)])
def test_it_comes_back_when_drafting_pays(confidence: float, within: int) -> None:
    """Sooner where the confidence rises too. ``within`` bounds nine texts of ten, in rounds."""
    text = Text.flat(0.1, min(confidence, 0.5), 400).then(Text.flat(0.85, confidence, 1200, seed=1))
    trace = speak(ControlOptions("cost-aware"), text, COSTS, tokens=1200)
    waits = []
    for b in range(_TEXTS):
        drafted = trace.drafted[trace.place[:, b] >= 400, b]
        full = np.convolve(drafted >= 2, np.ones(5), "valid") >= 4
        waits.append(int(full.argmax()) if full.any() else len(drafted))
    assert np.median(waits) < within / 1.5
    assert np.quantile(waits, 0.9) < within
    assert trace.speed(COSTS, first=900, last=1200) > 1.6
