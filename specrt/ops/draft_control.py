"""Draft control: after each drafted token, draft another one or verify now.

Shapes: B sequences, K tokens that a round may draft, P posteriors. The rules and the order of the
draws are in ``csrc/draft_control/posterior.h``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from specrt import _C

# These run at once, on the host and its tensors, whatever stands in for a GPU.
from specrt._C import beta_draws as _beta_draws
from specrt._C import draft_control_prior as _draft_control_prior
from specrt._C import normal_draws as _normal_draws
from specrt.ops.registry import register

register(
    "draft_control(int kind, int step, Tensor settings, Tensor costs, Tensor posterior, "
    "Tensor slots, Tensor seed, Tensor position, Tensor limit, Tensor is_sampled, Tensor? slope, "
    "Tensor? score, Tensor? evidence, Tensor(a!) is_open, Tensor(b!) drafted, Tensor(c!) length, "
    "Tensor(d!) confidence, Tensor(e!)? num_nodes) -> ()",
    _C.draft_control,
)
register(
    "draft_control_update(int kind, Tensor settings, Tensor costs, Tensor slots, Tensor limit, "
    "Tensor drafted, Tensor length, Tensor confidence, Tensor accept_length, "
    "Tensor(a!) posterior) -> ()",
    _C.draft_control_update,
)

NUM_BINS = 8
"""Bins of the confidence, equally wide."""
MAX_DRAFT = 62
STEP_DRAWS = 1024
"""Uniforms of a step. Number 0 decides with a probability, variates begin at 1."""


class ControlKind(IntEnum):
    """The rule that decides."""

    FIXED = 0
    THRESHOLD = 1
    ADAPTIVE_THRESHOLD = 2
    BETA_TS = 3
    CALIBRATION_TS = 4
    COST_AWARE = 5


class ControlSettings(NamedTuple):
    """Constants of a rule and the priors of what it learns: the row ``settings``, in this order."""

    draft_len: float
    threshold: float
    adapt_rate: float
    target_rejection: float
    alpha: float
    beta: float
    bias_mean: float
    bias_var: float
    noise_var: float
    discount: float
    gain_mean: float
    gain_weight: float
    gain_var: float

    def tensor(self) -> torch.Tensor:
        """``[settings]`` float64."""
        return torch.tensor(self, dtype=torch.float64)


class Beliefs(NamedTuple):
    """A row of ``posterior``, in this order; then come ``NUM_BINS`` alphas and as many betas."""

    alpha: float
    beta: float
    bias_precision: float
    bias_shift: float
    threshold: float
    gain_weight: float
    gain_sum: float
    tokens: float
    time: float
    idle: float


POSTERIOR_SIZE = len(Beliefs._fields) + 2 * NUM_BINS
NUM_COSTS = 5


def draft_control(
    kind: int,
    step: int,
    settings: torch.Tensor,
    costs: torch.Tensor,
    posterior: torch.Tensor,
    slots: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    limit: torch.Tensor,
    is_sampled: torch.Tensor,
    slope: torch.Tensor | None,
    score: torch.Tensor | None,
    evidence: torch.Tensor | None,
    is_open: torch.Tensor,
    drafted: torch.Tensor,
    length: torch.Tensor,
    confidence: torch.Tensor,
    num_nodes: torch.Tensor | None = None,
) -> None:
    """Decide whether to draft the token after the ``step``-th.

    Step 0 begins a round; step ``j`` takes the ``j``-th drafted token of the sequences that are
    still open and leaves the others as they are. A confidence of NaN ends a sequence's drafting
    without that token. A decision depends on the sequence's own row of ``posterior``, seed,
    position, scores and the costs alone. Contents may be anything and reach no other memory.

    Args:
        kind: a :class:`ControlKind`.
        step: 0..K.
        settings: ``[settings]`` float64, see :class:`ControlSettings`.
        costs: ``[5]`` float64, milliseconds: fixed, step, lower, verify, row.
        posterior: ``[P, beliefs]`` float64, see :class:`Beliefs`.
        slots: ``[B]`` int32, each sequence's row of ``posterior``. One out of range drafts nothing.
        seed: ``[B]`` int64 holding unsigned bits.
        position: ``[B]`` int32, the sequence's length when the round began.
        limit: ``[B]`` int32, tokens it may draft.
        is_sampled: ``[B]`` int32, 1 where the temperature is above 0: the calibration head's row.
        slope: ``[2]`` float32 of the calibration head, or None.
        score: ``[B]`` float32, may be strided: ln of the drafted token's probability; None at
            step 0.
        evidence: ``[B, 2]`` float32 of the calibration head: the confidence is
            ``sigmoid(evidence + slope * logit(exp(score)))``. None: it is ``exp(score)``.
        is_open: ``[B]`` int32, written: 1 = draft another token.
        drafted: ``[B]`` int32, written: tokens drafted so far.
        length: ``[B]`` int32, written: tokens to verify, ``drafted`` or one less.
        confidence: ``[B, K]`` float32, written; NaN where nothing was drafted.
        num_nodes: ``[B]`` int32, written wherever ``length`` is: 1 more, as a chain of so many
            tokens counts its root.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    op = torch.ops.specrt.draft_control if torch.compiler.is_compiling() else _C.draft_control
    op(
        kind,
        step,
        settings,
        costs,
        posterior,
        slots,
        seed,
        position,
        limit,
        is_sampled,
        slope,
        score,
        evidence,
        is_open,
        drafted,
        length,
        confidence,
        num_nodes,
    )


def draft_control_update(
    kind: int,
    settings: torch.Tensor,
    costs: torch.Tensor,
    slots: torch.Tensor,
    limit: torch.Tensor,
    drafted: torch.Tensor,
    length: torch.Tensor,
    confidence: torch.Tensor,
    accept_length: torch.Tensor,
    posterior: torch.Tensor,
) -> None:
    """Learn from a verified round; sequences that share a posterior take turns, in order.

    A sequence whose slot is out of range, or whose counts cannot be a round's, teaches nothing.

    Args:
        kind: as for :func:`draft_control`, and so to ``confidence``.
        settings: ``[settings]`` float64.
        costs: ``[5]`` float64.
        slots: ``[B]`` int32.
        limit: ``[B]`` int32.
        drafted: ``[B]`` int32.
        length: ``[B]`` int32.
        confidence: ``[B, K]`` float32.
        accept_length: ``[B]`` int32; -1 = the sequence failed and teaches nothing.
        posterior: ``[P, beliefs]`` float64, written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    is_compiling = torch.compiler.is_compiling()
    op = torch.ops.specrt.draft_control_update if is_compiling else _C.draft_control_update
    op(
        kind,
        settings,
        costs,
        slots,
        limit,
        drafted,
        length,
        confidence,
        accept_length,
        posterior,
    )


def prior_beliefs(settings: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """A row of ``posterior`` before anything is known, ``[beliefs]`` float64.

    Args:
        settings: on the CPU.
        device: where the row is to be: made on the CPU, copied there. None: the CPU.

    Raises:
        ValueError: ``settings`` does not fit.
    """
    row = torch.empty(POSTERIOR_SIZE, dtype=torch.float64)
    _draft_control_prior(settings, row)
    return row.to(device)


def normal_draws(
    seed: torch.Tensor, position: torch.Tensor, index: int, mean: float, variance: float
) -> torch.Tensor:
    """Normal variates ``[n]`` float64 as a decision draws them.

    Args:
        seed: ``[n]`` int64 holding unsigned bits.
        position: ``[n]`` int32.
        index: of the first uniform: ``step * STEP_DRAWS`` and more.
        mean: of the law.
        variance: of the law, >= 0.

    Raises:
        ValueError: an argument does not fit; it is named.
    """
    out = torch.empty(seed.shape, dtype=torch.float64)
    _normal_draws(seed, position, index, mean, variance, out)
    return out


def beta_draws(
    seed: torch.Tensor, position: torch.Tensor, index: int, alpha: float, beta: float
) -> torch.Tensor:
    """Beta variates ``[n]`` float64 as a decision draws them; arguments as :func:`normal_draws`.

    Raises:
        ValueError: an argument does not fit; ``alpha`` and ``beta`` must be above 0.
    """
    out = torch.empty(seed.shape, dtype=torch.float64)
    _beta_draws(seed, position, index, alpha, beta, out)
    return out
