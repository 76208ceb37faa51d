"""Small engines and awkward drafters for the engine's tests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, Drafter, EmptyDrafter
from specrt.engine.drafting import Drafting
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.tree import TreeBuilder, stack
from specrt.types import AcceptResult, Proposal, SequenceState


class LetterTokenizer:
    """Token i is the i-th printable character; enough of a tokenizer for the engine."""

    special_tokens: Mapping[int, str] = MappingProxyType({})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(32 + token) for token in ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: object) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


def make_model(
    path: Path, dtype: torch.dtype = torch.float32, has_graphs: bool = True
) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    weights = load_weights(path, config, dtype)
    return LlamaModel(config, weights, Device(is_eager=not has_graphs))


def make_engine(model: LlamaModel, drafter: Drafter | None = None, **options: int) -> Engine:
    return Engine(model, drafter or EmptyDrafter(), LetterTokenizer(), **options)


def raise_what_drafters_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine fail where its drafter does.

    Else the sequences of a batch would start again, be drafted one by one, and no log would say so:
    texts stay right, and a test of what whole batches do would see nothing of it.
    """

    def raise_it(self: Drafting, requests: object, error: Exception) -> None:
        raise error

    monkeypatch.setattr(Drafting, "_blame", raise_it)


def prompts(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of very unequal lengths; some repeat themselves, the first is one token long."""
    rng = random.Random(seed)
    made = [[rng.randrange(vocab_size)]]
    while len(made) < count:
        piece = [rng.randrange(vocab_size) for _ in range(rng.choice([1, 3, 17, 40]))]
        made.append(piece * rng.choice([1, 2, 4]))
    return made


class RandomTreeDrafter:
    """Proposes random trees in which, here and there, the right token turns up.

    Args:
        answers: for each prompt (as a tuple) the output that plain decoding gave.
        num_nodes: nodes of each tree.
        hit_rate: chance that a node carries the token plain decoding would say there.
    """

    taps: tuple[str, ...] = ()

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], list[int]],
        vocab_size: int,
        num_nodes: int,
        hit_rate: float = 0.5,
        seed: int = 0,
    ) -> None:
        self._answers = answers
        self._vocab_size = vocab_size
        self._num_nodes = num_nodes
        self._hit_rate = hit_rate
        self._rng = random.Random(seed)

    def start(self, state: SequenceState) -> None: ...

    def prefill(
        self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]
    ) -> None: ...

    def finish(self, state: SequenceState) -> None: ...

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None: ...

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        return stack([self._tree(state, budget.max_nodes) for state in states])

    def _tree(self, state: SequenceState, max_nodes: int) -> TreeBuilder:
        rng = self._rng
        tree = TreeBuilder(state.token_ids[-1])
        answer = self._answers[tuple(state.token_ids[: state.prompt_len])]
        said = len(state.token_ids) - state.prompt_len
        # Sequences of one batch get trees of different sizes.
        size = rng.randint(max(1, self._num_nodes // 2), min(self._num_nodes, max_nodes))
        depths = [0]
        while len(tree) < size:
            # Deep nodes are preferred, or trees would be all fan and no depth.
            parent = rng.choice([len(tree) - 1, rng.randrange(len(tree))])
            depth = depths[parent]
            right = answer[said + depth] if said + depth < len(answer) else 0
            hit = rng.random() < self._hit_rate
            node = tree.add(parent, right if hit else rng.randrange(self._vocab_size))
            depths += [depth + 1] * (node == len(depths))
        return tree


def texts(results: Sequence[GenerationResult]) -> list[list[int]]:
    return [result.token_ids for result in results]


def sampled(seed: int, **options: object) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=40,
        temperature=0.8,
        top_p=0.95,
        seed=seed,
        **options,  # type: ignore[arg-type]
    )
