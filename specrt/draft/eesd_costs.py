"""What a round of EESD costs, measured as rounds go by."""

from __future__ import annotations

from specrt.draft.base import RoundCost
from specrt.draft.control import DraftCosts
from specrt.draft.envelope import RunningMean
from specrt.draft.exit_model import ExitModel

_LEAST_MS = 1e-6  # a difference of times may be 0 or less, from where no mean would rise


class CostMeter:
    """Means of the times of a round's parts; until there are some, shares of the weights' bytes.

    Verification is measured as :class:`RoundCost` does it, but without the first N layers: a plain
    round, which runs all of them, counts for what it took less what those take.

    Args:
        exit_model: what is measured.
    """

    def __init__(self, exit_model: ExitModel) -> None:
        self._verify = RoundCost()
        self._fixed, self._step, self._lower = RunningMean(), RunningMean(), RunningMean()
        target, num_layers = exit_model.target, exit_model.num_layers
        head = target.weights.lm_head.nbytes
        layers = target.weights.arena.nbytes - head
        self._lower_share = num_layers / target.config.num_layers * layers / (layers + head)
        drafting = exit_model.layer_bytes + exit_model.head_bytes
        self._step_share = self._lower_share + drafting / (layers + head)

    def costs(self, batch: int) -> DraftCosts:
        """Milliseconds of one sequence's share of a round of ``batch`` sequences."""
        one = self._verify.one_ms
        plain = 1.0 if one is None else one + self._lower_ms(one)
        verify = plain * (1.0 - self._lower_share) if one is None else one
        row = verify * (self._verify.relative(2) - 1.0)
        return DraftCosts(
            fixed=self._of(self._fixed, 0.0) / batch,
            step=self._of(self._step, plain * self._step_share) / batch,
            lower=self._of(self._lower, plain * self._lower_share) / batch,
            verify=(verify + (batch - 1) * row) / batch,
            row=row,
        )

    def observe_draft(self, step_ms: float, fixed_ms: float, lower_ms: float | None) -> None:
        """Take one round whose steps were all replayed.

        Args:
            step_ms: of one draft step.
            fixed_ms: of all that a drafted round does beside steps and verification.
            lower_ms: of the last nodes' first N layers, if they were run.
        """
        self._step.add(max(step_ms, _LEAST_MS))
        self._fixed.add(max(fixed_ms, _LEAST_MS))
        if lower_ms is not None:
            self._lower.add(max(lower_ms, _LEAST_MS))

    def observe_verify(self, num_rows: int, ms: float, *, is_plain: bool) -> None:
        """Take the time from proposal to outcome; ``is_plain``: all layers were run."""
        if is_plain:
            lower = self._lower.value
            ms -= self._lower_share * ms if lower is None else min(lower, 0.9 * ms)
        self._verify.observe(num_rows, ms)

    def _lower_ms(self, verify_ms: float) -> float:
        assumed = verify_ms * self._lower_share / (1.0 - self._lower_share)
        return self._of(self._lower, assumed)

    def _of(self, mean: RunningMean, assumed: float) -> float:
        return assumed if mean.value is None else mean.value
