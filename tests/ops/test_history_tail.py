"""The last tokens of histories, against slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
CPU = Backend("cpu", torch.device("cpu"))
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
POISON = -77


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def histories(batch: int, room: int) -> Tensor:
    return torch.arange(batch * room, dtype=torch.int32).view(batch, room)


def tails(backend: Backend, history: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Tokens, written in the middle of a tensor that stays poisoned, and starts."""
    batch, there = len(lengths), backend.device
    room = torch.full((batch, width + 2), POISON, dtype=torch.int32, device=there)
    start = torch.full((batch,), POISON, dtype=torch.int32, device=there)
    ops.history_tail(backend.hold(history), lengths.to(there), room[:, 1 : width + 1], start)
    assert (room[:, [0, -1]] == POISON).all()
    return room[:, 1 : width + 1].cpu(), start.cpu()


@pytest.mark.parametrize("width", [1, 5, 32, 33, 64])
def test_the_last_token_is_in_the_last_place(backend: Backend, width: int) -> None:
    history, lengths = histories(4, 70), i32(width, 65, 70, 69)
    tokens, start = tails(backend, history, lengths, width)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(tokens[row], history[row, length - width : length])
        assert start[row] == length - width


def test_what_is_too_short_begins_at_its_first_token(backend: Backend) -> None:
    history = histories(6, 4)
    tokens, start = tails(backend, history, i32(2, 0, -1, INT_MIN, 4, INT_MIN + 5), 6)
    assert start.tolist() == [0] * 6
    assert torch.equal(tokens, torch.nn.functional.pad(history, (0, 2)))


def test_lengths_above_the_room_there_is(backend: Backend) -> None:
    tokens, start = tails(backend, histories(2, 9), i32(10, INT_MAX), 3)
    assert tokens.tolist() == [[6, 7, 8], [15, 16, 17]] and start.tolist() == [6, 6]


def test_slices_and_no_sequences(backend: Backend) -> None:
    wide = histories(4, 30)
    tokens, _ = tails(backend, wide[::2, 3:20], i32(5, 17), 4)
    assert tokens.tolist() == [wide[0, 4:8].tolist(), wide[2, 16:20].tolist()]
    assert tails(backend, histories(0, 5), i32(), 3)[0].shape == (0, 3)
    assert tails(backend, histories(2, 5), i32(3, 4), 0)[1].tolist() == [3, 4]


def test_instruction_sets_and_graphs() -> None:
    isa, history, lengths = _C.active_isa(), histories(3, 40), i32(20, 33, 40)
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            assert tails(CPU, history, lengths, 7)[1].tolist() == [13, 26, 33]
    finally:
        _C.set_isa(isa)
    tokens, start = torch.zeros(3, 2, dtype=torch.int32), i32(0, 0, 0)
    graph = CpuGraph.capture(lambda: ops.history_tail(history, lengths, tokens, start))
    lengths -= 1
    graph.launch()
    assert start.tolist() == [17, 30, 37] and tokens[0].tolist() == [17, 18]


def test_compiles(device: torch.device) -> None:
    given = histories(2, 9).to(device), i32(5, 7).to(device)
    out = torch.zeros(2, 3, dtype=torch.int32, device=device), i32(0, 0).to(device)
    torch.compile(ops.history_tail, fullgraph=True, backend="aot_eager")(*given, *out)
    assert out[0].tolist() == [[2, 3, 4], [13, 14, 15]] and out[1].tolist() == [2, 4]


def arguments_of(backend: Backend) -> dict[str, Any]:
    made = {"history": histories(2, 9), "history_len": i32(5, 7)}
    made |= {"tokens": torch.zeros(2, 3, dtype=torch.int32), "start": i32(0, 0)}
    return {name: value.to(backend.device) for name, value in made.items()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", torch.zeros(2, 9)),
        ("history", torch.zeros(9, 2, dtype=torch.int32).T),
        ("history_len", i32(1, 2, 3)),
        ("tokens", torch.zeros(3, 3, dtype=torch.int32)),
        ("start", torch.zeros(2)),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}: (expected|the last dimension)"):
        ops.history_tail(**arguments_of(backend) | {name: value.to(backend.device)})


def test_an_input_that_is_an_output_is_named() -> None:
    arguments = arguments_of(CPU)
    shared = {"tokens": arguments["history"][:, :3]}
    with pytest.raises(ValueError, match="^history: expected memory that is not tokens's"):
        ops.history_tail(**arguments | shared)


@pytest.mark.parametrize("name", ["history_len", "tokens", "start"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    arguments = arguments_of(CPU)
    arguments[name] = OnAnotherGpu(arguments[name])
    message = f"^{name}: expected a tensor on cpu as history is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.history_tail(**arguments)
