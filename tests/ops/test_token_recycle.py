"""Trees read off tables, and what verified rows teach these, against torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.draft.recycle.template import NUM_RANKS, Template, make_template
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, OnAnotherGpu
from tests.oracles import recycle

Tensor = torch.Tensor
CPU = Backend("cpu", torch.device("cpu"))
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
POISON = -77


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def made_of(vocab_size: int, num_slots: int, seed: int, num_ranks: int = NUM_RANKS) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = num_slots, vocab_size, num_ranks
    return torch.randint(0, vocab_size, shape, generator=g, dtype=torch.int32)


# --- proposing


def template_of(template: Template) -> tuple[Tensor, Tensor]:
    parents = torch.from_numpy(template.parents).int()
    parents[0] = -1
    return parents, torch.from_numpy(template.ranks).int()


def proposed(
    backend: Backend, tables: Tensor, slots: Tensor, roots: Tensor, parents: Tensor, ranks: Tensor
) -> Tensor:
    """The drafts, written in the middle of a tensor that stays poisoned."""
    size = len(parents)
    room = torch.full((len(slots), size + 2), POISON, dtype=torch.int32, device=backend.device)
    there = (x.to(backend.device) for x in (tables, slots, roots, parents, ranks))
    ops.recycle_propose(*there, room[:, 1:-1])
    assert (room[:, [0, -1]] == POISON).all()
    return room[:, 1:-1].cpu()


@pytest.mark.parametrize("size", [1, 2, 8, 31, 32, 33, 64, 128])
def test_a_template_filled(backend: Backend, size: int) -> None:
    tables, slots, roots = made_of(50, 4, size), i32(2, 0, 3), i32(7, 0, 49)
    parents, ranks = template_of(make_template(size, 12, 128))
    found = proposed(backend, tables, slots, roots, parents, ranks)
    pairs = zip(slots.tolist(), roots.tolist(), strict=True)
    expected = [recycle.propose(tables[slot], root, parents, ranks) for slot, root in pairs]
    assert torch.equal(found, torch.stack(expected))


def test_a_chain_as_deep_as_there_are_nodes(backend: Backend) -> None:
    tables, parents = made_of(30, 1, 0), torch.arange(-1, 127, dtype=torch.int32)
    found = proposed(backend, tables, i32(0), i32(3), parents, torch.zeros_like(parents))
    assert torch.equal(found[0], recycle.propose(tables[0], 3, parents, torch.zeros_like(parents)))


def test_what_is_none_is_the_nearest(backend: Backend) -> None:
    tables = made_of(10, 3, 1)
    tables[:, 4, 0], tables[:, 4, 1] = INT_MAX, -1
    tables[:, 9, 7], tables[:, 0, 0] = 5, 6
    parents, ranks = i32(9, INT_MIN, 0, 1, INT_MAX), i32(0, 0, INT_MIN, 99, 0)
    ranks[1] = 1
    for slot in (-1, 3, INT_MIN, INT_MAX):
        (found,) = proposed(backend, tables, i32(slot), i32(4), parents, ranks)
        # Node 1 is -1, node 2 too large, node 3 of too high a rank, node 4 below node 3.
        third = int(tables[2, 0, 7])
        assert found.tolist() == [4, 0, 9, third, min(9, max(0, int(tables[2, third, 0])))]
    assert proposed(backend, tables, i32(2, 2), i32(INT_MIN, INT_MAX), i32(0), i32(0)).tolist() == [
        [0],
        [9],
    ]


# --- learning


@dataclass
class Round:
    """What B verified trees teach S tables."""

    logits: Tensor
    draft_tokens: Tensor
    num_nodes: Tensor
    path: Tensor
    accept_length: Tensor
    slots: Tensor
    tables: Tensor
    is_own: Tensor

    @classmethod
    def random(
        cls, batch: int, nodes: int, vocab_size: int, seed: int, num_ranks: int = NUM_RANKS
    ) -> Round:
        """Tokens repeat; a third of the nodes are on the path."""
        g = torch.Generator().manual_seed(seed)
        shape = batch, nodes
        tokens = torch.randint(0, min(vocab_size, 1 + nodes // 2), shape, generator=g)
        is_accepted = torch.rand(shape, generator=g) < 0.3
        path = torch.where(is_accepted, torch.arange(nodes), -1)
        return cls(
            torch.randn(*shape, vocab_size, generator=g),
            tokens.int(),
            torch.full((batch,), nodes, dtype=torch.int32),
            path.int(),
            is_accepted.sum(1).int() - 1 + (~is_accepted.any(1)).int(),
            torch.randperm(batch + 1, generator=g)[:batch].int(),
            made_of(vocab_size, batch + 1, seed + 1, num_ranks),
            torch.zeros(batch + 1, vocab_size, dtype=torch.int32),
        )

    def learned(self, backend: Backend) -> tuple[Tensor, Tensor]:
        """Tables and marks then; this stays as it is."""
        there = [getattr(self, f.name).to(backend.device, copy=True) for f in fields(self)]
        rows, (_, vocab_size, num_ranks) = self.draft_tokens.numel(), self.tables.shape
        size = ops.recycle_learn_workspace(rows, vocab_size, num_ranks) + 6
        workspace = torch.zeros(size, device=backend.device)
        for _ in range(2):  # a second time the tickets are what they were
            ops.recycle_learn(*there, workspace)
        return there[-2].cpu(), there[-1].cpu()

    def expected(self) -> tuple[Tensor, Tensor]:
        tables, is_own = self.tables.clone(), self.is_own.clone()
        for row, slot in enumerate(self.slots.tolist()):
            count = max(0, int(self.num_nodes[row]))
            if self.accept_length[row] >= 0:
                given = self.logits[row, :count], self.draft_tokens[row, :count], self.path[row]
                recycle.learn(tables[slot], is_own[slot], *given)
        return tables, is_own

    def check(self, backend: Backend) -> None:
        assert all(map(torch.equal, self.learned(backend), self.expected()))


@pytest.mark.parametrize(
    ("batch", "nodes", "vocab_size"),
    [(1, 1, 1), (2, 5, 6), (3, 9, 97), (1, 64, 300), (1, 128, 40), (2, 3, 4096), (1, 2, 9001)],
)
def test_what_trees_teach(backend: Backend, batch: int, nodes: int, vocab_size: int) -> None:
    Round.random(batch, nodes, vocab_size, nodes).check(backend)


def test_a_large_vocabulary(backend: Backend) -> None:
    Round.random(1, 2, 128_256, 1).check(backend)


@pytest.mark.parametrize("num_ranks", [1, 5, 32])
def test_other_numbers_of_ranks(backend: Backend, num_ranks: int) -> None:
    Round.random(1, 4, 5000, 2, num_ranks).check(backend)


def test_rows_in_order_and_rows_of_equals(backend: Backend) -> None:
    """The worst for a bound: all of the best in one slice, in one thread's tokens, or equal."""
    given = Round.random(1, 4, 9001, 3)
    given.draft_tokens = i32(0, 1, 2, 3)[None]
    steps = torch.arange(9001.0)
    given.logits[0, 0], given.logits[0, 1] = steps, -steps
    given.logits[0, 2] = torch.where(steps.long() % 256 == 3, steps, -steps)
    # Seven threads have nothing but what is above the bound, which is another's.
    thread = steps.long() % 256
    given.logits[0, 3] = torch.where(thread < 7, 1e5 + steps, -1e5 * thread - steps)
    given.check(backend)
    given.logits[0, 3] = 2.5  # the lower ids
    tables, _ = given.learned(backend)
    assert tables[given.slots[0], 3].tolist() == list(range(NUM_RANKS))


def test_no_number_comes_last_and_minus_infinity_before_it(backend: Backend) -> None:
    given = Round.random(1, 1, 12, 4)
    inf, nan = float("inf"), float("nan")
    given.logits[0, 0] = torch.tensor([nan, -inf, 1, nan, -0.0, 0.0, inf, -inf, nan, nan, nan, -3])
    tables, _ = given.learned(backend)
    token = given.draft_tokens[0, 0]
    assert tables[given.slots[0], token].tolist() == [6, 2, 4, 5, 11, 1, 7, 0]


@pytest.mark.parametrize(
    ("path", "winner"),
    [([0], 1), ([0, 2], 2), ([0, 3], 3), ([0, 1, 3], 3), ([0, 3, 4], 3), ([0, 1], 1)],
)
def test_rows_of_one_token(backend: Backend, path: list[int], winner: int) -> None:
    given = Round.random(1, 5, 40, 5)
    given.draft_tokens = i32(4, 7, 7, 7, 6)[None]
    given.path = i32(*path, *[-1] * (5 - len(path)))[None]
    given.check(backend)
    tables, _ = given.learned(backend)
    best = given.logits[0, winner].topk(NUM_RANKS).indices
    assert torch.equal(tables[given.slots[0], 7], best.int())


def test_what_teaches_nothing(backend: Backend) -> None:
    """Padding, sequences of bad logits, tokens of no vocabulary; paths of no nodes."""
    given = Round.random(5, 6, 50, 6)
    given.num_nodes = i32(3, 6, 0, -1, 6)
    given.accept_length[1] = -1
    given.path[0] = i32(5, -1, INT_MAX, INT_MIN, 6, 1)
    given.check(backend)
    given.draft_tokens[4] = i32(-1, 50, INT_MIN, INT_MAX, 7, -2)
    given.num_nodes[:4] = 0
    _, is_own = given.learned(backend)
    assert is_own.nonzero().tolist() == [[int(given.slots[4]), 7]]


def test_a_slot_that_is_none_is_the_last(backend: Backend) -> None:
    given = Round.random(1, 3, 20, 7)
    expected = replace(given, slots=i32(1)).learned(backend)
    for slot in (-1, 2, INT_MIN, INT_MAX):
        found = replace(given, slots=i32(slot)).learned(backend)
        assert all(map(torch.equal, found, expected))


def test_fewer_rows_in_a_workspace_of_more(backend: Backend) -> None:
    size = ops.recycle_learn_workspace(10, 60, NUM_RANKS) + 1
    workspace = torch.zeros(size, device=backend.device)
    for given in (Round.random(2, 5, 60, 3), Round.random(1, 3, 60, 4)):
        there = {f.name: getattr(given, f.name).to(backend.device) for f in fields(given)}
        ops.recycle_learn(**there, workspace=workspace)
        found = there["tables"].cpu(), there["is_own"].cpu()
        assert all(map(torch.equal, found, given.expected()))


def test_slices_of_wider_tensors(backend: Backend) -> None:
    given = Round.random(2, 7, 60, 8)
    wide = {name: getattr(given, name).repeat(2, 2) for name in ("draft_tokens", "path")}
    there = {f.name: getattr(given, f.name).to(backend.device) for f in fields(given)}
    logits = there["logits"].repeat(1, 2, 2)
    slices = {name: value.to(backend.device)[:2, 7:] for name, value in wide.items()}
    workspace = torch.zeros(ops.recycle_learn_workspace(14, 60, NUM_RANKS), device=backend.device)
    ops.recycle_learn(**there | slices | {"logits": logits[:, 7:, 60:]}, workspace=workspace)
    found = there["tables"].cpu(), there["is_own"].cpu()
    assert all(map(torch.equal, found, given.expected()))


def test_no_sequences(backend: Backend) -> None:
    Round.random(0, 3, 20, 0).check(backend)
    none = torch.zeros(0, dtype=torch.int32)
    assert proposed(backend, made_of(9, 1, 0), none, none, i32(-1, 0), i32(0, 0)).shape == (0, 2)


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    given, threads, isa = Round.random(9, 20, 3000, 9), torch.get_num_threads(), _C.active_isa()
    expected = given.expected()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert all(map(torch.equal, given.learned(CPU), expected))
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(isa)


def test_a_captured_launch_reads_what_is_there_when_it_runs() -> None:
    tables, slots, roots, tokens = made_of(20, 3, 0), i32(0), i32(1), torch.zeros(1, 8).int()
    parents, ranks = template_of(make_template(8, 4, 8))
    arguments = tables, slots, roots, parents, ranks, tokens
    graph = CpuGraph.capture(lambda: ops.recycle_propose(*arguments))
    slots[0], roots[0] = 2, 9
    graph.launch()
    assert torch.equal(tokens[0], recycle.propose(tables[2], 9, parents, ranks))


def test_compiles(device: torch.device) -> None:
    there = [x.to(device) for x in (made_of(20, 3, 0), i32(1), i32(4), i32(-1, 0, 1), i32(0, 1, 2))]
    eager, compiled = torch.zeros(2, 1, 3, dtype=torch.int32, device=device)
    ops.recycle_propose(*there, eager)
    function = torch.compile(ops.recycle_propose, fullgraph=True, backend="aot_eager")
    function(*there, compiled)
    assert torch.equal(eager, compiled) and eager.any()


# --- errors


def arguments_of(backend: Backend, op: Any) -> dict[str, Any]:
    if op is ops.recycle_propose:
        ints = {"slots": i32(0, 1), "roots": i32(2, 3), "parents": i32(-1, 0), "ranks": i32(0, 1)}
        tokens = torch.zeros(2, 2, dtype=torch.int32)
        arguments = {"tables": made_of(20, 3, 0), **ints, "draft_tokens": tokens}
    else:
        arguments = vars(Round.random(2, 3, 20, 0)) | {"workspace": torch.zeros(500)}
    return {name: value.to(backend.device) for name, value in arguments.items()}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        (ops.recycle_propose, "tables", torch.zeros(3, 20, 8)),
        (ops.recycle_propose, "tables", zeros(0, 20, 8)),
        (ops.recycle_propose, "tables", zeros(3, 0, 8)),
        (ops.recycle_propose, "tables", zeros(3, 20, 33)),
        (ops.recycle_propose, "tables", zeros(3, 40, 8)[:, :20]),
        (ops.recycle_propose, "slots", zeros(3)),
        (ops.recycle_propose, "roots", zeros(2, 1)),
        (ops.recycle_propose, "parents", zeros(3)),
        (ops.recycle_propose, "ranks", torch.zeros(2)),
        (ops.recycle_propose, "draft_tokens", zeros(2, 129)),
        (ops.recycle_propose, "draft_tokens", zeros(2, 0)),
        (ops.recycle_learn, "logits", torch.zeros(2, 3, 19)),
        (ops.recycle_learn, "logits", torch.zeros(2, 3, 20, dtype=torch.bfloat16)),
        (ops.recycle_learn, "draft_tokens", zeros(2, 200)),
        (ops.recycle_learn, "num_nodes", zeros(3)),
        (ops.recycle_learn, "path", zeros(1, 3)),
        (ops.recycle_learn, "accept_length", torch.zeros(2)),
        (ops.recycle_learn, "slots", zeros(1)),
        (ops.recycle_learn, "tables", zeros(3, 20, 0)),
        (ops.recycle_learn, "is_own", zeros(3, 19)),
        (ops.recycle_learn, "is_own", zeros(3, 40)[:, :20]),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, op: Any, name: str, value: Tensor) -> None:
    arguments = arguments_of(backend, op) | {name: backend.hold(value)}
    with pytest.raises(ValueError, match=f"^{name}: (expected|must be contiguous)"):
        op(**arguments)


@pytest.mark.parametrize("value", [None, torch.zeros(20), torch.zeros(500).double()])
def test_a_gpu_has_its_workspace(backend: Backend, value: Tensor | None) -> None:
    there = None if value is None else value.to(backend.device)
    arguments = arguments_of(backend, ops.recycle_learn) | {"workspace": there}
    if not backend.runs_cuda_source:
        return ops.recycle_learn(**arguments)
    with pytest.raises(ValueError, match="^workspace: expected"):
        ops.recycle_learn(**arguments)
    return None


@pytest.mark.parametrize("op", [ops.recycle_propose, ops.recycle_learn])
def test_tensors_on_two_devices_are_named(op: Any) -> None:
    for name in list(arguments_of(CPU, op))[1:]:
        arguments = arguments_of(CPU, op)
        arguments[name] = OnAnotherGpu(arguments[name])
        message = f"^{name}: expected a tensor on cpu as .* is, got one on cuda:1"
        with pytest.raises(ValueError, match=message):
            op(**arguments)
