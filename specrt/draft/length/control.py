"""How many tokens to draft: Thompson sampling, its baselines, and a cost-aware rule.

A chain is drafted token by token; after each one the controller says whether to draft another or
to verify now. ``beta-ts`` and ``calibration-ts`` are those of EESD (arXiv 2406.03853), of which no
code is public: the formulas are our reading. ``cost-aware`` is ours. The rules are in
``csrc/core/posterior.h``; here are the options, the posteriors of the sequences, and a
round's buffers.

Hazard: ``cost-aware`` may drop the token it saw last. That is unbiased only for drafts which are
checked by equality with the target's own token, never for drafts that were sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch

from specrt.draft.length.costs import DraftCosts
from specrt.draft.length.inputs import HostInputs
from specrt.ops import draft_control, draft_control_update
from specrt.ops.draft_control import (
    MAX_DRAFT,
    NUM_BINS,
    Beliefs,
    ControlKind,
    ControlSettings,
    prior_beliefs,
)
from specrt.types import SequenceState

DISCOUNT_PLACE = ControlSettings._fields.index("discount")
"""Of the discount, in a row of settings."""

CONTROLLERS = tuple(kind.name.lower().replace("_", "-") for kind in ControlKind)
"""Names of the rules."""

# Of cost-aware, chosen by simulation (tests/drafters/test_control.py).
_DISCOUNT = 0.99
_GAIN_MEAN = 0.5
_GAIN_WEIGHT = 1.0
_GAIN_VAR = 0.06


@dataclass(frozen=True)
class ControlOptions:
    """A rule and its settings.

    Raises:
        ValueError: a field is out of range; it is named.
    """

    kind: str = "cost-aware"
    """One of ``CONTROLLERS``."""
    max_draft: int = 8
    """Tokens that a round drafts at most."""
    draft_len: int = 4
    """``fixed``: tokens that a round drafts."""
    threshold: float = 0.6
    """``threshold``, ``adaptive-threshold`` (there the first one): go on while the confidence of
    the last token is at least this."""
    adapt_rate: float = 0.05
    """``adaptive-threshold``: after each verified round the threshold moves by ``adapt_rate *
    (rejected - target_rejection)``, where rejected is 1 if a drafted token was, else 0; it stays
    in [0.02, 0.98]."""
    target_rejection: float = 0.4
    """``adaptive-threshold``: the share of rounds with a rejected token that it settles at."""
    prior: tuple[float, float] = (1.0, 1.0)
    """``beta-ts``: alpha and beta of the chance that a token is accepted. ``cost-aware``: the same
    scaled in each bin of the confidence, so that (1, 1) expects as much of the next token as of
    this one, with the weight of two."""
    bias_prior: tuple[float, float] = (0.0, 0.05)
    """``calibration-ts``, ``cost-aware``: mean and variance of accepted - confidence."""
    noise_var: float = 0.2
    """Variance of that difference for one token."""
    discount: float | None = None
    """What a posterior keeps of its distance from the prior, a round; None: 1 for ``beta-ts`` and
    ``calibration-ts``, a measured default for ``cost-aware``."""
    is_shared: bool | None = None
    """One posterior for all sequences; None: only ``cost-aware`` shares."""

    def __post_init__(self) -> None:
        if self.kind not in CONTROLLERS:
            raise ValueError(f"kind: expected one of {', '.join(CONTROLLERS)}, got {self.kind!r}")
        _check_int("max_draft", self.max_draft, MAX_DRAFT)
        _check_int("draft_len", self.draft_len, self.max_draft if self.kind == "fixed" else None)
        for name in ("threshold", "adapt_rate", "target_rejection"):
            value = getattr(self, name)
            _check(name, "a number in [0, 1]", value, _is_finite(value) and 0.0 <= value <= 1.0)
        fits = _is_pair(self.prior) and min(self.prior) > 0.0
        _check("prior", "two numbers > 0", self.prior, fits)
        fits = _is_pair(self.bias_prior) and self.bias_prior[1] > 0.0
        _check("bias_prior", "a mean and a variance > 0", self.bias_prior, fits)
        fits = _is_finite(self.noise_var) and self.noise_var > 0.0
        _check("noise_var", "a number > 0", self.noise_var, fits)
        fits = self.discount is None or (_is_finite(self.discount) and 0.0 < self.discount <= 1.0)
        _check("discount", "None or a number in (0, 1]", self.discount, fits)

    @property
    def shares(self) -> bool:
        """Whether all sequences have one posterior."""
        return self.kind == "cost-aware" if self.is_shared is None else self.is_shared

    def settings(self) -> ControlSettings:
        """As the kernel reads them."""
        default = _DISCOUNT if self.kind == "cost-aware" else 1.0
        return ControlSettings(
            self.draft_len,
            self.threshold,
            self.adapt_rate,
            self.target_rejection,
            *self.prior,
            *self.bias_prior,
            self.noise_var,
            default if self.discount is None else self.discount,
            _GAIN_MEAN,
            _GAIN_WEIGHT,
            _GAIN_VAR,
        )


def parse_control(text: str) -> ControlOptions:
    """A rule by its name: ``fixed-4``, ``threshold``, ``cost-aware``, ….

    Raises:
        ValueError: there is no such rule.
    """
    kind, _, length = text.rpartition("-")
    if kind == "fixed" and length.isdecimal() and 1 <= int(length) <= MAX_DRAFT:
        return ControlOptions("fixed", max_draft=max(8, int(length)), draft_len=int(length))
    learning = CONTROLLERS[1:]
    if text in learning:
        return ControlOptions(text)
    names = ", ".join((f"fixed-1 .. fixed-{MAX_DRAFT}", *learning))
    raise ValueError(f"controller: expected one of {names}, got {text!r}")


@dataclass(frozen=True)
class Posterior:
    """What is believed of a sequence; each rule learns its own part, the rest stays the prior."""

    alpha: float
    """``beta-ts``: of a drafted token's acceptance."""
    beta: float
    bias_mean: float
    """``calibration-ts``, ``cost-aware``: of accepted - confidence."""
    bias_var: float
    threshold: float
    """``adaptive-threshold``: the present one."""
    gain_mean: float
    """``cost-aware``: tokens that a drafted round brings over plain decoding in the same time."""
    gain_var: float
    tokens_per_ms: float
    """``cost-aware``: of past rounds; NaN before the first."""
    idle: int
    """``cost-aware``: rounds since one was drafted."""
    next_alpha: tuple[float, ...]
    """``cost-aware``: by bin of a token's confidence, whether the token behind it was accepted,
    given that it was itself."""
    next_beta: tuple[float, ...]

    @classmethod
    def of(cls, beliefs: Sequence[float], gain_var: float) -> Posterior:
        """From a row as the kernels keep it."""
        own = Beliefs(*beliefs[: -2 * NUM_BINS])
        return cls(
            alpha=own.alpha,
            beta=own.beta,
            bias_mean=own.bias_shift / own.bias_precision,
            bias_var=1.0 / own.bias_precision,
            threshold=own.threshold,
            gain_mean=own.gain_sum / own.gain_weight,
            gain_var=gain_var / own.gain_weight,
            tokens_per_ms=own.tokens / own.time if own.time else math.nan,
            idle=int(own.idle),
            next_alpha=tuple(beliefs[-2 * NUM_BINS : -NUM_BINS]),
            next_beta=tuple(beliefs[-NUM_BINS:]),
        )


class DraftControl:
    """The posteriors of a drafter's sequences.

    Args:
        options: the rule.
    """

    def __init__(self, options: ControlOptions) -> None:
        self.options = options
        self.kind = ControlKind(CONTROLLERS.index(options.kind))
        settings = options.settings()
        self.settings, self._gain_var = settings.tensor(), settings.gain_var
        self._prior = prior_beliefs(self.settings).numpy()
        self._shared = self._prior.copy() if options.shares else None
        self._rows: dict[SequenceState, np.ndarray] = {}

    def start(self, state: SequenceState) -> None:
        """A sequence joins, with the prior or the shared posterior."""
        self._rows[state] = self._prior.copy() if self._shared is None else self._shared

    def finish(self, state: SequenceState) -> None:
        """A sequence leaves."""
        self._rows.pop(state, None)

    def posterior(self, state: SequenceState) -> Posterior:
        """What is believed of ``state`` now."""
        return Posterior.of(self._rows[state].tolist(), self._gain_var)

    def new_round(self, batch: int, slope: torch.Tensor | None = None) -> ControlRound:
        """Buffers for rounds of ``batch`` sequences.

        Args:
            batch: B.
            slope: ``[2]`` float32 of the calibration head; None if confidences are ``exp(score)``.
        """
        return ControlRound(self, batch, slope)

    def read(self, states: Sequence[SequenceState], rows: np.ndarray) -> None:
        """Copy the posteriors of ``states`` to ``rows [P, beliefs]``; P = 1 if they are shared."""
        for state, row in zip(states, rows, strict=False):
            row[:] = self._rows[state]

    def write(self, states: Sequence[SequenceState], rows: np.ndarray) -> None:
        """Take back what :meth:`read` gave."""
        for state, row in zip(states, rows, strict=False):
            self._rows[state][:] = row


class ControlRound:
    """One round of a batch. Addresses are fixed, so that a graph may record :meth:`decide`."""

    def __init__(self, control: DraftControl, batch: int, slope: torch.Tensor | None) -> None:
        shares, cap = control.options.shares, control.options.max_draft
        self._kind, self._settings, self._slope = int(control.kind), control.settings.clone(), slope
        self._setting_values = self._settings.numpy()
        self._discount = float(self._setting_values[DISCOUNT_PLACE])
        self._posterior = prior_beliefs(control.settings).repeat(1 if shares else batch, 1)
        self._inputs = HostInputs(batch, cap)
        self._inputs.slots[:] = 0 if shares else range(batch)
        ints = torch.zeros(4, batch, dtype=torch.int32)
        self._accept_length, self._is_open, self._drafted, self._length = ints
        self._confidence = torch.full((batch, cap), math.nan)
        # The same memory through numpy, where small writes cost a tenth of torch's.
        self._beliefs, self._accepted = self._posterior.numpy(), self._accept_length.numpy()
        self.is_open = self._is_open.numpy()
        """``[B]`` int32: 1 = draft another token for this sequence."""
        self.drafted = self._drafted.numpy()
        """``[B]`` int32: tokens drafted."""
        self.length = self._length.numpy()
        """``[B]`` int32: tokens to verify; one less than drafted where the last was dropped."""
        self.confidence = self._confidence.numpy()
        """``[B, max_draft]`` float32; NaN where nothing was drafted."""

    def stage(
        self,
        control: DraftControl,
        states: Sequence[SequenceState],
        costs: DraftCosts,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Copy in what the round's decisions depend on.

        Args:
            control: the one these buffers were made by.
            states: the B sequences. One near its end drafts no more than it can use.
            costs: of this round.
            positions: numbers that no other round of the same seed has; None: the lengths.
        """
        control.read(states, self._beliefs)
        self._inputs.stage(states, costs, positions)

    def price(self, costs: DraftCosts) -> None:
        """Replace the costs."""
        self._inputs.price(costs)

    def decide(
        self, step: int, score: torch.Tensor | None = None, evidence: torch.Tensor | None = None
    ) -> None:
        """Decide on the token after the ``step``-th; nothing but a launch.

        Args:
            step: 0 before anything is drafted, then the number of the token just drafted.
            score: ``[B]`` float32, may be strided: ln of that token's probability.
            evidence: ``[B, 2]`` float32 of the calibration head, or None.

        Raises:
            ValueError: an argument does not fit.
        """
        at = self._inputs.tensors
        draft_control(
            self._kind,
            step,
            self._settings,
            at.costs,
            self._posterior,
            at.slots,
            at.seed,
            at.position,
            at.limit,
            at.is_sampled,
            self._slope,
            score,
            evidence,
            self._is_open,
            self._drafted,
            self._length,
            self._confidence,
        )

    def update(
        self,
        control: DraftControl,
        states: Sequence[SequenceState],
        accept_lengths: Sequence[int],
        num_rounds: int = 1,
    ) -> None:
        """Learn from the round that was staged.

        Args:
            control: as staged.
            states: as staged.
            accept_lengths: accepted drafted tokens of each; -1 = failed, nothing is learned.
            num_rounds: how many rounds' forgetting this one stands for.
        """
        self._setting_values[DISCOUNT_PLACE] = self._discount**num_rounds
        control.read(states, self._beliefs)
        self._accepted[:] = accept_lengths
        at = self._inputs.tensors
        draft_control_update(
            self._kind,
            self._settings,
            at.costs,
            at.slots,
            at.limit,
            self._drafted,
            self._length,
            self._confidence,
            self._accept_length,
            self._posterior,
        )
        control.write(states, self._beliefs)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_pair(values: object) -> bool:
    return isinstance(values, tuple | list) and len(values) == 2 and all(map(_is_finite, values))


def _check(name: str, expected: str, value: object, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_int(name: str, value: int, most: int | None) -> None:
    top = "" if most is None else f"..{most}"
    fits = isinstance(value, int) and value >= 1 and (most is None or value <= most)
    _check(name, f"an int in 1{top}" if top else "an int >= 1", value, fits)
