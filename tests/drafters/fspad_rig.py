"""One-layer drafters of tiny checkpoints, stepped by hand along a text that is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specrt.cache import CacheBatch
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.length.costs import RoundCost
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams, sampling_row
from specrt.tree import MAX_NODES
from specrt.types import Proposal, SequenceState

VOCAB = 97


def make_drafter(model: LlamaModel, path: Path, **options: Any) -> FspadDrafter:
    chosen = DrafterOptions(**options)
    drafter = load_drafter(path, model, None, chosen)
    assert isinstance(drafter, FspadDrafter)
    return drafter


class Rig:
    """A target, a drafter and one sequence, stepped by hand along a text that is given."""

    def __init__(self, model: LlamaModel, drafter: FspadDrafter, ids: list[int]) -> None:
        self.model, self.drafter = model, drafter
        self.features = features_of(model, ids)
        self.ids = ids

    def state(self, length: int, **options: float) -> SequenceState:
        params = SamplingParams(**{"seed": 0} | options)  # type: ignore[arg-type]
        row = sampling_row(params, length)
        return SequenceState(self.ids[:length], length, 400, params.seed, params.temperature, row)

    def fresh(self, length: int, budget: Budget, **options: float) -> Proposal:
        """The tree of a drafter that has just read the first ``length`` tokens."""
        state = self.state(length, **options)
        self.begin(state)
        tree = self.drafter.propose([state], budget)
        self.drafter.finish(state)
        return tree

    def begin(self, state: SequenceState, piece: int = 128) -> None:
        """Start it, and hand over the features of all tokens but the last, piece by piece."""
        self.drafter.start(state)
        last = len(state.token_ids) - 1
        for start in range(0, last, piece):
            part = self.features[None, start : min(start + piece, last)]
            self.drafter.prefill(state, start, {"final": part})


def features_of(model: LlamaModel, ids: list[int]) -> torch.Tensor:
    cache = model.new_cache()
    batch = CacheBatch(cache, [cache.open(len(ids) + MAX_NODES)])
    parts = [taps["final"][0].clone() for _, taps in model.extend(ids, batch, taps=("final",))]
    return torch.cat(parts)


def budget(**shape: int) -> Budget:
    return Budget(MAX_NODES, RoundCost(), DraftParams(**shape))
