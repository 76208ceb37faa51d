"""Trees of whatever a drafter hands over, against plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, OnAnotherGpu, held
from tests.oracles.tree_settle import settle

Tensor = torch.Tensor
SIMT_SCHEDULES = (1, 0, 2)
VOCAB, POISON = 50, -77
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Draft:
    """B drafts of M nodes, and what the engine knows."""

    draft_tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    roots: Tensor
    max_nodes: Tensor
    vocab_size: int = VOCAB

    def to(self, device: torch.device) -> Draft:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vocab_size"}
        return replace(self, **{name: held(value, device) for name, value in values.items()})


@dataclass(frozen=True)
class Outputs:
    """Poisoned trees of N nodes, each in the middle of a tensor of its own that stays poisoned."""

    settled_tokens: Tensor
    settled_parents: Tensor
    depth: Tensor
    ancestors: Tensor
    num_settled: Tensor

    @classmethod
    def empty(cls, batch: int, size: int, words: int, device: torch.device) -> Outputs:
        def poison(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, POISON, dtype=dtype, device=device)

        ints = [poison(batch, size + 5)[:, 2 : size + 2] for _ in range(3)]
        bits = poison(batch, size + 5, words + 1, dtype=torch.int64)
        return cls(*ints, bits[:, 2 : size + 2, :words], poison(batch))

    def trees(self) -> list[tuple[Any, ...]]:
        """As the oracle's."""
        ints = [getattr(self, f.name).cpu().tolist() for f in fields(self)]
        ints[3] = [
            [sum((word % 2**64) << 64 * w for w, word in enumerate(row)) for row in tree]
            for tree in ints[3]
        ]
        return list(zip(*ints, strict=True))


def run(draft: Draft, size: int, words: int | None, backend: Backend) -> Outputs:
    there = draft.to(backend.device)
    words = -(-size // 64) if words is None else words
    outputs = Outputs.empty(len(draft.roots), size, words, backend.device)
    ops.tree_settle(*vars(there).values(), *vars(outputs).values())
    return outputs


def expected_of(draft: Draft, size: int) -> list[tuple[Any, ...]]:
    names = "draft_tokens", "parents", "num_nodes", "roots", "max_nodes"
    sequences = zip(*(getattr(draft, name).tolist() for name in names), strict=True)
    return [astuple(settle(*one, draft.vocab_size, size)) for one in sequences]


def check(draft: Draft, size: int, backend: Backend, words: int | None = None) -> Outputs:
    """Against plain Python; and nothing around the outputs is written."""
    outputs = run(draft, size, words, backend)
    assert outputs.trees() == expected_of(draft, size)
    for name in ("settled_tokens", "settled_parents", "depth", "ancestors"):
        view = getattr(outputs, name)
        room, inside = view._base.clone(), torch.zeros_like(view._base, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert (room[~inside] == POISON).all(), name
    return outputs


def draft_of(tokens: Any, parents: Any, *, count: int | None = None, most: int = 128) -> Draft:
    """One draft, of root 7."""
    count = len(tokens) if count is None else count
    return Draft(i32([tokens]), i32([parents]), i32([count]), i32([7]), i32([most]))


def random_draft(batch: int, given: int, seed: int, shape: str = "random") -> Draft:
    """Trees that are whole: a chain, a star below the root, or any."""
    rng = random.Random(seed)
    parent: dict[str, Callable[[int], int]] = {
        "chain": lambda i: i - 1,
        "star": lambda i: 0,
        "random": lambda i: rng.randrange(i),
    }
    parents = [[parent[shape](i) if i else 0 for i in range(given)] for _ in range(batch)]
    tokens = [[rng.randrange(VOCAB) for _ in range(given)] for _ in range(batch)]
    roots = [rng.randrange(VOCAB) for _ in range(batch)]
    full = i32([given] * batch)
    size = batch, given
    return Draft(i32(tokens).view(size), i32(parents).view(size), full, i32(roots), full)


def test_what_the_header_draws(backend: Backend) -> None:
    draft = draft_of([9, 4, 7, 7, 2], [8, 0, 0, 1, 4])
    (tree,) = check(draft, 5, backend).trees()
    assert tree == ([7, 4, 7, 7, 0], [-1, 0, 0, 1, 0], [0, 1, 1, 2, 0], [1, 3, 5, 11, 0], 4)


def test_every_draft_of_five_nodes(backend: Backend) -> None:
    """Every parent from -1 to 5 of four nodes, with a token that is none at any place or nowhere,
    and counts that go round; under the shim every 29th."""
    parents = torch.cartesian_prod(*(torch.arange(-1, 6),) * 4).int()
    wrong = torch.arange(5).repeat_interleave(len(parents))  # 0: nowhere, as it is the root's
    parents = torch.cat([torch.full((len(wrong), 1), POISON), parents.repeat(5, 1)], dim=1).int()
    tokens = (torch.arange(len(wrong) * 5, dtype=torch.int32) % VOCAB).view(-1, 5)
    bad = i32([-1, VOCAB, INT_MIN, INT_MAX])[torch.arange(len(wrong)) % 4]
    tokens.scatter_(1, wrong[:, None], bad[:, None])
    row = torch.arange(len(wrong))
    counts = i32([5, 5, 4, 3, 2, 1, 0, -1, 6, INT_MIN, INT_MAX])
    draft = Draft(tokens, parents, counts[row % 11], row.int(), counts[row // 11 % 11])
    step = 1 if backend.name == "cpu" else 29
    tensors = (getattr(draft, field.name) for field in fields(draft)[:5])
    check(Draft(*(tensor[::step].contiguous() for tensor in tensors)), 5, backend)


@pytest.mark.parametrize("shape", ["chain", "star", "random"])
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128])
def test_whole_trees_of_any_size(backend: Backend, size: int, shape: str) -> None:
    outputs = check(random_draft(2, size, size, shape), size, backend)
    assert outputs.num_settled.tolist() == [size, size]


@pytest.mark.parametrize(("given", "size"), [(0, 3), (1, 3), (70, 64), (64, 70), (200, 128)])
def test_more_or_fewer_nodes_than_there_is_room_for(
    backend: Backend, given: int, size: int
) -> None:
    draft = random_draft(3, given, size)
    many = i32([INT_MAX] * 3)
    outputs = check(replace(draft, num_nodes=many, max_nodes=many), size, backend)
    assert outputs.num_settled.tolist() == [max(1, min(given, size))] * 3


def test_each_sequence_is_cut_at_its_own_place(backend: Backend) -> None:
    size = 100
    draft = random_draft(9, size, 3)
    for row, cut in enumerate((1, 31, 32, 63, 64, 65, 99)):
        (draft.parents if row % 2 else draft.draft_tokens)[row, cut] = (cut, -1)[row % 2 == 0]
    draft.num_nodes[7], draft.max_nodes[8] = 40, 0
    outputs = check(draft, size, backend)
    assert outputs.num_settled.tolist() == [1, 31, 32, 63, 64, 65, 99, 40, 1]


@pytest.mark.parametrize("node", [1, 31, 32, 64, 127])
@pytest.mark.parametrize("value", [INT_MIN, -1, "itself", "next", 200, INT_MAX])
def test_a_parent_that_stands_nowhere_before(backend: Backend, node: int, value: Any) -> None:
    draft = random_draft(1, 128, node)
    draft.parents[0, node] = {"itself": node, "next": node + 1}.get(value, value)
    assert check(draft, 128, backend).num_settled.tolist() == [node]


@pytest.mark.parametrize("vocab_size", [0, 1, VOCAB, INT_MAX])
def test_the_vocabulary_ends_at_its_size(backend: Backend, vocab_size: int) -> None:
    tokens = [INT_MIN, 0, VOCAB - 1, VOCAB, INT_MAX - 1, INT_MAX, 0]
    draft = replace(draft_of(tokens, [0] * 7), vocab_size=vocab_size)
    kept = {0: 1, 1: 2, VOCAB: 3, INT_MAX: 5}[vocab_size]
    assert check(draft, 7, backend).num_settled.tolist() == [kept]


def test_of_the_root_nothing_is_believed(backend: Backend) -> None:
    draft = draft_of([INT_MAX, 1, 2], [2, 0, 1])
    for root in (INT_MIN, 7, INT_MAX):  # the engine's own, not looked at either
        (tree,) = check(replace(draft, roots=i32([root])), 3, backend).trees()
        assert tree == ([root, 1, 2], [-1, 0, 1], [0, 1, 2], [1, 3, 7], 3)


def test_a_second_word_that_is_not_needed(backend: Backend) -> None:
    check(random_draft(3, 20, 4), 20, backend, words=2)


def test_drafts_that_are_slices(backend: Backend) -> None:
    draft = random_draft(4, 40, 5)
    wide = {name: getattr(draft, name).repeat(1, 3) for name in ("draft_tokens", "parents")}
    slices = {name: value[::2, 40:80] for name, value in wide.items()}
    check(
        replace(
            draft,
            num_nodes=draft.num_nodes[:2],
            roots=draft.roots[:2],
            max_nodes=draft.max_nodes[2:],
            **slices,
        ),
        40,
        backend,
    )


def test_one_shape_for_all_sequences(backend: Backend) -> None:
    draft = random_draft(3, 9, 6)
    check(replace(draft, parents=draft.parents[:1].expand(3, 9)), 9, backend)


def test_no_sequences(backend: Backend) -> None:
    check(random_draft(0, 4, 0), 4, backend)


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    cpu = Backend("cpu", torch.device("cpu"))
    draft, threads, isa = random_draft(300, 100, 7), torch.get_num_threads(), _C.active_isa()
    expected = expected_of(draft, 100)
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert run(draft, 100, 2, cpu).trees() == expected
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(isa)


def test_a_captured_launch_reads_what_is_there_when_it_runs() -> None:
    draft, other = random_draft(2, 12, 8), random_draft(2, 12, 9)
    outputs = Outputs.empty(2, 12, 1, torch.device("cpu"))
    arguments = (*vars(draft).values(), *vars(outputs).values())
    graph = CpuGraph.capture(lambda: ops.tree_settle(*arguments))
    other.num_nodes[1] = 5
    for name in ("draft_tokens", "parents", "num_nodes", "roots", "max_nodes"):
        getattr(draft, name).copy_(getattr(other, name))
    graph.launch()
    assert outputs.trees() == expected_of(other, 12)


def test_compiles(device: torch.device) -> None:
    draft = random_draft(2, 12, 10).to(device)
    eager, compiled = (Outputs.empty(2, 12, 1, device) for _ in range(2))
    ops.tree_settle(*vars(draft).values(), *vars(eager).values())
    function = torch.compile(ops.tree_settle, fullgraph=True, backend="aot_eager")
    function(*vars(draft).values(), *vars(compiled).values())
    assert compiled.trees() == eager.trees()


# --- errors


def arguments_of(backend: Backend) -> dict[str, Any]:
    outputs = Outputs.empty(2, 70, 2, backend.device)
    return {**vars(random_draft(2, 6, 0).to(backend.device)), **vars(outputs)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_tokens", torch.zeros(2, 6, dtype=torch.int64)),
        ("draft_tokens", torch.zeros(6, 2, dtype=torch.int32).T),
        ("parents", torch.zeros(2, 5, dtype=torch.int32)),
        ("num_nodes", torch.zeros(3, dtype=torch.int32)),
        ("roots", torch.zeros(2, 1, dtype=torch.int32)),
        ("max_nodes", torch.zeros(2)),
        ("vocab_size", -1),
        ("vocab_size", 2**31),
        ("settled_tokens", torch.zeros(2, 0, dtype=torch.int32)),
        ("settled_tokens", torch.zeros(2, 129, dtype=torch.int32)),
        ("settled_parents", torch.zeros(2, 71, dtype=torch.int32)),
        ("depth", torch.zeros(2, 70)),
        ("ancestors", torch.zeros(2, 70, 1, dtype=torch.int64)),
        ("ancestors", torch.zeros(2, 70, 3, dtype=torch.int64)),
        ("num_settled", torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, name: str, value: Any) -> None:
    there = value.to(backend.device) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: the last dimension"):
        ops.tree_settle(**arguments_of(backend) | {name: there})


def test_an_input_that_is_an_output_is_named() -> None:
    arguments = arguments_of(Backend("cpu", torch.device("cpu")))
    room = torch.zeros(4, 70, dtype=torch.int32)
    for given, there, begin in (
        ("draft_tokens", "settled_tokens", 0),
        ("parents", "settled_parents", 1),
        ("parents", "depth", 1),
    ):
        shared = {given: room[begin : begin + 2, :6], there: room[:2]}
        message = f"^{given}: expected memory that is not {there}'s, which is written"
        with pytest.raises(ValueError, match=message):
            ops.tree_settle(**arguments | shared)
    beside = {"draft_tokens": room[2:, :6], "settled_tokens": room[:2]}
    ops.tree_settle(**arguments | beside)


@pytest.mark.parametrize("name", [f.name for f in (*fields(Draft)[1:5], *fields(Outputs))])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    arguments = arguments_of(Backend("cpu", torch.device("cpu")))
    arguments[name] = OnAnotherGpu(arguments[name])
    message = f"^{name}: expected a tensor on cpu as draft_tokens is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.tree_settle(**arguments)
