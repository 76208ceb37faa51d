"""Inputs of the drafters' kernels for ``small_kernels_cuda``, and the same work in torch.

Draft control is of the cost-aware rule, which computes most; its posterior is so sure that what is
drawn is as good as the mean, which is what the torch expressions decide by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.gpu import Place
from bench.limits import Model
from specrt import ops
from specrt.draft.length.control import ControlOptions
from specrt.ops.draft_control import NUM_BINS, Beliefs, ControlKind, prior_beliefs

EPS = 1e-6
_VOCAB = 1024  # different tokens: rows of tables that are picked from
_STEP, _CAP = 4, 8
_ACCEPTED = 2
_COSTS = (0.06, 0.2, 0.12, 0.9, 0.07)
_KIND = int(ControlKind.COST_AWARE)
_OWN = Beliefs._fields.index
_ALPHAS, _BETAS = slice(-2 * NUM_BINS, -NUM_BINS), slice(-NUM_BINS, None)

Tensors = tuple[torch.Tensor, ...]


class Embed:
    """torch: a selection."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._table = place.randn(_VOCAB, model.hidden_size)
        self._tokens = place.ints(*(7 * row % _VOCAB for row in range(rows)))
        self._out, self._torch_out = (place.poison(rows, model.hidden_size) for _ in range(2))

    def ours(self) -> Tensors:
        return (ops.embed(self._tokens, self._table, self._out),)

    def torchs(self) -> Tensors:
        return (torch.index_select(self._table, 0, self._tokens, out=self._torch_out),)


class FeatureSample:
    """torch: the formula, with products of its own. apart: ours, but rows are gathered before, and
    gate and up are written before the activation."""

    def __init__(self, model: Model, rows: int, place: Place, *, is_folded: bool = False) -> None:
        hidden, wide = model.hidden_size, model.intermediate_size
        self._is_folded, self._wide = is_folded, wide

        def matrix(outputs: int, inputs: int) -> torch.Tensor:
            return place.randn(outputs, inputs).mul_(inputs**-0.5)

        self._embed = None if is_folded else place.randn(_VOCAB, hidden)
        self._fc = matrix(hidden, hidden if is_folded else 2 * hidden)
        self._gate = None if is_folded else matrix(wide, hidden)
        self._up, self._down = matrix(wide, hidden), matrix(hidden, wide)
        self._token_fc = place.randn(_VOCAB, hidden) if is_folded else None
        self._token_gate = place.randn(_VOCAB, wide) if is_folded else None
        self._norm = torch.ones(hidden, device=place.device)
        self._torch_norm = self._norm.to(place.dtype)
        self._tokens = place.ints(*(7 * row % _VOCAB for row in range(rows)))
        self._source = place.ints(*(row // 3 for row in range(rows)))
        self._features = place.randn(rows, hidden)
        self._workspace = place.poison(rows, ops.feature_sample_workspace(hidden, wide))
        shapes = [m.shape for m in (self._fc, self._gate, self._up, self._down) if m is not None]
        size = max(ops.linear_workspace(*shape, rows) for shape in shapes)
        self._lent = torch.zeros(size, device=place.device)
        self._out = place.poison(rows, hidden)

    @classmethod
    def folded(cls, model: Model, rows: int, place: Place) -> FeatureSample:
        """With both tables."""
        return cls(model, rows, place, is_folded=True)

    def ours(self) -> Tensors:
        ops.feature_sample(
            self._tokens,
            self._source,
            self._features,
            self._embed,
            self._fc,
            None,
            self._norm,
            self._gate,
            self._up,
            self._down,
            self._token_fc,
            self._token_gate,
            eps=EPS,
            workspace=self._workspace,
            linear_workspace=self._lent,
            out=self._out,
        )
        return (self._out,)

    def torchs(self) -> Tensors:
        f, tokens = self._features[self._source], self._tokens
        if self._token_fc is not None and self._token_gate is not None:
            h, gate = self._token_fc[tokens] + F.linear(f, self._fc), self._token_gate[tokens]
        else:
            assert self._embed is not None
            assert self._gate is not None
            e = self._embed[tokens]
            h, gate = F.linear(torch.cat([e, f], -1), self._fc), F.linear(e, self._gate)
        up = F.linear(F.rms_norm(h, h.shape[1:], self._torch_norm, EPS), self._up)
        return (h + F.linear(F.silu(gate) * up, self._down),)

    def apart(self) -> Tensors:
        f, tokens = self._features[self._source], self._tokens
        pairs = self._out.new_empty(len(tokens), 2 * self._wide)
        gate, up = pairs[:, : self._wide], pairs[:, self._wide :]
        multiply = partial(ops.linear, workspace=self._lent)
        if self._token_fc is not None and self._token_gate is not None:
            gate.copy_(self._token_gate[tokens])
            h = multiply(f, self._fc, residual=self._token_fc[tokens])
        else:
            assert self._embed is not None
            assert self._gate is not None
            e = self._embed[tokens]
            multiply(e, self._gate, out=gate)
            h = multiply(torch.cat([e, f], -1), self._fc)
        multiply(ops.rms_norm(h, self._norm, EPS), self._up, out=up)
        return (multiply(ops.activate(pairs), self._down, residual=h),)


@dataclass
class _Round:
    """Of ``rows`` sequences in the middle of a round: all are open, ``_STEP`` tokens drafted."""

    settings: torch.Tensor
    costs: torch.Tensor
    prior: torch.Tensor
    posterior: torch.Tensor
    slots: torch.Tensor
    seed: torch.Tensor
    ints: torch.Tensor
    """``[7, B]``: position, limit, is_sampled, accept_length, is_open, drafted, length."""
    confidence: torch.Tensor
    score: torch.Tensor

    @classmethod
    def make(cls, rows: int, place: Place) -> _Round:
        settings = ControlOptions().settings().tensor()
        prior = prior_beliefs(settings, place.device)
        sure = prior.clone()
        sure[_OWN("bias_precision")], sure[_OWN("bias_shift")] = 1e12, 0.0
        sure[_ALPHAS], sure[_BETAS] = 0.9e9, 0.1e9
        values = (5, _CAP, 0, _ACCEPTED, 1, _STEP, _STEP)
        return cls(
            settings=settings.to(place.device),
            costs=torch.tensor(_COSTS, dtype=torch.float64, device=place.device),
            prior=prior,
            posterior=sure.repeat(rows, 1),
            slots=place.ints(*range(rows)),
            seed=torch.arange(rows, device=place.device),
            ints=place.ints(*values)[:, None].repeat(1, rows),
            confidence=torch.full((rows, _CAP), 0.8, device=place.device),
            score=torch.full((rows,), -0.2, device=place.device),
        )


class DraftControl:
    """torch: the decision by the means, elementwise over the batch."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._at, self._its = (_Round.make(rows, place) for _ in range(2))
        _, step, lower, verify, row = _COSTS
        rate = 1.0 / (lower + verify)
        self._go, self._keep = rate * (step + row), rate * (lower + row)

    def ours(self) -> Tensors:
        at = self._at
        position, limit, is_sampled, _, is_open, drafted, length = at.ints
        ops.draft_control(
            _KIND,
            _STEP,
            at.settings,
            at.costs,
            at.posterior,
            at.slots,
            at.seed,
            position,
            limit,
            is_sampled,
            None,
            at.score,
            None,
            is_open,
            drafted,
            length,
            at.confidence,
        )
        return is_open, drafted, length, at.confidence

    def torchs(self) -> Tensors:
        at = self._its
        last = at.score.exp()
        at.confidence[:, _STEP - 1] = last
        bias = at.posterior[:, _OWN("bias_shift")] / at.posterior[:, _OWN("bias_precision")]
        known = at.confidence[:, :_STEP].double() + bias[:, None]
        chance = known.clamp(0.0, 1.0).prod(1)
        bins = (last * NUM_BINS).long().clamp(max=NUM_BINS - 1)[:, None]
        alpha, beta = (at.posterior[:, part].gather(1, bins)[:, 0] for part in (_ALPHAS, _BETAS))
        goes_on = chance * (alpha / (alpha + beta)) > self._go
        is_kept = goes_on | (chance >= self._keep)
        drafted = torch.full_like(at.slots, _STEP)
        return goes_on.int(), drafted, _STEP - 1 + is_kept.int(), at.confidence


class DraftControlUpdate:
    """torch: forgetting over whole rows, then what the round adds."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._at, self._its = (_Round.make(rows, place) for _ in range(2))
        options = ControlOptions().settings()
        self._discount, self._noise = options.discount, options.noise_var
        self._forgotten = torch.ones_like(self._its.prior)
        for name in ("alpha", "beta", "threshold"):
            self._forgotten[_OWN(name)] = 0.0
        fixed, step, lower, verify, row = _COSTS
        self._time = fixed + _STEP * step + lower + verify + _STEP * row
        self._plain = lower + verify

    def ours(self) -> Tensors:
        at = self._at
        _, limit, _, accept_length, _, drafted, length = at.ints
        ops.draft_control_update(
            _KIND,
            at.settings,
            at.costs,
            at.slots,
            limit,
            drafted,
            length,
            at.confidence,
            accept_length,
            at.posterior,
        )
        return (at.posterior,)

    def torchs(self) -> Tensors:
        at, q, tokens = self._its, self._its.posterior, _ACCEPTED + 1.0
        q += (1.0 - self._discount) * self._forgotten * (at.prior - q)
        judged = at.confidence[:, : _ACCEPTED + 1].double()
        q[:, _OWN("bias_precision")] += judged.shape[1] / self._noise
        q[:, _OWN("bias_shift")] += (_ACCEPTED - judged.sum(1)) / self._noise
        bins = (judged * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        one = torch.ones_like(judged)
        q[:, _ALPHAS].scatter_add_(1, bins[:, : _ACCEPTED - 1], one)
        q[:, _BETAS].scatter_add_(1, bins[:, _ACCEPTED - 1 : _ACCEPTED], one)
        q[:, _OWN("gain_weight")] += 1.0
        q[:, _OWN("gain_sum")] += tokens - self._time / self._plain
        q[:, _OWN("tokens")] += tokens
        q[:, _OWN("time")] += self._time
        q[:, _OWN("idle")] = 0.0
        return (q,)
