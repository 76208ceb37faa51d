"""What a round of EESD costs, measured as rounds go by."""

from __future__ import annotations

from typing import NamedTuple

from specrt.draft.base import StageTimes
from specrt.draft.eesd.model import ExitModel
from specrt.draft.length.costs import GPU_SLOPE, DraftCosts, RoundCost
from specrt.draft.length.measured import RunningMean

_CHECK = 3  # plain rounds in a row; the first of them finds the caches full of the drafter
_SOONEST, _LATEST = 32, 256  # drafted rounds between two checks, doubled each time
_LEAST_MS = 1e-6  # a difference of times may be 0 or less, from where no mean would rise


class RoundTimes(NamedTuple):
    """When and how long the parts of a proposal were made, in seconds of ``perf_counter``."""

    begun: float
    ended: float
    num_rows: int
    """To be verified, of all sequences."""
    batch: int
    steps: float = 0.0
    """Of all draft steps."""
    num_steps: int = 0
    lower: float | None = None
    """Of the last nodes' first N layers."""
    were_captured: bool = True
    """Whether all of these had been captured before."""


class CostMeter:
    """Means of the times of a round's parts; until there are some, shares of the weights' bytes.

    Verification is a line through drafted rounds, as :class:`RoundCost` fits it. What a plain round
    takes cannot be read off that line: a model that just about fits the caches is read faster
    where no drafter is read between. So a few plain rounds are due now and then. What they took is
    kept relative to the line, which follows a machine whose speed drifts.

    Args:
        exit_model: what is measured.
    """

    def __init__(self, exit_model: ExitModel) -> None:
        is_gpu = exit_model.target.device.is_gpu
        self._verify = RoundCost(GPU_SLOPE) if is_gpu else RoundCost()
        self._fixed, self._step, self._lower = RunningMean(), RunningMean(), RunningMean()
        self._first_plain, self._plain_ratio = RunningMean(), RunningMean()
        self._plain_left, self._plain_run = _CHECK, 0
        self._until_check = self._interval = _SOONEST
        target, num_layers = exit_model.target, exit_model.num_layers
        head = target.weights.lm_head.nbytes
        layers = target.weights.arena.nbytes - head
        self._lower_share = num_layers / target.config.num_layers * layers / (layers + head)
        drafting = exit_model.layer_bytes + exit_model.head_bytes
        self._step_share = self._lower_share + drafting / (layers + head)

    def is_plain_due(self) -> bool:
        """Whether to leave this round plain, to see what that takes."""
        return self._plain_left > 0

    def costs(self, batch: int) -> DraftCosts:
        """Milliseconds of one sequence's share of a round of ``batch`` sequences."""
        plain = self._plain_ms()
        lower = min(self._of(self._lower, plain * self._lower_share), 0.9 * plain)
        drafted = self._verify.one_ms
        if drafted is None:
            drafted = plain - lower
        row = drafted * (self._verify.relative(2) - 1.0)
        # A line through the drafted rounds starts where plain ones need not be.
        fixed = max(0.0, self._of(self._fixed, 0.0) + drafted - (plain - lower))
        return DraftCosts(
            fixed=fixed / batch,
            step=self._of(self._step, plain * self._step_share) / batch,
            lower=lower / batch,
            verify=(plain - lower) / batch,
            row=row,
        )

    def observe(self, times: RoundTimes, observed: float, learned: float) -> None:
        """Take a round.

        Args:
            times: of its proposal.
            observed: when its outcome came, in seconds.
            learned: when the drafter had taken it in.
        """
        verify_ms = 1e3 * (observed - times.ended)
        if times.num_steps == 0:
            self.observe_plain(verify_ms)
            return
        self.observe_verify(times.num_rows, times.batch, verify_ms)
        if not times.were_captured:
            return
        drafting = times.steps + (times.lower or 0.0)
        fixed = times.ended - times.begun - drafting + learned - observed
        lower = None if times.lower is None else 1e3 * times.lower
        self.observe_draft(1e3 * times.steps / times.num_steps, 1e3 * fixed, lower)

    def observe_launched(
        self, batch: int, num_levels: int, longest: int, times: StageTimes
    ) -> None:
        """Take a round of launches alone.

        Args:
            batch: sequences.
            num_levels: that were launched.
            longest: of them verified, of any sequence.
            times: as the device has them.
        """
        if num_levels == 0:
            self._lower.add(max(times.draft, _LEAST_MS))
            self.observe_plain(times.whole)
            return
        plain = self._plain_ms()
        steps = times.draft - self._of(self._lower, plain * self._lower_share)
        step = self._of(self._step, plain * self._step_share)
        # Whether there was a further draft, which was dropped, no report says: its time does.
        counts = range(longest, min(longest + 1, num_levels) + 1)
        count = min(counts, key=lambda count: abs(steps - count * step))
        if count > 0:
            self._step.add(max(steps / count, _LEAST_MS))
        self.observe_verify(batch * (1 + num_levels), batch, times.verify + times.accept)

    def observe_draft(self, step_ms: float, fixed_ms: float, lower_ms: float | None) -> None:
        """Take one round whose steps were all known.

        Args:
            step_ms: of one draft step.
            fixed_ms: of all that a drafted round does beside steps and verification.
            lower_ms: of the last nodes' first N layers, if they were run.
        """
        self._step.add(max(step_ms, _LEAST_MS))
        self._fixed.add(max(fixed_ms, _LEAST_MS))
        if lower_ms is not None:
            self._lower.add(max(lower_ms, _LEAST_MS))

    def observe_verify(self, num_rows: int, batch: int, ms: float) -> None:
        """Take the time from proposal to outcome of a drafted round.

        Args:
            num_rows: verified, of all sequences.
            batch: sequences; the line counts the rows beyond one of each.
            ms: the time.
        """
        self._verify.observe(num_rows - batch + 1, max(ms, _LEAST_MS))
        self._plain_run = 0
        self._until_check -= 1
        if self._until_check == 0:
            self._plain_left = _CHECK

    def observe_plain(self, ms: float) -> None:
        """Take the time of a round that drafted nothing."""
        ms = max(ms, _LEAST_MS)
        self._plain_run += 1
        if self._plain_run > 1:
            line = self._line_ms()
            if line is None:
                self._first_plain.add(ms)
            else:
                self._plain_ratio.add(ms / line)
        if self._plain_left:
            self._plain_left -= 1
            if self._plain_left == 0:
                self._until_check = self._interval
                self._interval = min(2 * self._interval, _LATEST)

    def _line_ms(self) -> float | None:
        """A plain round as the line of the drafted ones would have it."""
        one = self._verify.one_ms
        if one is None:
            return None
        return one + self._of(self._lower, one * self._lower_share / (1.0 - self._lower_share))

    def _plain_ms(self) -> float:
        line, first = self._line_ms(), self._first_plain.value
        if line is None:
            return 1.0 if first is None else first
        if self._plain_ratio.value is None and first is not None:
            self._plain_ratio.add(first / line)
        return line * self._of(self._plain_ratio, 1.0)

    def _of(self, mean: RunningMean, assumed: float) -> float:
        return assumed if mean.value is None else mean.value
