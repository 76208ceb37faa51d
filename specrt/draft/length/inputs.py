"""What a round's decisions depend on: written on the host, one copy to a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specrt.device import Device
from specrt.draft.length.costs import DraftCosts
from specrt.ops.draft_control import NUM_COSTS
from specrt.types import SequenceState


class RoundInputs(NamedTuple):
    """Of B sequences; views of one tensor."""

    whole: torch.Tensor
    costs: torch.Tensor
    """``[5]`` float64, milliseconds."""
    seed: torch.Tensor
    """``[B]`` int64; those below are int32."""
    slots: torch.Tensor
    position: torch.Tensor
    limit: torch.Tensor
    is_sampled: torch.Tensor

    @classmethod
    def make(cls, batch: int, device: Device) -> RoundInputs:
        """Zeros there."""
        # Two int32 in an int64.
        whole = device.zeros(NUM_COSTS + 3 * batch, dtype=torch.int64)
        costs, seed, ints = whole.split([NUM_COSTS, batch, 2 * batch])
        return cls(whole, costs.view(torch.float64), seed, *ints.view(torch.int32).split(batch))


class HostInputs:
    """Those of a round on the host.

    Args:
        batch: B.
        max_draft: tokens that a round drafts at most.
    """

    def __init__(self, batch: int, max_draft: int) -> None:
        self.tensors = there = RoundInputs.make(batch, Device())
        self._max_draft = max_draft
        # The same memory through numpy, where small writes cost a tenth of torch's.
        self._costs, self._seeds = there.costs.numpy(), there.seed.numpy()
        self._positions, self._limits = there.position.numpy(), there.limit.numpy()
        self._modes, self.slots = there.is_sampled.numpy(), there.slots.numpy()

    def stage(
        self,
        states: Sequence[SequenceState],
        costs: DraftCosts,
        positions: Sequence[int] | None = None,
        caps: Sequence[int] | None = None,
    ) -> None:
        """Copy in all but the slots.

        Args:
            states: the B sequences. One near its end drafts no more than it can use.
            costs: of this round.
            positions: numbers that no other round of the same seed has; None: the lengths.
            caps: what each drafts at most; None: ``max_draft``.
        """
        self.price(costs)
        for row, state in enumerate(states):
            seed = state.seed % 2**64
            self._seeds[row] = seed - 2**64 if seed >= 2**63 else seed
            self._positions[row] = len(state.token_ids) if positions is None else positions[row]
            most = self._max_draft if caps is None else min(self._max_draft, caps[row])
            # The bonus token takes the last place.
            self._limits[row] = max(0, min(most, state.num_left - 1))
            self._modes[row] = state.temperature > 0.0

    def price(self, costs: DraftCosts) -> None:
        """Replace the costs."""
        self._costs[:] = (costs.fixed, costs.step, costs.lower, costs.verify, costs.row)
