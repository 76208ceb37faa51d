"""Keys and values that attention appends on its way: the bits of ``rope_append`` before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.ops.tree_attention import tree_attention
from tests.ops.conftest import Backend
from tests.ops.test_tree_attention import Tensor, batch_arguments, make_case, same_bits

SHAPES = [((0, 0, 0), 64), ((0, 0, 0), 80), ((0, 0, 0), 96), ((0, 0, 0), 128), ((3, 1, 5), 64)]

WINDOWS = [
    {"window": 60, "num_sinks": 3},
    {"sliding_window": 60, "cap": 3.0},
    {"sliding_window": 5},
]


@pytest.mark.parametrize(
    ("first_node", "dim", "heads", "options"),
    [(*shape, heads, {}) for shape in SHAPES for heads in ((4, 4), (8, 2))]
    + [((3, 1, 5), 64, (8, 2), options) for options in WINDOWS],
    ids=str,
)
def test_appending_on_the_way_is_rope_append_before_it(
    backend: Backend,
    first_node: tuple[int, ...],
    dim: int,
    heads: tuple[int, int],
    options: dict[str, Any],
) -> None:
    dtype = torch.bfloat16 if backend.runs_cuda_source else torch.float32
    sizes = ((0, first_node[0] + 1), (61, 40), (250, 70))  # prefix, nodes
    cases = [make_case(prefix, nodes, heads, dim, dtype) for prefix, nodes in sizes]
    cases = [replace(case, q=case.q.to(dtype)) for case in cases]
    g = torch.Generator().manual_seed(1)
    shape = (len(cases), 70 - max(first_node), heads[1], dim)
    k, v = (torch.randn(shape, generator=g).to(dtype).to(backend.device) for _ in range(2))
    depth = torch.randint(0, 9, shape[:2], generator=g, dtype=torch.int32).to(backend.device)
    cos_sin = torch.randn(300, dim, generator=g).to(backend.device)  # shorter than the sequences
    first = batch_arguments(cases, backend, first_node)
    second = {n: a.clone() if isinstance(a, Tensor) else a for n, a in first.items()}
    if options:  # the workspace is one for layers without a window
        first["workspace"] = second["workspace"] = None
    slots = ("kv_len", "first_node", "num_nodes", "block_table")
    ops.rope_append(
        first["q"], k, v, depth, *(first[n] for n in slots), cos_sin, first["k_cache"],
        first["v_cache"],
    )  # fmt: skip
    expected = tree_attention(**first, **options)
    append = ops.Append(k, v, depth, cos_sin)
    out = tree_attention(**second, append=append, **options)
    assert torch.equal(out, expected)
    for name in ("k_cache", "v_cache"):
        assert same_bits(first[name], second[name])
