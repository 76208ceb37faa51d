from __future__ import annotations

from typing import Any

import pytest
import torch

from specrt import ops
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIMT_SCHEDULES = (1, 0, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_arguments(
    dtype: torch.dtype = torch.float32,
    page_size: int = 4,
    shape: tuple[int, int, int] = (3, 2, 16),
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Of ``shape`` (layers, heads, head_dim)."""
    g = torch.Generator().manual_seed(page_size)
    num_layers, heads, dim = shape
    pages = -(-40 // page_size)
    kv = torch.randn(num_layers, 2, 4 * pages + 1, page_size, heads, dim, generator=g).to(dtype)
    table = torch.randperm(4 * pages + 1, generator=g)[: 4 * pages].view(4, pages).int()
    path = torch.tensor([[0, 2, 5, 9], [0, 1, 2, 3], [0, -1, -1, -1], [1, 3, 4, 7]])
    arguments = {
        "kv": kv,
        "block_table": table,
        "path": path.int(),
        "num_path": ints(4, 3, 0, -1),
        "kv_len": ints(7, 16, 1, 9),
        "tickets": ints(0, 0, 0, 0),
    }
    return {name: value.to(device) for name, value in arguments.items()}


def slots(kv: Tensor, table: Tensor) -> Tensor:
    """``[L, 2, S, Hkv, d]``, a sequence's slots in order."""
    return kv[:, :, table.long()].flatten(2, 3)


def expected_of(args: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """The cache and the lengths after the call: the rows in order, by way of a copy."""
    kv, lengths = args["kv"].clone(), args["kv_len"].tolist()
    page_size = kv.shape[3]
    for b, table in enumerate(args["block_table"].tolist()):
        count = min(int(args["num_path"][b]), args["path"].shape[1])
        for j, node in enumerate(args["path"][b].tolist()[: max(count, 0)]):
            source, dest = lengths[b] + node, lengths[b] + j
            kv[:, :, table[dest // page_size], dest % page_size] = args["kv"][
                :, :, table[source // page_size], source % page_size
            ]
        lengths[b] += max(count, 0)
    return kv, lengths


def check(args: dict[str, Tensor]) -> None:
    kv, lengths = expected_of(args)
    ops.kv_commit(**args)
    assert torch.equal(args["kv"], kv)
    assert args["kv_len"].tolist() == lengths
    assert not args["tickets"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 4, 64])
def test_moves_accepted_rows_and_nothing_else(
    backend: Backend, dtype: torch.dtype, page_size: int
) -> None:
    args = make_arguments(dtype, page_size, device=backend.device)
    before = args["kv"].clone()
    check(args)
    assert args["kv_len"].tolist() == [11, 19, 1, 9]
    old, new = (slots(x, args["block_table"][0]) for x in (before, args["kv"]))
    assert torch.equal(new[:, :, 7:11], old[:, :, [7, 9, 12, 16]])


# Rows of 2, 10 and 6 bytes (no multiple of 16), and of more columns than a block has threads.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 1), torch.bfloat16),
        ((2, 1, 5), torch.float16),
        ((3, 3, 1), torch.bfloat16),
        ((2, 8, 192), torch.float32),
    ],
)
def test_rows_of_any_size(
    backend: Backend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(make_arguments(dtype, 4, shape, backend.device))


def test_a_cache_that_begins_anywhere(backend: Backend) -> None:
    args = make_arguments(torch.bfloat16, device=backend.device)
    room = torch.zeros(args["kv"].numel() + 1, dtype=torch.bfloat16, device=backend.device)
    args["kv"] = room[1:].view(args["kv"].shape).copy_(args["kv"])
    check(args)


@pytest.mark.parametrize("page_size", [3, 64])
def test_paths_longer_than_a_thread_holds(backend: Backend, page_size: int) -> None:
    args = make_arguments(torch.bfloat16, page_size, (1, 2, 16), backend.device)
    g = torch.Generator().manual_seed(2)
    paths = [torch.randperm(30, generator=g)[:19].sort().values for _ in range(4)]
    args["path"] = torch.stack(paths).int().to(backend.device)
    args["num_path"] = ints(19, 8, 9, 40).to(backend.device)  # the last: no more than there are
    args["kv_len"] = ints(0, 3, 9, 10).to(backend.device)
    check(args)


def test_lengths_advance_again_and_again(backend: Backend) -> None:
    args = make_arguments(device=backend.device)
    for _ in range(3):
        check(args)


def test_the_last_of_several_caches_advances(backend: Backend) -> None:
    """Each with a table of its own; none sees a length that another has advanced."""
    one, other = (make_arguments(device=backend.device) for _ in range(2))
    other["block_table"] = other["block_table"].flip(0).contiguous()
    expected, before = expected_of(one), one["kv_len"].tolist()
    ops.kv_commit(**one, is_last=False)
    assert torch.equal(one["kv"], expected[0])
    assert one["kv_len"].tolist() == before and not one["tickets"].any()
    check(other | {"kv_len": one["kv_len"], "tickets": one["tickets"]})
    assert one["kv_len"].tolist() == expected[1]


def test_empty_paths_and_batches(backend: Backend) -> None:
    args = make_arguments(device=backend.device)
    check(args | {"path": args["path"][:, :0]})
    names = ("block_table", "path", "num_path", "kv_len", "tickets")
    check(args | {name: args[name][:0] for name in names})


def test_threads_give_the_same_bits() -> None:
    wide = (3, 8, 64)  # 4 sequences of these are worth seven threads
    before, fresh = torch.get_num_threads(), make_arguments(shape=wide)
    torch.set_num_threads(1)
    ops.kv_commit(**fresh)
    try:
        for count in (2, 3, 8):
            args = make_arguments(shape=wide)
            torch.set_num_threads(count)
            ops.kv_commit(**args)
            assert torch.equal(args["kv"], fresh["kv"])
            assert torch.equal(args["kv_len"], fresh["kv_len"])
    finally:
        torch.set_num_threads(before)


def test_compiles_and_makes_its_own_tickets(device: torch.device) -> None:
    args = make_arguments(device=device)
    del args["tickets"]
    compiled = {name: value.clone() for name, value in args.items()}
    ops.kv_commit(**args)
    torch.compile(ops.kv_commit, fullgraph=True, backend="aot_eager")(**compiled)
    assert torch.equal(args["kv"], compiled["kv"])
    assert torch.equal(args["kv_len"], compiled["kv_len"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv", torch.zeros(3, 3, 5, 4, 2, 16)),
        ("kv", torch.zeros(3, 2, 5, 4, 2, 16, dtype=torch.int32)),
        ("kv", torch.zeros(3, 2, 5, 2, 4, 16).transpose(3, 4)),
        ("block_table", torch.zeros(2, 9, dtype=torch.int32)),
        ("path", torch.zeros(4, 4, dtype=torch.int64)),
        ("num_path", torch.zeros(3, dtype=torch.int32)),
        ("kv_len", torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, name: str, value: Tensor) -> None:
    args = make_arguments(device=backend.device) | {name: value.to(backend.device)}
    with pytest.raises(ValueError, match=f"^{name}:"):
        ops.kv_commit(**args)


@pytest.mark.parametrize("name", ["block_table", "path", "num_path", "kv_len"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    args: dict[str, Any] = {**make_arguments()}
    args[name] = OnAnotherGpu(args[name])
    message = f"^{name}: expected a tensor on cpu as kv is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.kv_commit(**args)


@pytest.mark.parametrize("tickets", [ints(0, 0, 0), torch.zeros(4)])
def test_wrong_tickets_are_named_where_they_are_used(backend: Backend, tickets: Tensor) -> None:
    args = make_arguments(device=backend.device) | {"tickets": tickets.to(backend.device)}
    if backend.name == "cpu":
        return ops.kv_commit(**args)
    with pytest.raises(ValueError, match=r"^tickets: expected \[B\] = \[4\] int32"):
        ops.kv_commit(**args)
