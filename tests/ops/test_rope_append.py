from __future__ import annotations

import pytest
import torch

from specrt import _C
from specrt.models.rope import rope_table
from specrt.ops import rope_append

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_arguments(
    dim: int = 64, dtype: torch.dtype = torch.float32, page_size: int = 4
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(dim)
    fused = torch.randn(2, 6, 4 + 2 + 2, dim, generator=g)  # strided views, as a qkv linear gives
    pages = -(-40 // page_size)
    shape = (2 * pages + 1, page_size, 2, dim)
    return {
        "q": fused[:, :, :4],
        "k": fused[:, :, 4:6],
        "v": fused[:, :, 6:],
        "depth": torch.randint(0, 5, (2, 6), generator=g, dtype=torch.int32),
        "kv_len": ints(0, 17),
        "first_node": ints(0, 3),
        "num_nodes": ints(6, 4),
        "block_table": torch.randperm(2 * pages + 1, generator=g)[:-1].view(2, pages).int(),
        "cos_sin": rope_table(dim, 10000.0, 64),
        "k_cache": torch.full(shape, 7.0, dtype=dtype),
        "v_cache": torch.full(shape, 7.0, dtype=dtype),
    }


def clone(args: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in args.items()}


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Hugging Face's expression for one row, ``[heads, d]``."""
    cos, sin = (t.repeat(2) for t in cos_sin.chunk(2))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def expected_of(args: dict[str, Tensor]) -> dict[str, Tensor]:
    e, page_size = clone(args), args["k_cache"].shape[1]
    for b in range(2):
        for i in range(int(args["num_nodes"][b])):
            cos_sin = args["cos_sin"][int(args["kv_len"][b] + args["depth"][b, i])]
            slot = int(args["kv_len"][b] + args["first_node"][b]) + i
            page = int(args["block_table"][b, slot // page_size])
            e["q"][b, i] = rotate(args["q"][b, i], cos_sin)
            e["k_cache"][page, slot % page_size] = rotate(args["k"][b, i], cos_sin)
            e["v_cache"][page, slot % page_size] = args["v"][b, i]
    return e


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 256])
def test_is_hugging_faces_rope_bit_for_bit(dim: int, dtype: torch.dtype) -> None:
    for page_size in (1, 4, 64):
        args = make_arguments(dim, dtype, page_size)
        expected = expected_of(args)
        rope_append(**args)
        for name in args:  # what is not written keeps its value
            assert torch.equal(args[name], expected[name]), name


def test_bits_do_not_depend_on_isa_or_threads() -> None:
    expected = expected_of(make_arguments(80, torch.bfloat16))
    isa, threads = _C.active_isa(), torch.get_num_threads()
    try:
        for name in _C.build_info()["cpu_isas"]:
            _C.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                args = make_arguments(80, torch.bfloat16)
                rope_append(**args)
                assert all(torch.equal(args[n], expected[n]) for n in args), (name, count)
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


def test_slots_past_the_block_table_are_not_written() -> None:
    args = make_arguments()
    args["kv_len"] = ints(38, 63)  # sequence 0 has 40 slots; 63 is the last position known
    args["block_table"] = args["block_table"].contiguous()
    before = clone(args)
    rope_append(**args)
    assert (args["k_cache"] != before["k_cache"]).any(-1).any(-1).sum() == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(2, 6, 4, 63)),
        ("k", torch.zeros(2, 5, 2, 64)),
        ("v", torch.zeros(2, 6, 1, 64)),
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
def test_a_wrong_argument_is_named(name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        rope_append(**(make_arguments() | {name: value}))


def test_compiles() -> None:
    args = make_arguments()
    args["q"] = args["q"].clone()
    expected = expected_of(args)
    torch.compile(rope_append, fullgraph=True, backend="aot_eager")(**args)
    assert all(torch.equal(args[name], expected[name]) for name in args)


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


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_other_rope_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=kind):
        rope_table(64, 10000.0, 16, {"rope_type": kind, "factor": 2.0})
