"""Rows of a table by token, in the table's type or another, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import _C, ops
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
SIMT_SCHEDULES = (1, 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(one, other) for one in DTYPES for other in DTYPES]
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table_of(vocab: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of values that 16 bits do not hold, ties of the rounding among them."""
    g = torch.Generator().manual_seed(width)
    table = torch.randn(vocab, width, generator=g)
    table[:, ::3] = 1 + 2**-9 + torch.randint(0, 2, table[:, ::3].shape, generator=g) * 2**-8
    return table.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def in_wider(tensor: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """A poisoned tensor, and the given one in the middle of its rows."""
    wider = tensor.new_full((tensor.shape[0], left + tensor.shape[1] + right), float("nan"))
    wider[:, left:-right] = tensor
    return wider, wider[:, left:-right]


@pytest.mark.parametrize(("dtype", "wanted"), PAIRS)
@pytest.mark.parametrize("width", [1, 8, 37, 64, 2056])
def test_rows_are_torchs(
    backend: Backend, width: int, dtype: torch.dtype, wanted: torch.dtype
) -> None:
    table, tokens = table_of(7, width, dtype), i32(3, 0, 6, 3, 5)
    expected = table.index_select(0, tokens).to(wanted)
    out = torch.full((5, width), float("nan"), dtype=wanted, device=backend.device)
    got = ops.embed(tokens.to(backend.device), table.to(backend.device), out)
    assert got is out and torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("of_table", "of_out"),  # begin and rows at multiples of 16 bytes, all but one, none
    [((8, 8), (8, 8)), ((1, 15), (8, 8)), ((8, 8), (1, 15)), ((8, 1), (8, 8)), ((1, 1), (1, 1))],
)
def test_strided_rows_and_nothing_around_them(
    backend: Backend, of_table: tuple[int, int], of_out: tuple[int, int], dtype: torch.dtype
) -> None:
    table = table_of(5, 48, dtype).to(backend.device)
    tokens = i32(4, 1, 1).to(backend.device)
    for wanted in DTYPES:
        expected = table.index_select(0, tokens).to(wanted)
        wider, out = in_wider(expected * 0, *of_out)
        ops.embed(tokens, in_wider(table, *of_table)[1], out)
        assert torch.equal(out, expected)
        assert int(wider.isnan().sum()) == sum(of_out) * len(tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_copied_to_the_bit(backend: Backend, dtype: torch.dtype) -> None:
    """Where no type changes; any NaN too."""
    words = torch.int32 if dtype == torch.float32 else torch.int16
    info, g = torch.iinfo(words), torch.Generator().manual_seed(0)
    table = torch.randint(info.min, info.max, (9, 64), generator=g, dtype=words).view(dtype)
    tokens = torch.arange(9, dtype=torch.int32).flip(0)
    got = ops.embed(tokens.to(backend.device), table.to(backend.device))
    assert torch.equal(bits(got.cpu()), bits(table.flip(0)))


@pytest.mark.parametrize("width", [64, 5])
def test_what_is_no_token_is_the_nearest(backend: Backend, width: int) -> None:
    table, tokens = table_of(6, width), i32(INT_MIN, -1, 0, 5, 6, INT_MAX)
    got = ops.embed(tokens.to(backend.device), table.to(backend.device))
    assert torch.equal(got.cpu(), table[[0, 0, 0, 5, 5, 5]])


def test_columns_and_which_rows_they_were(backend: Backend) -> None:
    """Of wider tables, whose other columns stay as they are."""
    table = table_of(6, 64).to(backend.device)
    tokens = i32(*range(-3, 9)).view(4, 3).to(backend.device)
    ids = torch.full((4, 2), 9, dtype=torch.int32, device=backend.device)
    got = ops.embed(tokens[:, 1], table, ids=ids[:, 1])
    assert ids.tolist() == [[9, 0], [9, 1], [9, 4], [9, 5]]
    assert torch.equal(got, table[[0, 1, 4, 5]])


@pytest.mark.parametrize("width", [5, 2056])
def test_a_closed_level_has_no_rows(backend: Backend, width: int) -> None:
    table, tokens = table_of(6, width).to(backend.device), i32(2, 9, -4).to(backend.device)
    out, ids = torch.zeros(3, width, device=backend.device), torch.zeros_like(tokens)
    for flags, wanted in (((0, 0), [-1] * 3), ((0, -1), [2, 5, 0])):
        ops.embed(tokens, table, out, ids=ids, is_open=i32(*flags).to(backend.device))
        assert ids.tolist() == wanted
        assert torch.equal(out, table[wanted] if any(flags) else out * 0)


@pytest.mark.parametrize(("dtype", "wanted"), PAIRS)
def test_instruction_sets_and_threads(dtype: torch.dtype, wanted: torch.dtype) -> None:
    table, tokens = table_of(70, 1003, dtype), torch.arange(70, dtype=torch.int32).flip(0)
    expected = table.flip(0).to(wanted)
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(ops.embed(tokens, table, expected * 0), expected), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("rows", "vocab", "width"), [(0, 3, 8), (0, 0, 8), (3, 2, 0)])
def test_nothing_to_do(backend: Backend, rows: int, vocab: int, width: int) -> None:
    there = backend.device
    tokens = torch.zeros(rows, dtype=torch.int32, device=there)
    out = ops.embed(tokens, torch.zeros(vocab, width, device=there))
    assert out.shape == (rows, width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2)}, r"tokens: expected \[M\] = \[\*\] int32, got \[2\] float32"),
        ({"tokens": torch.zeros(2).long()}, r"tokens: expected \[M\]"),
        ({"tokens": i32(0, 0, 0)}, r"out: expected \[M, H\] = \[3, 8\]"),
        ({"table": torch.zeros(8)}, r"table: expected \[V, H\]"),
        ({"table": torch.zeros(4, 8).double()}, "table: expected float32, bfloat16 or float16"),
        ({"table": torch.zeros(0, 8)}, r"table: expected 1 to 2\^31 - 1 rows, got \[0, 8\]"),
        ({"table": torch.zeros(4, 7)}, r"out: expected \[M, H\] = \[2, 7\]"),
        ({"table": torch.zeros(8, 4).t()}, "table: the last dimension must be contiguous"),
        ({"out": torch.zeros(2, 8).int()}, "out: expected float32, bfloat16 or float16"),
        ({"out": torch.zeros(8, 2).t()}, "out: the last dimension must be contiguous"),
        ({"ids": i32(0, 0, 0)}, r"ids: expected \[M\] = \[2\] int32, got \[3\] int32"),
        ({"ids": torch.zeros(2, 1).int()}, r"ids: expected \[M\]"),
        ({"is_open": torch.zeros(2)}, r"is_open: expected \[B\] = \[\*\] int32, got"),
    ],
)
def test_wrong_arguments_are_named(
    backend: Backend, change: dict[str, Tensor], message: str
) -> None:
    given = {"tokens": i32(0, 1), "table": torch.zeros(4, 8), "out": torch.zeros(2, 8)}
    arguments = {name: value.to(backend.device) for name, value in (given | change).items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.embed(**arguments)


def test_shared_memory_is_named(backend: Backend) -> None:
    memory = torch.zeros(6, 8, device=backend.device)
    with pytest.raises(ValueError, match="^table: expected memory that is not out's"):
        ops.embed(i32(0, 1).to(backend.device), memory[:4], memory[3:5])
    ids = torch.zeros(4, dtype=torch.int32, device=backend.device)
    for other in ({"is_open": ids[1:3]}, {"tokens": ids[::2]}):
        given = {"tokens": i32(0, 1).to(backend.device), **other}
        with pytest.raises(ValueError, match="^(tokens|is_open): expected memory that is not ids'"):
            ops.embed(**given, table=memory[:4], out=memory[4:], ids=ids[2:])


@pytest.mark.parametrize("name", ["table", "out"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": i32(0, 1), "table": torch.zeros(4, 8), "out": torch.zeros(2, 8)
    }  # fmt: skip
    arguments[name] = OnAnotherGpu(arguments[name])
    message = f"^{name}: expected a tensor on cpu as tokens is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.embed(**arguments)


def test_under_torch_compile(device: torch.device) -> None:
    table, tokens = table_of(6, 16).to(device), i32(4, 2).to(device)
    function = torch.compile(ops.embed, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(tokens, table), ops.embed(tokens, table))


def positions_of(table: Tensor, kv_len: Tensor, depth: Tensor, offset: int) -> Tensor:
    """Rows of a table of positions, as a batch's rows take them."""
    rows = (kv_len[:, None] + depth + offset).clamp(0, len(table) - 1)
    return table[rows.view(-1).long()]


@pytest.mark.parametrize(("dtype", "wanted"), PAIRS)
@pytest.mark.parametrize("width", [5, 64, 2056])
def test_scaled_rows_and_positions(
    backend: Backend, width: int, dtype: torch.dtype, wanted: torch.dtype
) -> None:
    """To the bit: product and sum in float32, rounded once; a place past the table is its last."""
    table, places = table_of(9, width, dtype), table_of(20, width, dtype).flip(0)
    tokens, depth, kv_len = i32(3, 0, 8, 1, 5, 2), i32(0, 1, 1, 0, 2, 9).view(2, 3), i32(4, 12)
    looked_up = table.index_select(0, tokens).float()
    added = positions_of(places, kv_len, depth, 2).float()
    there = [t.to(backend.device) for t in (tokens, table, places, depth, kv_len)]
    at = ops.EmbedPositions(there[2], there[3], there[4], 2)
    for scale, positions, expected in (
        (6.5, None, looked_up * 6.5),
        (1.0, at, looked_up + added),
        (0.3, at, looked_up * torch.tensor(0.3) + added),
    ):
        out = torch.full((6, width), float("nan"), dtype=wanted, device=backend.device)
        ops.embed(there[0], there[1], out, scale=scale, positions=positions)
        assert torch.equal(out.cpu(), expected.to(wanted))


def test_scaled_rows_of_packed_tables() -> None:
    table, places = table_of(9, 64), table_of(20, 64)
    packed = ops.pack_matrix(table, ops.MatrixKind.INT8)
    tokens, depth, kv_len = i32(3, 0, 8, 1), i32(0, 1, 1, 3).view(2, 2), i32(4, 12)
    plain = ops.embed(tokens, packed)
    at = ops.EmbedPositions(places, depth, kv_len, 0)
    got = ops.embed(tokens, packed, scale=0.3, positions=at)
    scaled = plain * torch.tensor(0.3)
    assert torch.equal(got, scaled + positions_of(places, kv_len, depth, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.zeros(20, 15)}, r"positions: expected \[P, H\] = \[\*, 16\]"),
        ({"depth": torch.zeros(2, 3).int()}, "depth"),
        ({"kv_len": torch.zeros(3).int()}, "kv_len"),
        ({"kv_len": torch.zeros(2)}, "kv_len"),
    ],
)
def test_wrong_positions_are_named(
    backend: Backend, change: dict[str, Tensor], message: str
) -> None:
    given = {
        "table": torch.zeros(20, 16),
        "depth": torch.zeros(2, 2).int(),
        "kv_len": torch.zeros(2).int(),
    }
    moved = {name: value.to(backend.device) for name, value in (given | change).items()}
    tokens, table = i32(1, 2, 3, 4).to(backend.device), torch.zeros(9, 16, device=backend.device)
    with pytest.raises(ValueError, match=message):
        ops.embed(tokens, table, positions=ops.EmbedPositions(**moved, offset=0))
