from __future__ import annotations

import pytest
import torch

from specrt.ops import kv_commit

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_arguments(dtype: torch.dtype = torch.float32, page_size: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(page_size)
    pages = -(-40 // page_size)
    kv = torch.randn(3, 2, 4 * pages + 1, page_size, 2, 16, generator=g).to(dtype)
    table = torch.randperm(4 * pages + 1, generator=g)[: 4 * pages].view(4, pages).int()
    path = torch.tensor([[0, 2, 5, 9], [0, 1, 2, 3], [0, -1, -1, -1], [1, 3, 4, 7]])
    return {
        "kv": kv,
        "block_table": table,
        "path": path.int(),
        "num_path": ints(4, 3, 0, -1),
        "kv_len": ints(7, 16, 1, 9),
    }


def slots(kv: Tensor, table: Tensor) -> Tensor:
    """``[L, 2, S, Hkv, d]``, a sequence's slots in order."""
    return kv[:, :, table.long()].flatten(2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 4, 64])
def test_moves_accepted_rows_and_nothing_else(dtype: torch.dtype, page_size: int) -> None:
    args = make_arguments(dtype, page_size)
    before, lengths = args["kv"].clone(), args["kv_len"].clone()
    kv_commit(**args)
    assert args["kv_len"].tolist() == [11, 19, 1, 9]
    touched = torch.zeros(before.shape[2], page_size, dtype=torch.bool)
    for b in range(4):
        old, new = (slots(x, args["block_table"][b]) for x in (before, args["kv"]))
        expected, length = old.clone(), int(lengths[b])
        for j in range(max(0, int(args["num_path"][b]))):
            expected[:, :, length + j] = old[:, :, length + int(args["path"][b, j])]
        assert torch.equal(new, expected)
        touched[args["block_table"][b].long()] = True
    assert torch.equal(args["kv"][:, :, ~touched[:, 0]], before[:, :, ~touched[:, 0]])


def test_threads_and_compile_give_the_same_bits() -> None:
    args = make_arguments()
    fresh = {name: value.clone() for name, value in args.items()}
    compiled = {name: value.clone() for name, value in args.items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        kv_commit(**args)
        torch.set_num_threads(1)
        kv_commit(**fresh)
    finally:
        torch.set_num_threads(threads)
    torch.compile(kv_commit, fullgraph=True, backend="aot_eager")(**compiled)
    for other in (fresh, compiled):
        assert torch.equal(args["kv"], other["kv"])
        assert torch.equal(args["kv_len"], other["kv_len"])


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
def test_a_wrong_argument_is_named(name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        kv_commit(**(make_arguments() | {name: value}))
