"""A drafter that makes something wrong of good proposals, and what must come of it all the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from specrt.draft.base import Budget, Drafter
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.types import Proposal, SequenceState
from tests.engine.support import RandomTreeDrafter, make_engine, prompts, texts

VOCAB = 97
ASKED = prompts(4, VOCAB)
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=24, temperature=0.9, seed=5, ignore_eos=True)
SAMPLINGS = {"greedy": GREEDY, "seeded": SEEDED}

Fields = dict[str, torch.Tensor]
Answers = Mapping[tuple[int, ...], list[int]]
Plain = Mapping[str, list[list[int]]]
"""What is said undrafted, of each sampling."""


class Hostile(RandomTreeDrafter):
    """Random trees with right tokens in them, of which something is then made wrong.

    Args:
        answers: as of :class:`RandomTreeDrafter`.
        spoil: writes to, or replaces, the fields of a proposal.
        max_nodes: of its trees, whatever the budget.
    """

    def __init__(
        self,
        answers: Answers,
        spoil: Callable[[Fields], None],
        max_nodes: int = 12,
    ) -> None:
        super().__init__(answers, VOCAB, max_nodes, hit_rate=0.6)
        self._most = max_nodes
        self._spoil = spoil

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        tree = super().propose(states, Budget(self._most, budget.cost))
        fields = dict(vars(tree))
        self._spoil(fields)
        return Proposal(**fields)


def told(plain: Plain, name: str) -> Answers:
    return {tuple(prompt): answer for prompt, answer in zip(ASKED, plain[name], strict=True)}


def check(model: LlamaModel, plain: Plain, make: Callable[[Answers], Drafter]) -> None:
    """Texts and pages, greedy and seeded, with little room and with much."""
    for name, params in SAMPLINGS.items():
        for max_nodes in (3, 64):
            engine = make_engine(model, make(told(plain, name)), max_batch=3, max_nodes=max_nodes)
            results = engine.generate(ASKED, params)
            assert [result.error for result in results] == [None] * len(ASKED)
            assert texts(results) == plain[name]
            assert engine.cache.num_free_pages == engine.cache.num_pages > 0
