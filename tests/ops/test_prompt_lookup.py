"""What is looked up in histories of any contents, against a search in plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, OnAnotherGpu
from tests.oracles.prompt_lookup import Drafted, Search, draft

Tensor = torch.Tensor
SIMT_SCHEDULES = (1, 0)
POISON = -77
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HOSTILE = (INT_MIN, INT_MIN + 1, -2, -1, 0, 1, 2, INT_MAX - 1, INT_MAX)


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Outputs:
    """Poisoned, rows each in the middle of a wider tensor that stays poisoned."""

    draft_tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    match_len: Tensor
    longest: Tensor

    @classmethod
    def empty(cls, batch: int, size: int, device: torch.device) -> Outputs:
        rows = (torch.full((batch, size + 5), POISON, device=device).int() for _ in range(2))
        alone = (torch.full((batch,), POISON, device=device).int() for _ in range(3))
        return cls(*(row[:, 2:-3] for row in rows), *alone)

    def drafted(self) -> list[Drafted]:
        """As the oracle's."""
        columns = (tensor.cpu().tolist() for tensor in vars(self).values())
        return [Drafted(*one) for one in zip(*columns, strict=True)]


def run(searches: Sequence[Search], size: int, backend: Backend) -> Outputs:
    """Histories of one batch: numbers that are the call's are those of the first."""
    there, call = backend.device, asdict(searches[0])
    rows = {
        name: i32([list(s.history) for s in searches] if name == "history" else of_each).to(there)
        for name in ("history", "history_len", "max_len")
        for of_each in [[getattr(s, name) for s in searches]]
    }
    outputs = Outputs.empty(len(searches), size, there)
    ops.prompt_lookup(**call | rows, **vars(outputs))
    return outputs


def check(searches: Sequence[Search], size: int, backend: Backend) -> list[Drafted]:
    """Against plain Python; nothing around the outputs is written."""
    outputs = run(searches, size, backend)
    got = outputs.drafted()
    assert got == [draft(search, size) for search in searches]
    for view in (outputs.draft_tokens, outputs.parents):
        around = torch.cat([view._base[:, :2], view._base[:, -3:]], dim=1)
        assert (around == POISON).all()
    return got


def search_of(tokens: Sequence[int], **options: int) -> Search:
    """With room behind it, whose contents are poison."""
    given = {"history_len": len(tokens), "max_len": len(tokens) + 100} | options
    return Search([*tokens, *[POISON] * 5], **given)


# --- one sequence


TEXT = [8, 9, 1, 2, 3, 0, 8, 9, 1, 8, 9]


def test_continuations_share_their_prefix(backend: Backend) -> None:
    (tree,) = check([search_of(TEXT, depth=5)], 12, backend)
    assert tree.draft_tokens == [9, 1, 8, 9, 1, 8, 2, 3, 0, 8, 0, 0]
    assert tree.parents == [-1, 0, 1, 2, 3, 4, 1, 6, 7, 8, 0, 0]
    assert (tree.num_nodes, tree.match_len, tree.longest) == (10, 2, 5)


@pytest.mark.parametrize(
    ("options", "size", "tokens", "match"),
    [
        ({}, 4, [9, 1, 8, 9], 2),  # a path is cut, and no other one fits
        ({"depth": 1}, 8, [9, 1], 2),
        ({"depth": 0}, 8, [9], 0),
        ({}, 1, [9], 0),
        ({"num_continuations": 1}, 64, [9, *[1, 8, 9] * 5], 2),
        ({"min_ngram": 3}, 8, [9], 0),
        ({"max_ngram": 1, "depth": 2, "num_continuations": 2}, 8, [9, 1, 8, 2], 1),
        ({"max_len": 14}, 8, [9, 1, 8, 2], 2),
        ({"max_len": 13}, 8, [9, 1], 2),
        ({"max_len": 12}, 8, [9], 0),
        ({"max_len": 11}, 8, [9], 0),
        ({"max_len": INT_MIN}, 8, [9], 0),
        ({"max_len": INT_MAX, "depth": INT_MAX}, 3, [9, 1, 8], 2),
        ({"history_len": 1}, 8, [8], 0),
        ({"history_len": 2}, 8, [9], 0),
        ({"history_len": 7, "depth": 2}, 8, [8, 9, 1], 1),
        ({"history_len": 0}, 8, [0], 0),
        ({"history_len": INT_MIN}, 8, [0], 0),
        ({"max_ngram": INT_MAX}, 3, [9, 1, 8], 2),
        ({"history_len": INT_MAX, "max_len": INT_MAX, "depth": 1}, 3, [POISON] * 2, 4),
        ({"num_continuations": 128, "max_ngram": 1, "depth": 1}, 8, [9, 1], 1),
    ],
)
def test_limits(
    backend: Backend, options: dict[str, int], size: int, tokens: list[int], match: int
) -> None:
    (tree,) = check([search_of(TEXT, **options)], size, backend)
    assert tree.draft_tokens[: tree.num_nodes] == tokens
    assert tree.match_len == match


# --- any history, any size


def random_text(rng: random.Random, length: int, alphabet: int) -> list[int]:
    """Of few tokens, with a stretch that comes again."""
    text = [rng.randrange(alphabet) for _ in range(length)]
    if length > 8 and rng.random() < 0.5:
        start, count = rng.randrange(length // 2), rng.randrange(1, length // 2)
        text[length - count :] = text[start : start + count]
    return text


def random_batch(rng: random.Random, slots: int, count: int, **options: int) -> list[Search]:
    """Histories of any length in as many slots."""
    lengths = [rng.choice((slots, rng.randint(0, slots), rng.randint(0, 9))) for _ in range(count)]
    return [
        Search(
            random_text(rng, length, rng.choice((1, 2, 3, 30)))
            + [rng.randrange(3) for _ in range(slots - length)],
            length,
            length + rng.choice((1, 2, 5, 1000)),
            **options,
        )
        for length in (min(length, slots) for length in lengths)
    ]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 64, 100, 128])
@pytest.mark.parametrize("slots", [1, 12, 70])
def test_any_history(backend: Backend, slots: int, size: int) -> None:
    for trial in range(12):
        rng = random.Random(f"{slots} {size} {trial}")
        most = rng.choice((1, 2, 4, 9))
        options = {
            "max_ngram": most,
            "min_ngram": rng.randint(1, most),
            "num_continuations": rng.choice((1, 2, 3, 8)),
            "depth": rng.choice((1, 3, 15, 127)),
        }
        check(random_batch(rng, slots, 4, **options), size, backend)


@pytest.mark.parametrize("slots", [512, 513, 1500, 3000])
def test_histories_of_several_warps(backend: Backend, slots: int) -> None:
    rng = random.Random(slots)
    batch = random_batch(rng, slots, 3, num_continuations=5, depth=20)
    check([*batch, Search([1] * slots, slots, INT_MAX, num_continuations=5, depth=20)], 64, backend)


@pytest.mark.parametrize("place", [5, 3_000, 20_000])
def test_a_history_of_several_chunks(backend: Backend, place: int) -> None:
    """The longest match anywhere, shorter ones behind it in the text, and near the end."""
    slots = 34_000
    text = [7 + i % 20_011 for i in range(slots)]
    text[-4:] = [1, 2, 3, 4]
    text[place : place + 6] = [1, 2, 3, 4, 5, 6]
    text[26_000:26_003] = [3, 4, 6]
    text[33_000:33_002] = [4, 5]
    (tree,) = check([Search(text, slots, INT_MAX, depth=2, num_continuations=2)], 8, backend)
    assert tree.draft_tokens[:3] == [4, 5, 6] and tree.match_len == 4
    earlier = replace(search_of(text, depth=2), history_len=slots, max_ngram=2)
    (tree,) = check([replace(earlier, history=text)], 8, backend)
    assert tree.draft_tokens[1] == (5 if place > 26_000 else 6) and tree.match_len == 2


def test_any_contents(backend: Backend) -> None:
    rng = random.Random(0)
    batch = [
        replace(
            one,
            history=[rng.choice((3, *HOSTILE)) for _ in one.history],
            history_len=rng.choice((one.history_len, *HOSTILE)),
            max_len=rng.choice((one.max_len, *HOSTILE)),
        )
        for one in random_batch(rng, 40, 60)
    ]
    check(batch, 24, backend)


def test_a_smaller_tree_is_the_beginning_of_a_larger_one(backend: Backend) -> None:
    batch = random_batch(random.Random(4), 60, 30)
    trees = {size: run(batch, size, backend).drafted() for size in (1, 8, 16, 32, 64)}
    for size in (1, 8, 16, 32):
        for small, large in zip(trees[size], trees[64], strict=True):
            count = min(size, large.num_nodes)
            assert small.num_nodes == count
            assert small.draft_tokens[:count] == large.draft_tokens[:count]
            assert small.parents[:count] == large.parents[:count]


def test_a_sequence_by_itself(backend: Backend) -> None:
    batch = random_batch(random.Random(5), 60, 6)
    together = run(batch, 16, backend).drafted()
    assert [run([one], 16, backend).drafted()[0] for one in batch] == together


def test_rows_far_apart(backend: Backend) -> None:
    search = search_of(TEXT)
    wider = torch.full((3, 40), 9, dtype=torch.int32)
    wider[:, 7 : 7 + len(search.history)] = i32(search.history)
    history = wider.to(backend.device)[:, 7 : 7 + len(search.history)]
    outputs = Outputs.empty(3, 12, backend.device)
    numbers = {name: i32([getattr(search, name)] * 3) for name in ("history_len", "max_len")}
    there = {name: tensor.to(backend.device) for name, tensor in numbers.items()}
    ops.prompt_lookup(**asdict(search) | there | {"history": history}, **vars(outputs))
    assert outputs.drafted() == [draft(search, 12)] * 3


@pytest.mark.parametrize(("batch", "slots"), [(0, 8), (2, 0)])
def test_nothing_to_look_in(backend: Backend, batch: int, slots: int) -> None:
    outputs = Outputs.empty(batch, 4, backend.device)
    history = torch.zeros(batch, slots, dtype=torch.int32, device=backend.device)
    numbers = torch.full((batch,), 9, dtype=torch.int32, device=backend.device)
    ops.prompt_lookup(history, numbers, numbers, 4, 1, 3, 5, **vars(outputs))
    assert outputs.drafted() == [Drafted([0] * 4, [-1, 0, 0, 0], 1, 0, 0)] * batch


def test_instruction_sets_and_threads() -> None:
    backend, batch = Backend("cpu", torch.device("cpu")), random_batch(random.Random(6), 9000, 5)
    expected = check(batch, 32, backend)
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert run(batch, 32, backend).drafted() == expected
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


# --- as part of a graph; what is refused


def arguments_of(backend: Backend) -> dict[str, Any]:
    outputs = Outputs.empty(1, 12, backend.device)
    search = asdict(search_of(TEXT))
    rows = {name: i32([search[name]]) for name in ("history", "history_len", "max_len")}
    return search | {name: row.to(backend.device) for name, row in rows.items()} | vars(outputs)


def outputs_of(arguments: dict[str, Any]) -> list[Drafted]:
    return Outputs(**{name: arguments[name] for name in Outputs.__annotations__}).drafted()


def test_captured() -> None:
    """The graph reads lengths when it runs."""
    a = arguments_of(Backend("cpu", torch.device("cpu")))
    graph = CpuGraph.capture(lambda: ops.prompt_lookup(**a))
    a["history_len"].fill_(7)
    graph.launch()
    assert outputs_of(a) == [draft(search_of(TEXT, history_len=7), 12)]


def test_under_torch_compile(device: torch.device) -> None:
    a = arguments_of(Backend(device.type, device))
    function = torch.compile(ops.prompt_lookup, fullgraph=True, backend="aot_eager")
    function(**a)
    assert outputs_of(a) == [draft(search_of(TEXT), 12)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": i32([1])}, r"history: expected \[B, T\]"),
        ({"history": i32([[1]]).long()}, r"history: expected \[B, T\] = .* int32"),
        ({"history": torch.zeros(1, 32).int()[:, ::2]}, "history: the last dimension must"),
        ({"history_len": i32([1, 2])}, r"history_len: expected \[B\] = \[1\]"),
        ({"max_len": i32([[1]])}, r"max_len: expected \[B\]"),
        ({"draft_tokens": i32([[]])}, "draft_tokens: expected 1 <= M <= 128"),
        ({"draft_tokens": torch.zeros(1, 129).int()}, "draft_tokens: expected 1 <= M <= 128"),
        ({"parents": torch.zeros(1, 11).int()}, r"parents: expected \[B, M\] = \[1, 12\]"),
        ({"num_nodes": torch.zeros(1)}, r"num_nodes: expected \[B\] = \[1\] int32"),
        ({"match_len": i32([1, 2])}, r"match_len: expected \[B\]"),
        ({"longest": i32([])}, r"longest: expected \[B\]"),
        ({"max_ngram": 0}, r"max_ngram: expected 1 to 2\^31 - 1, got 0"),
        ({"min_ngram": 0}, "min_ngram: expected 1 to max_ngram = 4, got 0"),
        ({"min_ngram": 5}, "min_ngram: expected 1 to max_ngram = 4, got 5"),
        ({"num_continuations": 0}, "num_continuations: expected 1 to 128, got 0"),
        ({"num_continuations": 129}, "num_continuations: expected 1 to 128, got 129"),
        ({"depth": -1}, r"depth: expected 0 to 2\^31 - 1, got -1"),
    ],
)
def test_wrong_arguments_are_named(backend: Backend, change: dict[str, Any], message: str) -> None:
    moved = {
        name: backend.hold(value) if isinstance(value, Tensor) else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.prompt_lookup(**arguments_of(backend) | moved)


def test_shared_memory_is_named(backend: Backend) -> None:
    a = arguments_of(backend)
    memory = torch.zeros(1, 40, dtype=torch.int32, device=backend.device)
    a |= {"history": memory[:, :16], "draft_tokens": memory[:, 15:27]}
    with pytest.raises(ValueError, match="^history: expected memory that is not draft_tokens's"):
        ops.prompt_lookup(**a)


@pytest.mark.parametrize("name", ["history_len", "draft_tokens", "longest"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    a = arguments_of(Backend("cpu", torch.device("cpu")))
    a[name] = OnAnotherGpu(a[name])
    message = f"^{name}: expected a tensor on cpu as history is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.prompt_lookup(**a)
