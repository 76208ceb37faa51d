"""Rules for the draft length on recorded chains: what each would have done, and what it would cost.

A trace has a drafted chain from every position of an output, so any controller can be run on it
without a model: from a round root it decides step by step with the scores it would have seen, the
leading tokens that are the target's own are accepted, and the next root follows. This is what the
engine does, round by round; only time is modelled, by the costs that the trace brings along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from specrt.draft.length.control import ControlOptions, ControlRound, DraftControl
from specrt.draft.length.costs import DraftCosts
from specrt.lab.trace import Trace, TraceHeader, TraceSequence
from specrt.types import SequenceState

PLAIN = "plain"
ALL_TASKS = "all tasks"
_DRAW = 0x9E3779B97F4A7C15  # odd and large: seeds of different draws do not meet


@dataclass(frozen=True, eq=False)
class Rounds:
    """The R rounds of one sequence under one controller."""

    drafted: npt.NDArray[np.int64]
    """``[R]``: draft steps run."""
    verified: npt.NDArray[np.int64]
    """``[R]``: drafted tokens verified; a controller may drop the last one it saw."""
    accepted: npt.NDArray[np.int64]
    """``[R]``: accept lengths, counted as in :class:`~specrt.types.RoundStats`."""
    ms: npt.NDArray[np.float64]
    """``[R]``: modelled times."""

    @property
    def emitted(self) -> npt.NDArray[np.int64]:
        """``[R]``: tokens of the output that came of it."""
        return self.accepted + 1


# --- one controller -------------------------------------------------------------------------------


def simulate(traces: Iterable[Trace], options: ControlOptions, draw: int = 0) -> list[Rounds]:
    """Run one new controller over the sequences of traces, in their order.

    Sequences whose posteriors are their own run together, since no decision depends on a
    neighbour; a shared posterior sees them one after another, as an engine with ``max_batch=1``.

    Args:
        traces: of one drafter.
        options: of the controller.
        draw: 0 draws what the engine would; another number gives other draws of the same law.

    Raises:
        ValueError: the controller may draft more than the traces hold.
    """
    control = DraftControl(options)
    rounds: list[Rounds] = []
    for trace in traces:
        longest = trace.header.models.max_draft
        if options.max_draft > longest:
            raise ValueError(
                f"max_draft: expected at most the traces' {longest}, got {options.max_draft}"
            )
        size = 1 if options.shares else len(trace.sequences)
        for start in range(0, len(trace.sequences), size):
            batch = trace.sequences[start : start + size]
            rounds += _simulate_batch(trace.header, batch, control, draw)
    return rounds


def simulate_plain(traces: Iterable[Trace]) -> list[Rounds]:
    """Decoding without drafts: K = 0."""
    rounds = []
    for trace in traces:
        for sequence in trace.sequences:
            none = np.zeros(len(sequence.token_ids), dtype=np.int64)
            ms = np.full(len(none), trace.header.costs.plain_ms())
            rounds.append(Rounds(none, none, none, ms))
    return rounds


@dataclass(eq=False)
class _Player:
    """A sequence on its way through its trace."""

    sequence: TraceSequence
    state: SequenceState
    place: int = 0
    """Output tokens so far, which is the row of the next chain."""
    rounds: list[tuple[int, int, int]] = field(default_factory=list)
    """Drafted, verified, accepted."""

    @classmethod
    def begin(cls, sequence: TraceSequence, header: TraceHeader, draw: int) -> _Player:
        state = SequenceState(
            [0] * sequence.prompt_len,  # controllers ask only how many there are
            sequence.prompt_len,
            sequence.max_len,
            seed=(sequence.seed + draw * _DRAW) % 2**64,
            temperature=header.temperature,
        )
        return cls(sequence, state)

    @property
    def is_over(self) -> bool:
        return self.place >= len(self.sequence.token_ids)

    @property
    def may_draft(self) -> bool:
        """Whether the next chain has any tokens."""
        return bool(self.sequence.lengths[self.place])

    def accept(self, drafted: int, verified: int, accepted: int) -> None:
        """Play a round; ``accepted`` may reach past the output's end."""
        tokens = self.sequence.token_ids[self.place : self.place + accepted + 1]
        self.rounds.append((drafted, verified, len(tokens) - 1))
        self.state.token_ids.extend(tokens)
        self.place += len(tokens)

    def result(self, costs: DraftCosts) -> Rounds:
        drafted, verified, accepted = np.array(self.rounds, dtype=np.int64).T
        ms = [costs.round_ms(steps, kept) for steps, kept, _ in self.rounds]
        return Rounds(drafted, verified, accepted, np.array(ms))


def _simulate_batch(
    header: TraceHeader, sequences: Sequence[TraceSequence], control: DraftControl, draw: int
) -> list[Rounds]:
    players = [_Player.begin(sequence, header, draw) for sequence in sequences]
    for player in players:
        control.start(player.state)
    slope = torch.tensor(header.slope, dtype=torch.float32)
    playing, buffers = players, None
    while playing:
        if buffers is None or len(buffers.length) != len(playing):
            buffers = control.new_round(len(playing), slope)
        if any(player.may_draft for player in playing):
            _play_round(playing, buffers, control, header.costs)
        else:  # the engine's rounds at the very end, of which no controller hears
            for player in playing:
                player.accept(0, 0, 0)
        playing = [player for player in playing if not player.is_over]
    for player in players:
        control.finish(player.state)
    return [player.result(header.costs) for player in players]


def _play_round(
    players: Sequence[_Player], buffers: ControlRound, control: DraftControl, costs: DraftCosts
) -> None:
    states = [player.state for player in players]
    scores = _columns(player.sequence.scores[player.place] for player in players)
    evidence = _columns(player.sequence.evidence[player.place] for player in players)
    # A controller reads the row of the calibration head that belongs to the temperature.
    both = evidence[:, :, None].repeat(1, 1, 2)
    buffers.stage(control, states, costs)
    buffers.decide(0, None, None)
    for step in range(1, len(scores) + 1):
        if not buffers.is_open.any():
            break
        buffers.decide(step, scores[step - 1], both[step - 1])
    drafted, verified = buffers.drafted.tolist(), buffers.length.tolist()
    matching = [player.sequence.num_matching[player.place] for player in players]
    accepted = [min(int(right), length) for right, length in zip(matching, verified, strict=True)]
    buffers.update(control, states, accepted)
    for player, *counts in zip(players, drafted, verified, accepted, strict=True):
        player.accept(*counts)


def _columns(rows: Iterable[npt.NDArray[np.float32]]) -> torch.Tensor:
    """``[K, B]``: step j's values of all sequences side by side."""
    return torch.from_numpy(np.stack(list(rows), axis=1))


# --- many controllers -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """One controller on one task, or on all. ``tau`` is the mean of accept_length + 1 per round."""

    rounds: tuple[Rounds, ...]
    """Of each sequence."""

    @cached_property
    def num_tokens(self) -> int:
        """Output tokens."""
        return sum(int(one.emitted.sum()) for one in self.rounds)

    @cached_property
    def num_rounds(self) -> int:
        return sum(len(one.drafted) for one in self.rounds)

    @cached_property
    def num_drafted(self) -> int:
        """Draft steps run."""
        return sum(int(one.drafted.sum()) for one in self.rounds)

    @cached_property
    def num_verified(self) -> int:
        """Drafted tokens that were verified."""
        return sum(int(one.verified.sum()) for one in self.rounds)

    @cached_property
    def num_accepted(self) -> int:
        return sum(int(one.accepted.sum()) for one in self.rounds)

    @cached_property
    def ms(self) -> float:
        """Modelled time of decoding."""
        return float(sum(one.ms.sum() for one in self.rounds))

    @property
    def tau(self) -> float:
        """Mean of accept_length + 1 per round: tokens by rounds."""
        return self.num_tokens / self.num_rounds

    @property
    def ms_per_token(self) -> float:
        return self.ms / self.num_tokens

    def ms_until(self, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Time until so many tokens of the sequences, one after another, were there."""
        emitted = np.concatenate([[0], *(one.emitted for one in self.rounds)])
        ms = np.concatenate([[0.0], *(one.ms for one in self.rounds)])
        times: npt.NDArray[np.float64] = np.interp(tokens, emitted.cumsum(), ms.cumsum())
        return times


@dataclass(frozen=True, eq=False)
class Replay:
    """Controllers against each other, plain decoding and the best fixed length in hindsight."""

    tasks: tuple[str, ...]
    outcomes: Mapping[str, Mapping[str, Outcome]]
    """By controller, then by task; :data:`ALL_TASKS` is one of the tasks."""
    fixed: tuple[str, ...]
    """The controllers that are fixed lengths, :data:`PLAIN` among them."""
    draws: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]
    """``[N]``: milliseconds a token in each draw, as ``outcomes``, whose own draw is the first."""

    def task_names(self) -> tuple[str, ...]:
        """The tasks, and their sum where there are several."""
        return (*self.tasks, ALL_TASKS) if len(self.tasks) > 1 else self.tasks

    def num_tokens(self, task: str) -> int:
        """Output tokens, which are the same for every controller."""
        return self.outcomes[PLAIN][task].num_tokens

    def best_fixed(self, task: str) -> str:
        """The fixed length with the least time; the shortest such."""
        return min(self.fixed, key=lambda name: self.outcomes[name][task].ms)

    def speedup(self, name: str, task: str) -> float:
        """Plain decoding's time over a controller's."""
        return self.outcomes[PLAIN][task].ms / self.outcomes[name][task].ms

    def regret_ms(self, name: str, task: str) -> float:
        """Milliseconds a token lost against the best fixed length; negative if won."""
        best = self.outcomes[self.best_fixed(task)][task]
        return self.outcomes[name][task].ms_per_token - best.ms_per_token

    def regret_share(self, name: str, task: str) -> float:
        """The same as a share of the best fixed length's time."""
        return self.regret_ms(name, task) / self.outcomes[self.best_fixed(task)][task].ms_per_token

    def regret_draws(self, name: str, task: str) -> npt.NDArray[np.float64]:
        """``[N]``: the same in each draw of the controller."""
        best = self.outcomes[self.best_fixed(task)][task].ms_per_token
        return self.draws[name][task] / best - 1.0

    def regret_curve(
        self, name: str, task: str, num_points: int = 200
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Tokens so far, and the milliseconds lost by then against the best fixed length."""
        own, best = self.outcomes[name][task], self.outcomes[self.best_fixed(task)][task]
        tokens = np.linspace(0.0, own.num_tokens, num_points)
        return tokens, own.ms_until(tokens) - best.ms_until(tokens)

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Of these controllers, by task, for JSON."""
        return {
            task: {
                "num_tokens": self.num_tokens(task),
                "best_fixed": self.best_fixed(task),
                "controllers": {name: self._row(name, task) for name in names},
            }
            for task in self.task_names()
        }

    def _row(self, name: str, task: str) -> dict[str, Any]:
        outcome = self.outcomes[name][task]
        return {
            "num_rounds": outcome.num_rounds,
            "tau": outcome.tau,
            "num_drafted": outcome.num_drafted,
            "num_verified": outcome.num_verified,
            "num_accepted": outcome.num_accepted,
            "ms_per_token": outcome.ms_per_token,
            "speedup": self.speedup(name, task),
            "regret_ms_per_token": self.regret_ms(name, task),
            "regret": self.regret_share(name, task),
            "regret_draws": self.regret_draws(name, task).tolist(),
        }


def compare(
    traces: Sequence[Trace], controllers: Mapping[str, ControlOptions], num_draws: int = 1
) -> Replay:
    """Replay controllers, and plain decoding and every fixed length to compare them with.

    Each task has a controller of its own, so that what it learns is that task's: results do not
    depend on the order of tasks. :data:`ALL_TASKS` is their sum.

    Args:
        traces: as :func:`~specrt.lab.trace.read_traces` gives them.
        controllers: by name; ``fixed-K`` are added.
        num_draws: how often to replay those that may draw, to see how much of a result is luck.

    Raises:
        ValueError: as :func:`simulate`, or ``num_draws`` is less than 1.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, got {num_draws}")
    longest = min(trace.header.models.max_draft for trace in traces)
    fixed = {
        f"fixed-{length}": ControlOptions(kind="fixed", max_draft=longest, draft_len=length)
        for length in range(1, longest + 1)
    }
    tasks = split_tasks(traces)
    drawn = {PLAIN: [_with_sum({task: simulate_plain(t) for task, t in tasks.items()})]}
    for name, options in {**fixed, **controllers}.items():
        drawn[name] = [
            _with_sum({task: simulate(t, options, draw) for task, t in tasks.items()})
            for draw in range(1 if options.kind == "fixed" else num_draws)
        ]
    draws = {
        name: {task: np.array([one[task].ms_per_token for one in all_]) for task in all_[0]}
        for name, all_ in drawn.items()
    }
    outcomes = {name: all_[0] for name, all_ in drawn.items()}
    return Replay(tuple(tasks), outcomes, (PLAIN, *fixed), draws)


def _with_sum(rounds: Mapping[str, list[Rounds]]) -> dict[str, Outcome]:
    """Outcomes by task, that of all tasks among them."""
    everything = [one for of_task in rounds.values() for one in of_task]
    return {task: Outcome(tuple(each)) for task, each in {**rounds, ALL_TASKS: everything}.items()}


def split_tasks(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """Traces of one task each, by its name; another temperature is another task."""
    tasks: dict[str, list[Trace]] = {}
    for trace in traces:
        temperature = trace.header.temperature
        by_name: dict[str, list[TraceSequence]] = {}
        for sequence in trace.sequences:
            by_name.setdefault(sequence.task, []).append(sequence)
        for name, sequences in by_name.items():
            label = f"{name} at {temperature:g}" if temperature > 0 else name
            label = repr(label) if label == ALL_TASKS else label  # that is the sum's name
            tasks.setdefault(label, []).append(replace(trace, sequences=tuple(sequences)))
    return tasks
