"""Deciding on a drafted token and learning from a round, against the same rules in torch.

Torch decides for the batch at once: ``torch.distributions`` draws, the rest is elementwise. Its
draws are not counter-based, so its decisions depend on the batch; ours do not. Learning is from a
round of four drafted tokens.
"""

from __future__ import annotations

import torch
from torch.distributions import Beta

from bench.harness import Row, against_torch, parser, report, start
from specrt.draft.length.control import ControlOptions
from specrt.ops import draft_control, draft_control_update
from specrt.ops.draft_control import ControlKind, prior_beliefs

CAP, DRAFTED = 8, 4
COSTS = (0.06, 0.2, 0.12, 0.9, 0.07)


class Ours:
    """A batch in the middle of a round: ``DRAFTED`` tokens are drafted, all sequences are open."""

    def __init__(self, kind: ControlKind, batch: int) -> None:
        self.kind, self.step = kind, DRAFTED
        self.settings = ControlOptions().settings().tensor()
        self.costs = torch.tensor(COSTS, dtype=torch.float64)
        self.posterior = prior_beliefs(self.settings).repeat(batch, 1)
        self.slots = torch.arange(batch).int()
        self.seed = torch.arange(batch)
        ints = torch.zeros(7, batch, dtype=torch.int32)
        self.position, self.limit, self.is_sampled, self.accept_length = ints[:4]
        self.is_open, self.drafted, self.length = ints[4:]
        self.confidence = torch.full((batch, CAP), 0.8)
        self.score = torch.full((batch,), -0.2)
        self.limit.fill_(CAP)
        self.length.fill_(DRAFTED)
        self.drafted.fill_(DRAFTED)
        self.accept_length.fill_(2)

    def decide(self) -> None:
        self.is_open.fill_(1)  # the last call may have closed a sequence
        draft_control(
            self.kind,
            self.step,
            self.settings,
            self.costs,
            self.posterior,
            self.slots,
            self.seed,
            self.position,
            self.limit,
            self.is_sampled,
            None,
            self.score,
            None,
            self.is_open,
            self.drafted,
            self.length,
            self.confidence,
        )

    def update(self) -> None:
        draft_control_update(
            self.kind,
            self.settings,
            self.costs,
            self.slots,
            self.limit,
            self.drafted,
            self.length,
            self.confidence,
            self.accept_length,
            self.posterior,
        )


class Torch:
    """The same rules as elementwise torch over the batch."""

    def __init__(self, batch: int) -> None:
        self.alpha, self.beta = torch.ones(batch), torch.ones(batch)
        self.precision, self.shift = torch.full((batch,), 20.0), torch.zeros(batch)
        self.next_alpha, self.next_beta = torch.ones(batch, 8), torch.ones(batch, 8)
        self.confidence = torch.full((batch, CAP), 0.8)
        self.score = torch.full((batch,), -0.2)
        self.accepted = torch.full((batch,), 2)
        self.rows = torch.arange(batch)

    def _bias(self) -> torch.Tensor:
        return self.shift / self.precision + torch.randn_like(self.shift) * self.precision.rsqrt()

    def decide_beta(self) -> torch.Tensor:
        return torch.rand_like(self.alpha) < Beta(self.alpha, self.beta).sample()

    def decide_calibration(self) -> torch.Tensor:
        theta = (self.score.exp() + self._bias()).clamp_(0.0, 1.0)
        return torch.rand_like(theta) < theta

    def decide_cost_aware(self) -> torch.Tensor:
        self.confidence[:, DRAFTED - 1] = last = self.score.exp()
        chance = (self.confidence[:, :DRAFTED] + self._bias()[:, None]).clamp_(0.0, 1.0).prod(1)
        bins = (last * 8).long().clamp_(max=7)
        laws = Beta(self.next_alpha[self.rows, bins], self.next_beta[self.rows, bins])
        return (chance * laws.sample() > 0.27) | (chance >= 0.19)

    def update_beta(self) -> None:
        self.alpha += self.accepted
        self.beta += self.accepted < DRAFTED

    def update_calibration(self) -> None:
        count = torch.clamp(self.accepted + 1, max=DRAFTED)
        is_judged = torch.arange(DRAFTED) < count[:, None]
        residuals = self.accepted - (self.confidence[:, :DRAFTED] * is_judged).sum(1)
        self.precision += count / 0.2
        self.shift += residuals / 0.2

    def update_cost_aware(self) -> None:
        self.update_calibration()
        before = (self.confidence[:, : DRAFTED - 1] * 8).long().clamp_(max=7)
        behind = torch.arange(1, DRAFTED)
        is_accepted = (behind < self.accepted[:, None]).float()
        is_missed = (behind == self.accepted[:, None]).float()
        self.next_alpha.mul_(0.99).scatter_add_(1, before, is_accepted)
        self.next_beta.mul_(0.99).scatter_add_(1, before, is_missed)


def kind_rows(kind: ControlKind, batch: int) -> list[Row]:
    ours, in_torch = Ours(kind, batch), Torch(batch)
    name = kind.name.lower().removesuffix("_ts")
    facts = {"kind": name, "batch": batch}
    contenders = [getattr(in_torch, f"{op}_{name}") for op in ("decide", "update")]
    return [
        against_torch(ours.decide, contenders[0], op="decide", **facts),
        against_torch(ours.update, contenders[1], op="update", **facts),
    ]


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    rows: list[Row] = []
    for batch in (1,) if args.quick else (1, 16, 64):
        for kind in (ControlKind.BETA_TS, ControlKind.CALIBRATION_TS, ControlKind.COST_AWARE):
            rows += kind_rows(kind, batch)
    report("draft_control", rows, save=args.save)


if __name__ == "__main__":
    main()
