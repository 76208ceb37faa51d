"""What every drafter keeps to; ``test_contract.py`` puts ours, or anybody's, through it.

A check takes a :class:`Subject` and asserts. Texts are those of plain decoding throughout, with a
drafter that is watched (:class:`Watched`): its proposals come in the same few tensors again and
again, and it is told of every end twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakSet

import torch

from specrt.cache import KVCache
from specrt.device import Device
from specrt.draft.base import Budget, Drafter, DraftParams, ShapedDrafter
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.tree import check_proposal, settle
from specrt.types import AcceptResult, DraftTree, Proposal, SequenceState
from tests.engine.support import make_engine, prompts

_LENGTHS = (24, 3, 17, 1, 30, 9)
SHAPES = (
    DraftParams(depth=0),
    DraftParams(depth=1),
    DraftParams(total_tokens=1),
    DraftParams(total_tokens=4),
    DraftParams(top_k=1),
    DraftParams(depth=3, top_k=2, total_tokens=7),
)


class Asked(NamedTuple):
    """A request."""

    prompt: list[int]
    sampling: SamplingParams
    draft: DraftParams | None = None


@dataclass(frozen=True)
class Subject:
    """Whom the contract is held against."""

    name: str
    model: LlamaModel
    """The target."""
    make: Callable[[], Drafter]
    """A new drafter for it, each time."""
    plain: dict[tuple[object, ...], list[int]] = field(default_factory=dict)
    """What plain decoding said, by prompt and sampling."""

    def asked(self, temperature: float, draft: DraftParams | None = None) -> list[Asked]:
        """Prompts and answers of very unequal lengths."""
        made = prompts(len(_LENGTHS), self.model.config.vocab_size)
        return [
            Asked(
                prompt,
                SamplingParams(
                    max_new_tokens=length,
                    temperature=temperature,
                    top_p=0.95 if temperature else 1.0,
                    seed=100 + length,
                    ignore_eos=True,
                ),
                draft,
            )
            for prompt, length in zip(made, _LENGTHS, strict=True)
        ]

    def expected(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What each is answered alone, undrafted."""
        said = []
        for prompt, sampling, _ in asked:
            key = (tuple(prompt), sampling)
            if key not in self.plain:
                result = make_engine(self.model, max_batch=1).generate(prompt, sampling)
                self.plain[key] = result.token_ids
            said.append(self.plain[key])
        return said


class Watched:
    """A drafter whose every proposal is noted, and comes in tensors that are refilled."""

    def __init__(self, inner: Drafter, vocab_size: int) -> None:
        self.inner = inner
        self.taps = inner.taps
        self.trees: list[tuple[Budget, DraftTree]] = []
        """What was settled of each proposal."""
        self.starts: list[int] = []
        """How many tokens behind its prompt each sequence had when it started."""
        self.errors: list[Exception] = []
        self.most_open = 0
        """Proposals whose outcome was not known yet."""
        self.is_sampled = False
        self._vocab_size = vocab_size
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self._open: dict[Proposal, Proposal] = {}
        if isinstance(inner, ShapedDrafter):
            self.check = inner.check

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """An engine goes on without a drafter that raises, and so hides it."""
        try:
            yield
        except Exception as error:
            self.errors.append(error)
            raise

    def start(self, state: SequenceState) -> None:
        self.starts.append(len(state.token_ids) - state.prompt_len)
        with self._noted():
            self.inner.start(state)

    def prefill(self, state: SequenceState, start: int, taps: Mapping[str, torch.Tensor]) -> None:
        with self._noted():
            self.inner.prefill(state, start, taps)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        with self._noted():
            proposal = self.inner.propose(states, budget)
            self._check(proposal, states, budget)
        handed = replace(
            proposal,
            draft_tokens=self._refilled("draft_tokens", proposal.draft_tokens),
            parents=self._refilled("parents", proposal.parents),
            num_nodes=self._refilled("num_nodes", proposal.num_nodes),
        )
        self._open[handed] = proposal
        self.most_open = max(self.most_open, len(self._open))
        return handed

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        with self._noted():
            self.inner.observe(states, self._open.pop(proposal), result, taps)

    def finish(self, state: SequenceState) -> None:
        with self._noted():
            self.inner.finish(state)
            self.inner.finish(state)

    def _check(self, proposal: Proposal, states: Sequence[SequenceState], budget: Budget) -> None:
        check_proposal(proposal, len(states), Device())
        count = proposal.num_nodes
        assert (count >= 1).all() and (count <= budget.max_nodes).all(), "more than it may"
        roots = torch.tensor([state.token_ids[-1] for state in states], dtype=torch.int32)
        room = torch.full((len(states),), budget.max_nodes, dtype=torch.int32)
        tree = settle(proposal, roots, room, self._vocab_size)
        assert torch.equal(tree.num_nodes, count), "not all it gave is a tree"
        self.trees.append((budget, tree))
        self.is_sampled |= proposal.draft_probs is not None

    def _refilled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.setdefault((name, tensor.shape), torch.empty_like(tensor))
        return buffer.copy_(tensor)


@contextmanager
def no_pages_left() -> Iterator[None]:
    """Of every cache that is made meanwhile, the drafter's own ones too, all pages come back."""
    made: WeakSet[KVCache] = WeakSet()
    open_one = KVCache.open

    def noted(cache: KVCache, *arguments: object, **options: object) -> object:
        made.add(cache)
        return open_one(cache, *arguments, **options)  # type: ignore[arg-type]

    KVCache.open = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        KVCache.open = open_one  # type: ignore[method-assign]
    assert made
    for cache in made:
        assert cache.num_free_pages == cache.num_pages


def drain(engine: Engine, asked: Sequence[Asked]) -> list[GenerationResult]:
    """Answer requests that are added one by one while others run."""
    waiting, handles, results = deque(asked), [], {}
    while waiting or not engine.is_idle:
        if waiting:
            handles.append(engine.add(*waiting.popleft()))
        for chunk in engine.step():
            if chunk.result is not None:
                results[chunk.handle] = chunk.result
    return [results[handle] for handle in handles]


def run(subject: Subject, asked: Sequence[Asked], **limits: int) -> Watched:
    """Answer as plain decoding does, and give everything back."""
    watched = Watched(subject.make(), subject.model.config.vocab_size)
    with no_pages_left():
        results = drain(make_engine(subject.model, watched, **limits), asked)
    assert watched.errors == []
    assert [result.error for result in results] == [None] * len(asked)
    if not watched.is_sampled:  # then only the law is the same
        assert [result.token_ids for result in results] == subject.expected(asked)
    return watched


# --- the checks -----------------------------------------------------------------------------------


def greedy(subject: Subject) -> None:
    """Batches of unequal lengths, which sequences join and leave."""
    run(subject, subject.asked(0.0), max_batch=3)


def seeded(subject: Subject) -> None:
    """The same above temperature 0."""
    run(subject, subject.asked(0.8), max_batch=3)


def alone(subject: Subject) -> None:
    """One sequence after another; the second time with all that was learned."""
    run(subject, [*subject.asked(0.0), *subject.asked(0.0)], max_batch=1)


def budgets(subject: Subject) -> None:
    """No tree has more nodes than there may be (:class:`Watched` looks)."""
    for max_nodes in (1, 2, 5, 128):
        run(subject, subject.asked(0.0), max_batch=2, max_nodes=max_nodes)


def shapes(subject: Subject) -> None:
    """DraftParams say what a tree is at most."""
    for shape in SHAPES:
        if _is_refused(subject, shape):
            continue
        watched = run(subject, subject.asked(0.0, shape), max_batch=3)
        sizes = [_checked_size(tree, shape) for _, tree in watched.trees]
        assert max(sizes) > 1 or shape.depth == 0 or shape.total_tokens == 1, "nothing was drafted"


def groups(subject: Subject) -> None:
    """Sequences of several shapes run together, so several proposals are open at once."""
    taken = [None, *(shape for shape in SHAPES if not _is_refused(subject, shape))]
    asked = [
        one._replace(draft=taken[index % len(taken)])
        for index, one in enumerate([*subject.asked(0.0), *subject.asked(0.7)])
    ]
    watched = run(subject, asked, max_batch=6)
    assert watched.most_open > 1
    for budget, tree in watched.trees:
        _checked_size(tree, budget.params)


def preemption(subject: Subject) -> None:
    """A sequence is finished, and started again with more tokens than its prompt."""
    vocab_size = subject.model.config.vocab_size
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    asked = [Asked([(7 * i + n) % vocab_size for i in range(50)], sampling) for n in range(3)]
    watched = run(subject, asked, max_batch=3, max_cached_tokens=4 * 64, max_nodes=8)
    assert max(watched.starts) > 0


def early_ends(subject: Subject) -> None:
    """Aborted in the middle, or before they began; the others do not notice."""
    asked = subject.asked(0.0)
    watched = Watched(subject.make(), subject.model.config.vocab_size)
    with no_pages_left():
        engine = make_engine(subject.model, watched, max_batch=3)
        handles = [engine.add(*one) for one in asked]
        results = {}
        for number in range(200):
            if number in (0, 2):
                engine.abort(handles[number * 2])
            results |= {c.handle: c.result for c in engine.step() if c.result is not None}
            if engine.is_idle:
                break
    assert watched.errors == []
    for handle, tokens in zip(handles, subject.expected(asked), strict=True):
        said = results[handle].token_ids
        if not watched.is_sampled:
            assert said == tokens[: len(said)]
        if results[handle].finish_reason != "abort":
            assert len(said) == len(tokens)
    assert [results[handle].finish_reason for handle in handles].count("abort") == 2


def strangers(subject: Subject) -> None:
    """A sequence that never started may be finished (its start may have failed)."""
    state = SequenceState([1, 2], 2, 10, seed=0, temperature=0.0)
    with no_pages_left():
        watched = Watched(subject.make(), subject.model.config.vocab_size)
        watched.finish(state)
        make_engine(subject.model, watched).generate([1, 2], max_new_tokens=4)
    assert watched.errors == []


def repeated(subject: Subject) -> None:
    """Two runs of given shapes propose the same trees."""
    shape = next((shape for shape in reversed(SHAPES) if not _is_refused(subject, shape)), None)
    asked = [*subject.asked(0.0, shape), *subject.asked(0.8, shape)]
    # Of larger chunks the clock says how many prompts a step takes, and so who runs together.
    first, second = (run(subject, asked, max_batch=3, prefill_chunk=32).trees for _ in range(2))
    assert len(first) == len(second)
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert torch.equal(one.draft_tokens, other.draft_tokens)
        assert torch.equal(one.parents, other.parents)
        assert torch.equal(one.num_nodes, other.num_nodes)


CHECKS: tuple[Callable[[Subject], None], ...] = (
    greedy,
    seeded,
    alone,
    budgets,
    shapes,
    groups,
    preemption,
    early_ends,
    strangers,
    repeated,
)


def _is_refused(subject: Subject, shape: DraftParams) -> bool:
    """Whether the drafter says beforehand that it does not take a shape."""
    drafter = subject.make()
    if not isinstance(drafter, ShapedDrafter):
        return False
    try:
        drafter.check(shape)
    except ValueError:
        return True
    return False


def _checked_size(tree: DraftTree, shape: DraftParams) -> int:
    """Nodes of the largest tree, once all are within the shape."""
    for row, count in enumerate(tree.num_nodes.tolist()):
        if shape.total_tokens is not None:
            assert count <= shape.total_tokens
        if shape.depth is not None:
            assert int(tree.depth[row, :count].max()) <= shape.depth
        if shape.top_k is not None and count > 1:
            assert int(tree.parents[row, 1:count].bincount().max()) <= shape.top_k
    return int(tree.num_nodes.max())
