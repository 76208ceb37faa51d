"""Pairs that wait for a drafter's next step, against plain Python."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch

from specrt import _C, ops
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
SIMT_SCHEDULES = (0, 1)
CPU = Backend("cpu", torch.device("cpu"))
POISON = -77
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HOSTILE = (INT_MIN, -2, -1, 0, 1, 2, 3, 5, 9, INT_MAX - 1, INT_MAX)
OUT = ("features", "tokens", "source", "kv_len", "kv_len_after", "num_earlier", "bits")


def i32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Sizes(NamedTuple):
    batch: int
    nodes: int
    depth: int
    room: int
    pairs: int
    width: int


def made(sizes: Sizes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments; all of a sequence's path is accepted, behind three tokens. Outputs are
    poisoned."""
    batch, nodes, depth, room, pairs, width = sizes
    counts = {name: torch.full((batch,), POISON).int() for name in OUT[2:6]}
    paths = [sorted(random.Random(b).choices(range(nodes), k=depth)) for b in range(batch)]
    return {
        "taps": torch.arange(batch * nodes * width).view(batch, nodes, width).to(dtype),
        "path": i32(paths).view(batch, depth),
        "num_path": torch.full((batch,), depth).int(),
        "history": torch.arange(100, 100 + batch * room).int().view(batch, room),
        "history_len": torch.full((batch,), 3 + depth).int(),
        "features": torch.full((batch, pairs, width), float(POISON)).to(dtype),
        "tokens": torch.full((pairs, batch), POISON).int(),
        **counts,
        "bits": torch.full((batch, 2), POISON),
    }


def expected(given: dict[str, Tensor], *, are_kept: bool) -> dict[str, list[Any]]:
    """What the op writes, over what stood there."""
    out = {name: given[name].tolist() for name in OUT}
    nodes, room = given["taps"].shape[1], given["history"].shape[1]
    num_pairs, taps = given["features"].shape[1], given["taps"].tolist()
    for b, path in enumerate(given["path"].tolist()):
        history = given["history"][b].tolist()
        end = min(max(int(given["history_len"][b]), 1), room) - 1
        taken = min(max(int(given["num_path"][b]), 0), len(path), num_pairs, end)
        start = end - taken
        if are_kept:
            start = min(max(int(given["kv_len"][b]), end - num_pairs, 0), start)
        count = end - start
        for place in range(taken):
            node = min(max(path[place], 0), nodes - 1)
            out["features"][b][count - taken + place] = taps[b][node]
        earlier = history[start + 1 : end]
        column = [history[end], *earlier, *[0] * (num_pairs - 1 - len(earlier))]
        for row, token in enumerate(column):
            out["tokens"][row][b] = token
        out["source"][b] = b * num_pairs + max(count - 1, 0)
        if not are_kept:
            out["kv_len"][b] = start
        out["kv_len_after"][b], out["num_earlier"][b] = end, max(count - 1, 0)
        bits = 2 ** max(count, 1) - 1
        out["bits"][b] = [bits - 2**64 if bits >= 2**63 else bits, 0]
    return out


def run(backend: Backend, given: dict[str, Tensor], *, are_kept: bool) -> dict[str, list[Any]]:
    there = {name: value.clone().to(backend.device) for name, value in given.items()}
    ops.draft_pairs(**there, are_kept=are_kept)
    return {name: there[name].cpu().tolist() for name in OUT}


def check(backend: Backend, given: dict[str, Tensor], *, are_kept: bool) -> None:
    assert run(backend, given, are_kept=are_kept) == expected(given, are_kept=are_kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 1160])
def test_an_accepted_paths_pairs(backend: Backend, dtype: torch.dtype, width: int) -> None:
    given = made(Sizes(3, 6, 4, 12, 5, width), dtype)
    given["num_path"] = i32([4, 1, 2])
    said = run(backend, given, are_kept=False)
    assert said == expected(given, are_kept=False)
    # Of the first sequence: seven tokens, the last four of which came with the path.
    assert said["kv_len"][0] == 2 and said["kv_len_after"][0] == 6 and said["num_earlier"][0] == 3
    assert [row[0] for row in said["tokens"]] == [106, 103, 104, 105, 0]
    assert said["source"] == [3, 5, 11] and said["bits"][0] == [15, 0]


def test_those_that_waited_go_on_waiting(backend: Backend) -> None:
    """Two, none, and more than there is room for."""
    given = made(Sizes(3, 4, 2, 20, 4, 8))
    given["kv_len"] = i32([1, 2, 0])
    given["history_len"] = i32([6, 5, 9])
    said = run(backend, given, are_kept=True)
    assert said == expected(given, are_kept=True)
    assert said["kv_len"] == [1, 2, 0] and said["num_earlier"] == [3, 1, 3]
    assert said["features"][0][:2] == [[POISON] * 8] * 2
    assert said["features"][0][3] == given["taps"][0, given["path"][0, 1]].tolist()


@pytest.mark.parametrize("are_kept", [False, True])
def test_whatever_the_numbers_hold(backend: Backend, are_kept: bool) -> None:
    rng = random.Random(int(are_kept))
    given = made(Sizes(40, 3, 3, 6, 4, 4))
    for name in ("num_path", "history_len", "kv_len"):
        given[name] = i32([rng.choice(HOSTILE) for _ in range(40)])
    given["path"] = i32([[rng.choice(HOSTILE) for _ in range(3)] for _ in range(40)])
    check(backend, given, are_kept=are_kept)


def test_sizes_at_their_bounds(backend: Backend) -> None:
    for sizes in (Sizes(0, 1, 1, 4, 1, 4), Sizes(2, 1, 0, 9, 1, 3), Sizes(1, 70, 64, 70, 64, 8)):
        for are_kept in (False, True):
            given = made(sizes)
            given["kv_len"].zero_()
            check(backend, given, are_kept=are_kept)


def test_slices(backend: Backend) -> None:
    given = made(Sizes(4, 6, 3, 12, 4, 16))
    there = {name: value.to(backend.device) for name, value in given.items()}
    wide = torch.full((6, 4, 24), POISON, dtype=torch.float32, device=backend.device)
    sliced = there | {
        "taps": there["taps"][1:3, 1:, 3:14],
        "path": there["path"][1:3, :2],
        "history": there["history"][1:3, :10],
        "features": wide[1:3, :, 5:16],
        "tokens": there["tokens"][:, 1:3],
        "bits": there["bits"][1:3, :1],
    }
    for name in ("num_path", "history_len", *OUT[2:6]):
        sliced[name] = there[name][1:3]
    want = expected({name: value.cpu() for name, value in sliced.items()}, are_kept=False)
    ops.draft_pairs(**sliced, are_kept=False)
    assert {name: sliced[name].cpu().tolist() for name in OUT if name != "bits"} == {
        name: want[name] for name in OUT if name != "bits"
    }
    assert (wide[[0, 3]] == POISON).all() and (wide[..., :5] == POISON).all()
    assert (there["bits"][1:3, 1] == POISON).all()


def test_instruction_sets_and_graphs() -> None:
    isa, given = _C.active_isa(), made(Sizes(2, 4, 3, 9, 4, 33))
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            check(CPU, given, are_kept=False)
    finally:
        _C.set_isa(isa)
    graph = CpuGraph.capture(lambda: ops.draft_pairs(**given, are_kept=False))
    given["num_path"].fill_(1)
    graph.launch()
    assert given["num_earlier"].tolist() == [0, 0]


def test_compiles(device: torch.device) -> None:
    given = {name: value.to(device) for name, value in made(Sizes(2, 4, 3, 9, 4, 8)).items()}
    compiled = torch.compile(ops.draft_pairs, fullgraph=True, backend="aot_eager")
    compiled(**given, are_kept=False)
    assert given["num_earlier"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("taps", torch.zeros(2, 4, 8).int()),
        ("taps", torch.zeros(2, 0, 8)),
        ("path", torch.zeros(2, 3)),
        ("num_path", i32([1, 2, 3])),
        ("history", torch.zeros(2, 0).int()),
        ("history_len", i32([1])),
        ("features", torch.zeros(2, 4, 7)),
        ("features", torch.zeros(2, 4, 8).half()),
        ("features", torch.zeros(2, 65, 8)),
        ("tokens", torch.zeros(2, 4).int()),
        ("source", torch.zeros(2)),
        ("kv_len", torch.zeros(2)),
        ("kv_len_after", i32([1, 2, 3])),
        ("num_earlier", i32([[1, 2]])),
        ("bits", torch.zeros(2, 0).long()),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, name: str, value: Tensor) -> None:
    given = made(Sizes(2, 4, 3, 9, 4, 8)) | {name: value}
    given = {key: tensor.to(backend.device) for key, tensor in given.items()}
    with pytest.raises(ValueError, match=f"^{name}: (expected|the last dimension)"):
        ops.draft_pairs(**given, are_kept=False)


@pytest.mark.parametrize("name", OUT[1:])
def test_tensors_on_two_devices_and_shared_ones_are_named(name: str) -> None:
    given = made(Sizes(2, 4, 3, 9, 4, 8))
    message = f"^{name}: expected a tensor on cpu as taps is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.draft_pairs(**given | {name: OnAnotherGpu(given[name])}, are_kept=False)  # type: ignore[arg-type]
    if name in ("tokens", "bits"):
        return
    with pytest.raises(ValueError, match=f"^num_path: expected memory that is not {name}'s"):
        ops.draft_pairs(**given | {name: given["num_path"]}, are_kept=False)
