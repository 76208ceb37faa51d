"""Layouts of ``tree_attention`` on a GPU: free to choose, since all give the same bits."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from specrt import ops
from specrt.ops import tree_attention
from tests.ops.conftest import Backend
from tests.ops.test_tree_attention import (
    NUM_TICKETS,
    Case,
    batch_arguments,
    make_case,
    queries,
    run,
    simt,
)

PLANS = [ops.AttentionPlan(w, b) for w in (4, 8) for b in (1, 2, 3, 16)]


def cancelling_case(prefix: int, num_nodes: int, heads: tuple[int, int], dim: int) -> Case:
    """The prefix's second half is its first backwards, with values negated: so what comes out is
    little more than the rounding errors of the sums, and shows their order."""
    case = make_case(prefix, num_nodes, heads, dim, torch.bfloat16, seed=prefix)
    half = prefix // 2
    case.k[prefix - half : prefix] = case.k[:half].flip(0)
    case.v[prefix - half : prefix] = -case.v[:half].flip(0)
    case.v[prefix:] *= 2.0**-8
    return case


# Prefixes that end in and between leaves; rows that fill a block of four warps, of eight, or none.
@pytest.mark.parametrize(
    ("prefix", "num_nodes", "heads"),
    [(2047, 1, (4, 2)), (1024, 60, (4, 1)), (300, 128, (2, 2)), (0, 128, (2, 1))],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_plan_gives_the_same_bits(
    backend: Backend, dim: int, prefix: int, num_nodes: int, heads: tuple[int, int]
) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("the CPU has no plans")
    case = queries(cancelling_case(prefix, num_nodes, heads, dim), backend, torch.bfloat16)
    expected = run(case, backend=backend)
    if backend.name == "simt":
        simt().set_device(12, 232448)  # type: ignore[attr-defined]
    for plan in [ops.AttentionPlan(), *PLANS]:
        assert torch.equal(run(case, backend=backend, plan=plan), expected), plan


def test_a_plan_splits_sequences_as_it_says(backend: Backend) -> None:
    """Told by the workspace: a slot for each block, and for each level of merging within a unit
    that shared memory has no room for."""
    if backend.name != "simt":
        pytest.skip("of a GPU whose size is known")
    simt().set_device(4, 232448)  # type: ignore[attr-defined]
    sizes = 1, 4, 1, 128, 16, 16 * 256 - 128, 0  # 64 rows, 16 leaves
    state = (128 // 8 + 1) * 4 * 32  # float32 values of a warp
    plans = {
        (4, 1): 4 * 1,
        (4, 2): 8 * 2,
        (4, 3): 12 * 2,
        (4, 16): 16 * 1,
        (8, 1): 4 * 2,
        (8, 2): 8,
    }
    for (num_warps, blocks_per_sm), slots in plans.items():
        plan = ops.AttentionPlan(num_warps, blocks_per_sm)
        floats = ops.tree_attention_workspace(*sizes, plan)
        assert floats == NUM_TICKETS + slots * num_warps * state, plan
    by_rule = ops.tree_attention_workspace(*sizes)
    assert by_rule == ops.tree_attention_workspace(*sizes, ops.AttentionPlan(4, 2))
    assert by_rule == ops.tree_attention_workspace(*sizes, ops.AttentionPlan())


@pytest.mark.parametrize("fields", [(5, 0), (-4, 1), (4, 17), (8, -1)])
def test_a_plan_that_cannot_be_is_named(backend: Backend, fields: tuple[int, int]) -> None:
    plan = ops.AttentionPlan(*fields)
    with pytest.raises(ValueError, match=r"^plan: expected (num_warps|blocks_per_sm)"):
        ops.tree_attention_workspace(1, 4, 2, 64, 8, 64, backend.device, plan)
    case = queries(make_case(24, 8, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    with pytest.raises(ValueError, match=r"^plan: expected (num_warps|blocks_per_sm)"):
        tree_attention(**args, plan=plan)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [(4, 0), (4, -2), (4, 3)])
def test_a_workspace_for_heads_that_cannot_be_grouped_is_refused(heads: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^num_kv_heads: expected a divisor of num_heads \(4\)"):
        ops.tree_attention_workspace(1, *heads, 64, 8, 64, 0)


@pytest.mark.parametrize(
    ("device", "index"),
    [(2, 2), (torch.device("cuda", 1), 1), (torch.device("cuda"), -1), (torch.device("cpu"), -1)],
)
def test_the_workspace_is_for_the_gpu_that_is_named(
    monkeypatch: pytest.MonkeyPatch, device: torch.device | int, index: int
) -> None:
    asked = []
    extension = SimpleNamespace(tree_attention_workspace=lambda *args: asked.append(args) or 7)
    monkeypatch.setattr(sys.modules["specrt.ops.tree_attention"], "_C", extension)
    assert ops.tree_attention_workspace(1, 4, 2, 64, 8, 99, device) == 7
    assert asked == [(index, 1, 2, 2, 8, 64, 99, 0, 0, 0)]
