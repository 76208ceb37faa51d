"""A window of ``tree_attention``: what is not seen is not read, what is has the bits it always had.

And launches of a level that nobody drafts any more, which do nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.ops.tree_attention import tree_attention
from tests.ops.conftest import Backend
from tests.ops.test_tree_attention import (
    NUM_TICKETS,
    Case,
    Tensor,
    alone,
    batch_arguments,
    ints,
    make_case,
    queries,
    run,
    same_bits,
    simt,
)


def windowed(
    backend: Backend, prefix: int, num_nodes: int, window: int, num_sinks: int, seed: int = 0
) -> Case:
    case = queries(
        make_case(prefix, num_nodes, dtype=torch.bfloat16, seed=seed), backend, torch.bfloat16
    )
    return replace(case, window=window, num_sinks=num_sinks)


@pytest.mark.parametrize(
    ("prefix", "window", "num_sinks"),
    [(520, 100, 0), (520, 190, 4), (700, 1, 0), (700, 64, 70), (300, 299, 1), (50, 64, 4)],
)
def test_a_row_has_the_bits_of_a_sequence_of_what_it_sees(
    backend: Backend, prefix: int, window: int, num_sinks: int
) -> None:
    """All other slots hold NaN: in pages of their own, and beside what is seen."""
    case = windowed(backend, prefix, 21, window, num_sinks, seed=prefix)
    out = run(case, backend=backend)
    assert not out.isnan().any()
    for node in range(0, 21, 5):
        assert torch.equal(out[node], alone(case, node, backend)), node


def test_a_window_of_all_there_is_changes_no_bit(backend: Backend) -> None:
    case = windowed(backend, 300, 9, 10**30, 10**30)
    assert torch.equal(run(case, backend=backend), run(replace(case, window=None), backend=backend))


def test_each_sequence_has_its_own_window(backend: Backend) -> None:
    cases = [windowed(backend, p, n, 40, 3, seed=p) for p, n in ((0, 2), (45, 17), (300, 9))]
    args: dict[str, Any] = batch_arguments(cases, backend)
    out = tree_attention(**args, window=40, num_sinks=3).cpu()
    for b, case in enumerate(cases):
        assert torch.equal(out[b, : len(case.parents)], run(case, backend=backend))


@pytest.mark.parametrize("plan", [(4, 1), (4, 16), (8, 3)], ids=str)
def test_bits_depend_neither_on_the_plan_nor_on_the_gpu(
    backend: Backend, plan: tuple[int, int]
) -> None:
    if backend.name != "simt":
        pytest.skip("a GPU cannot be changed")
    case = windowed(backend, 1500, 17, 700, 10)
    expected = run(case, backend=backend)
    simt().set_device(5, 166912)  # type: ignore[attr-defined]
    assert torch.equal(run(case, backend=backend, plan=ops.AttentionPlan(*plan)), expected)


def test_a_window_is_given_blocks_and_memory_for_what_it_sees(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the GPU's kernel")
    sizes = 1, 8, 2, 128, 10
    long, seen = (
        ops.tree_attention_workspace(*sizes, max_len, backend.device) for max_len in (2**17, 300)
    )
    assert seen < long / 2


# --- predication


def appending(backend: Backend) -> tuple[dict[str, Any], ops.Append]:
    case = queries(make_case(70, 8, dtype=torch.bfloat16), backend, torch.bfloat16)
    args: dict[str, Any] = batch_arguments([case, case], backend)
    dtype = args["q"].dtype
    new = torch.ones(2, 8, 2, 64, dtype=dtype).to(backend.device)
    depth = torch.zeros(2, 8, dtype=torch.int32).to(backend.device)
    return args, ops.Append(new, new, depth, torch.ones(99, 64).to(backend.device))


def test_if_nobody_is_open_nothing_is_written(backend: Backend) -> None:
    args, append = appending(backend)
    before = {name: a.clone() for name, a in args.items() if isinstance(a, Tensor)}
    closed = ints(0, 0).to(backend.device)
    tree_attention(**args, append=append if backend.runs_cuda_source else None, is_open=closed)
    for name, tensor in before.items():
        assert same_bits(args[name].contiguous(), tensor.contiguous()), name


@pytest.mark.parametrize("is_open", [(0, 1), (7, -1)])
def test_if_anybody_is_open_all_are_attended(backend: Backend, is_open: tuple[int, int]) -> None:
    case = queries(make_case(70, 8, dtype=torch.bfloat16), backend, torch.bfloat16)
    args: dict[str, Any] = batch_arguments([case, case], backend)
    expected = tree_attention(**args).clone()
    args["out"].fill_(float("nan"))
    flags = ints(*is_open).to(backend.device)
    assert torch.equal(tree_attention(**args, is_open=flags), expected)
    if backend.runs_cuda_source:
        assert (args["workspace"][:NUM_TICKETS] == 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", 0),
        ("window", -3),
        ("num_sinks", -1),
        ("is_open", torch.zeros(1, dtype=torch.int64)),
        ("is_open", torch.zeros(1, 1, dtype=torch.int32)),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(name: str, value: object) -> None:
    args: dict[str, Any] = batch_arguments([make_case(24, 8)])
    with pytest.raises(ValueError, match=f"^{name}:"):
        tree_attention(**args, **{name: value})
