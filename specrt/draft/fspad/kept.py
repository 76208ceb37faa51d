"""What FSPAD's drafter keeps of a sequence."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from specrt.cache import CachedSequence
from specrt.types import SequenceState


@dataclass(eq=False)
class Draft:
    """What is kept for one sequence."""

    cached: CachedSequence
    _parts: list[torch.Tensor]
    """What ``pending`` consists of; joined when it is read, for many rounds may be another's."""

    @property
    def pending(self) -> torch.Tensor:
        """``[m, H]``: features whose pairs have not been run."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    @pending.setter
    def pending(self, features: torch.Tensor) -> None:
        self._parts = [features]

    def add(self, features: torch.Tensor) -> None:
        """Take features ``[n, H]``, which nobody else writes to."""
        self._parts.append(features.to(self._parts[0].dtype))


def kept_as(state: SequenceState) -> tuple[Hashable, list[int]]:
    """What its pairs are found by: pair i is of the feature behind tokens 0 to i, and of token
    i + 1."""
    return (state.cache_salt, *state.token_ids[:1]), state.token_ids[1:]
