from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.models.rope import rope_table
from tests.ops.conftest import Backend, OnAnotherGpu

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_arguments(
    dim: int = 64,
    cache_dtype: torch.dtype = torch.float32,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(dim)
    # Strided views, as a qkv linear gives.
    fused = torch.randn(2, 6, 4 + 2 + 2, dim, generator=g).to(dtype).to(device)
    pages = -(-40 // page_size)
    shape = (2 * pages + 1, page_size, 2, dim)
    ids = torch.randperm(2 * pages + 1, generator=g)[:-1].view(2, pages).int()
    others = {
        "depth": torch.randint(0, 5, (2, 6), generator=g, dtype=torch.int32),
        "kv_len": ints(0, 17),
        "first_node": ints(0, 3),
        "num_nodes": ints(6, 4),
        "block_table": ids,
        "cos_sin": rope_table(dim, 10000.0, 64),
        "k_cache": torch.full(shape, 7.0, dtype=cache_dtype),
        "v_cache": torch.full(shape, 7.0, dtype=cache_dtype),
    }
    qkv = {"q": fused[:, :, :4], "k": fused[:, :, 4:6], "v": fused[:, :, 6:]}
    return qkv | {name: value.to(device) for name, value in others.items()}


def clone(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in args.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit; equal NaN counts as equal."""
    return all(
        torch.equal(one[name].isnan(), other[name].isnan())
        and torch.equal(one[name].nan_to_num(), other[name].nan_to_num())
        for name in one
    )


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Hugging Face's expression in float32 for one row, ``[heads, d]``."""
    cos, sin = (t.repeat(2) for t in cos_sin.chunk(2))
    wide = x.float()
    a, b = wide.chunk(2, -1)
    return wide * cos + torch.cat([-b, a], -1) * sin


def expected_of(args: dict[str, Tensor]) -> dict[str, Tensor]:
    e, page_size = clone(args), args["k_cache"].shape[1]
    for b in range(2):
        for i in range(int(args["num_nodes"][b])):
            position = (int(args["kv_len"][b]) + int(args["depth"][b, i])) % 2**32
            cos_sin = args["cos_sin"][min(position, args["cos_sin"].shape[0] - 1)]
            e["q"][b, i] = rotate(args["q"][b, i], cos_sin)
            slot = int(args["kv_len"][b] + args["first_node"][b]) + i
            if slot // page_size >= args["block_table"].shape[1]:
                continue
            page = int(args["block_table"][b, slot // page_size])
            e["k_cache"][page, slot % page_size] = rotate(args["k"][b, i], cos_sin)
            e["v_cache"][page, slot % page_size] = args["v"][b, i]
    return e


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 16, 64, 80, 96, 128, 256])
def test_is_hugging_faces_rope_bit_for_bit(
    backend: Backend, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    for page_size in (1, 4, 64):
        args = make_arguments(dim, cache_dtype, page_size, dtype, backend.device)
        expected = expected_of(args)
        ops.rope_append(**args)
        assert same(args, expected)  # what is not written keeps its value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [1, 8])
def test_strides_of_any_kind_and_nothing_around_is_touched(
    backend: Backend, pad: int, dtype: torch.dtype
) -> None:
    args = make_arguments(64, dtype, 4, dtype, backend.device)
    expected = expected_of(args)
    room = args["q"].new_full((2, 6, 8, pad + 64), float("nan"))  # NaN before each head
    for name, heads in (("q", slice(0, 4)), ("k", slice(4, 6)), ("v", slice(6, 8))):
        room[:, :, heads, pad:] = args[name]
        args[name] = room[:, :, heads, pad:]
    ops.rope_append(**args)
    assert same(args, expected)
    assert room[..., :pad].isnan().all()


def test_rows_past_the_count_may_hold_anything(backend: Backend) -> None:
    args = make_arguments(device=backend.device)
    args["num_nodes"][0], args["num_nodes"][1] = 0, -1
    args["depth"][:] = 2**30  # with NaN in the rows, whatever is left of a larger tree
    for name in ("q", "k", "v"):
        args[name][:] = float("nan")
    before = clone(args)
    ops.rope_append(**args)
    assert same(args, before)


def test_slots_past_the_block_table_are_not_written(backend: Backend) -> None:
    args = make_arguments(device=backend.device)
    # Sequence 0 has 40 slots; sequence 1's positions pass the 64 known ones.
    args["kv_len"].copy_(ints(38, 63))
    expected = expected_of(args)
    before = args["k_cache"].clone()
    ops.rope_append(**args)
    assert same(args, expected)
    assert (args["k_cache"] != before).any(-1).any(-1).sum() == 2


def test_depths_that_are_none_take_the_last_known_position(backend: Backend) -> None:
    args = make_arguments(device=backend.device)
    args["depth"].copy_(ints(2**31 - 1, -(2**31), -(2**31) + 1, 64, -1, 2**30).expand(2, 6))
    expected = expected_of(args)
    ops.rope_append(**args)
    assert same(args, expected)


def test_no_rows(backend: Backend) -> None:
    args = make_arguments(device=backend.device)
    for name in ("q", "k", "v", "depth"):
        args[name] = args[name][:, :0]
    before = clone(args)
    ops.rope_append(**args)
    assert same(args, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_isa_or_threads(dtype: torch.dtype) -> None:
    make = partial(make_arguments, 256, torch.bfloat16, dtype=dtype)  # worth four threads
    expected = expected_of(make())
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                args = make()
                ops.rope_append(**args)
                assert same(args, expected), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(2, 6, 4, 63)),
        ("q", torch.zeros(2, 6, 4, 64, dtype=torch.float64)),
        ("k", torch.zeros(2, 5, 2, 64)),
        ("k", torch.zeros(2, 6, 2, 64, dtype=torch.bfloat16)),
        ("v", torch.zeros(2, 6, 1, 64)),
        ("v", torch.zeros(2, 6, 2, 64, dtype=torch.float16)),
        ("depth", torch.zeros(2, 6, dtype=torch.int64)),
        ("kv_len", torch.zeros(3, dtype=torch.int32)),
        ("first_node", torch.zeros(2)),
        ("num_nodes", torch.zeros(2, 1, dtype=torch.int32)),
        ("block_table", torch.zeros(1, 10, dtype=torch.int32)),
        ("cos_sin", torch.zeros(64, 32)),
        ("k_cache", torch.zeros(21, 4, 1, 64)),
        ("v_cache", torch.zeros(21, 4, 2, 64, dtype=torch.float16)),
    ],
)
def test_a_wrong_argument_is_named(backend: Backend, name: str, value: Tensor) -> None:
    args = make_arguments(device=backend.device) | {name: value.to(backend.device)}
    with pytest.raises(ValueError, match=f"^{name}:"):
        ops.rope_append(**args)


@pytest.mark.parametrize("name", [name for name in make_arguments() if name != "q"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    args: dict[str, Any] = {**make_arguments()}
    args[name] = OnAnotherGpu(args[name])
    message = f"^{name}: expected a tensor on cpu as q is, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        ops.rope_append(**args)


def test_compiles(device: torch.device) -> None:
    args = make_arguments(device=device)
    args["q"] = args["q"].clone()
    expected = expected_of(args)
    torch.compile(ops.rope_append, fullgraph=True, backend="aot_eager")(**args)
    assert same(args, expected)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
def test_table_is_transformers(scaling: dict[str, object] | None) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_theta=500000.0, rope_scaling=scaling
    )
    positions = torch.arange(2048)
    theirs = torch.cat(
        [t[0, :, :32] for t in LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])], 1
    )
    ours = rope_table(64, 500000.0, 2048, scaling)
    # transformers rounds frequencies to float32: an angle is off by 2^-23 of itself, twice.
    assert ((ours - theirs).abs() <= 1e-7 + positions[:, None] * 2**-22).all()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("kind", ["su", "dynamic"])
def test_other_rope_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        rope_table(64, 10000.0, 16, {"rope_type": kind, "factor": 2.0})
