"""Batches of sequences whose drafting is controlled, stepped by hand."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from specrt.ops import draft_control, draft_control_update
from specrt.ops.draft_control import ControlSettings, prior_beliefs

Tensor = torch.Tensor
SETTINGS = ControlSettings(
    draft_len=3, threshold=0.5, adapt_rate=0.1, target_rejection=0.3, alpha=1.5, beta=0.7,
    bias_mean=-0.05, bias_var=0.04, noise_var=0.2, discount=0.9, gain_mean=0.4, gain_weight=1.5,
    gain_var=0.3,
)  # fmt: skip
COSTS = (0.06, 0.2, 0.12, 0.9, 0.07)
POISON = -77


def i32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Batch:
    """Every tensor of both launches."""

    settings: Tensor
    costs: Tensor
    posterior: Tensor
    slots: Tensor
    seed: Tensor
    position: Tensor
    limit: Tensor
    is_sampled: Tensor
    slope: Tensor | None
    is_open: Tensor
    drafted: Tensor
    length: Tensor
    confidence: Tensor
    accept_length: Tensor
    num_nodes: Tensor

    @classmethod
    def make(cls, batch: int, cap: int = 6, settings: ControlSettings = SETTINGS) -> Batch:
        ints = torch.full((4, batch), POISON, dtype=torch.int32)
        return cls(
            settings=settings.tensor(),
            costs=torch.tensor(COSTS, dtype=torch.float64),
            posterior=prior_beliefs(settings.tensor()).repeat(batch, 1),
            slots=torch.arange(batch).int(),
            seed=torch.arange(batch) * 101 - 7,
            position=(torch.arange(batch) * 13 + 5).int(),
            limit=torch.full((batch,), cap).int(),
            is_sampled=(torch.arange(batch) % 2).int(),
            slope=torch.tensor([0.7, 1.1]),
            is_open=ints[0],
            drafted=ints[1],
            length=ints[2],
            confidence=torch.full((batch, cap), 9.0),
            accept_length=torch.zeros(batch, dtype=torch.int32),
            num_nodes=ints[3],
        )

    def to(self, device: torch.device) -> Batch:
        """A copy there; what are views of one tensor do not stay so."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{n: None if t is None else t.to(device, copy=True) for n, t in tensors.items()}
        )

    def decide(self, kind: int, step: int, score=None, evidence=None) -> None:
        draft_control(
            kind, step, self.settings, self.costs, self.posterior, self.slots, self.seed,
            self.position, self.limit, self.is_sampled, self.slope, score, evidence, self.is_open,
            self.drafted, self.length, self.confidence, self.num_nodes,
        )  # fmt: skip

    def update(self, kind: int) -> None:
        draft_control_update(
            kind, self.settings, self.costs, self.slots, self.limit, self.drafted, self.length,
            self.confidence, self.accept_length, self.posterior,
        )  # fmt: skip

    def rows(self, order: list[int]) -> Batch:
        """The sequences ``order``, each with the posterior it had."""
        shared = {"settings", "costs", "slope", "slots"}
        picked = {
            f.name: getattr(self, f.name)[order] for f in fields(self) if f.name not in shared
        }
        return replace(self, slots=torch.arange(len(order)).int(), **picked)

    def outputs(self) -> list[Tensor]:
        return [self.is_open, self.drafted, self.length, self.confidence, self.posterior]


def equal_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    def bits(t: Tensor) -> Tensor:
        return t.contiguous().view(torch.uint8)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


@dataclass
class World:
    """What drafting and verification say: ``[steps, B]`` each, evidence ``[steps, B, 2]``."""

    score: Tensor
    evidence: Tensor
    agrees: Tensor

    @classmethod
    def random(cls, batch: int, steps: int, seed: int) -> World:
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(batch, generator=generator).sqrt()
        spread = torch.rand(steps, batch, generator=generator)
        score = (chance * (0.5 + 0.5 * spread)).log()
        evidence = 0.5 * torch.randn(steps, batch, 2, generator=generator) + 0.3
        agrees = torch.rand(steps, batch, generator=generator) < chance
        return cls(score, evidence, agrees)

    def to(self, device: torch.device) -> World:
        return World(*(t.to(device) for t in (self.score, self.evidence, self.agrees)))

    def rows(self, order: list[int]) -> World:
        return World(self.score[:, order], self.evidence[:, order], self.agrees[:, order])

    def play(self, batch: Batch, kind: int, uses_head: bool) -> None:
        """One round, its outcome learned."""
        batch.decide(kind, 0)
        for step in range(1, len(self.score) + 1):
            evidence = self.evidence[step - 1] if uses_head else None
            batch.decide(kind, step, self.score[step - 1], evidence)
        accepted = self.agrees.int().cumprod(0).sum(0).int()
        batch.accept_length.copy_(torch.minimum(accepted, batch.length))
        batch.update(kind)


def play(
    batch: Batch, kind: int, num_rounds: int, uses_head=True, order=None
) -> list[list[Tensor]]:
    """Outputs of each round; ``order`` names the sequences that ``batch`` holds."""
    rounds = []
    for number in range(num_rounds):
        size = len(batch.seed) if order is None else 16
        world = World.random(size, batch.confidence.shape[1], number)
        (world if order is None else world.rows(order)).play(batch, kind, uses_head)
        rounds.append([t.clone() for t in batch.outputs()])
        batch.position.add_(batch.accept_length + 1)
    return rounds
