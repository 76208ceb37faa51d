"""A model's sliding window in ``tree_attention``, and a cap of scores.

All slots that a row of a call does not see hold NaN, and pages before all windows are given back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.ops.tree_attention import tree_attention
from tests.ops.conftest import Backend
from tests.ops.test_tree_attention import (
    CPU,
    Case,
    alone,
    batch_arguments,
    make_case,
    queries,
    run,
    simt,
)
from tests.ops.test_tree_attention_sums import cancelling
from tests.oracles.paged import attend


def sliding(
    backend: Backend,
    prefix: int,
    num_nodes: int,
    window: int | None,
    cap: float | None = None,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    chain: bool = False,
) -> Case:
    case = make_case(prefix, num_nodes, heads, dim, torch.bfloat16, prefix, chain)
    return replace(queries(case, backend, torch.bfloat16), sliding_window=window, cap=cap)


def some(backend: Backend, num_nodes: int) -> range:
    """Nodes to decode alone: under the shim a launch takes its time."""
    return range(0, num_nodes, 7 if backend.name == "simt" else 1)


# Windows within a block of keys, of one, and none of these; longer than the context.
@pytest.mark.parametrize(
    ("prefix", "window"),
    [(0, 1), (0, 3), (61, 2), (190, 64), (250, 100), (520, 1), (520, 257), (700, 513), (130, 999)],
)
def test_a_node_in_a_tree_has_the_bits_of_decoding_it_alone(
    backend: Backend, prefix: int, window: int
) -> None:
    case = sliding(backend, prefix, 41, window, cap=30.0 if window % 2 else None)
    out = run(case, backend=backend)
    assert not out.isnan().any()
    for node in some(backend, 41):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.parametrize(
    ("prefix", "window", "heads"), [(200, 90, (4, 4)), (300, 17, (20, 1))], ids=str
)
def test_a_prompt_in_pieces_has_the_bits_of_its_rows_alone(
    backend: Backend, prefix: int, window: int, heads: tuple[int, int]
) -> None:
    case = sliding(backend, prefix, 128, window, heads=heads, chain=True)
    out = run(case, backend=backend)
    assert not out.isnan().any()
    for rows in (slice(0, 50), slice(50, 51), slice(51, 128)):
        assert torch.equal(run(case, rows, page_size=3, backend=backend), out[rows])
    for node in (0, 16, 55, 56, 120, 127):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("window", [9, 77, 250])
def test_the_last_bits_of_a_sum_are_those_of_decoding_alone(backend: Backend, window: int) -> None:
    case = cancelling(make_case(255, 33, dtype=torch.bfloat16))
    case = replace(queries(case, backend, torch.bfloat16), sliding_window=window)
    out = run(case, backend=backend)
    for node in range(0, 33, 8):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.tensor_cores("sm_80", "sm_90")
def test_places_before_a_window_are_the_same_everywhere(backend: Backend) -> None:
    """They count as zeros times some value, and a tensor core may see the size of that value."""
    case = make_case(40, 6, dtype=torch.bfloat16, chain=True)
    # Node i sees 20 + i to 40 + i. Some of what comes before has huge values, as has the first
    # key of node 3, of no weight.
    case = replace(case, q=case.q.abs() + 1, k=case.k.abs(), v=2.0**-20 * case.v)
    for slot in (21, 23):
        case.k[slot], case.v[slot] = -100, 2.0**120
    case = replace(queries(case, backend, torch.bfloat16), sliding_window=21)
    out = run(case, backend=backend)
    for node in range(6):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.parametrize(
    ("heads", "dim"), [((4, 2), 64), ((7, 1), 96), ((3, 3), 128), ((20, 1), 80), ((4, 2), 256)]
)
@pytest.mark.parametrize(("window", "cap"), [(100, None), (None, 2.0), (33, 0.5)])
def test_error_within_twice_torchs(
    backend: Backend, heads: tuple[int, int], dim: int, window: int | None, cap: float | None
) -> None:
    if backend.runs_cuda_source and dim > 128:
        pytest.skip("GPUs have no kernel of that head size")
    case = sliding(backend, 291, 9, window, cap, heads, dim)
    case = replace(case, q=case.q.to(torch.bfloat16))
    out = run(case, backend=backend)
    for node in (0, 8):
        slots = case.visible(node)
        args = case.q[node], case.k[slots], case.v[slots], case.scale
        exact = attend(*args, torch.float64, cap)
        theirs = (attend(*args, torch.bfloat16, cap) - exact).abs().max()
        assert (out[node] - exact).abs().max() <= 2 * theirs


def test_a_cap_is_that_of_float64() -> None:
    case = make_case(70, 3)
    case = replace(case, q=20 * case.q, cap=3.0)
    out = run(case)
    for node in range(3):
        slots = case.visible(node)
        args = case.q[node], case.k[slots], case.v[slots], case.scale
        torch.testing.assert_close(
            out[node].double(), attend(*args, torch.float64, 3.0), atol=1e-5, rtol=1e-5
        )


def test_bits_do_not_depend_on_pages_rows_isa_or_threads() -> None:
    case = sliding(CPU, 100, 37, 40, 5.0, (6, 2), 80)
    expected = run(case)
    for page_size in (1, 3, 64):
        assert torch.equal(run(case, page_size=page_size), expected)
    for rows in (slice(0, 1), slice(5, 6), slice(11, 30)):
        assert torch.equal(run(case, rows), expected[rows])
    torch.set_num_threads(3)
    assert torch.equal(run(case), expected)
    for isa in _C.build_info()["cpu_isas"]:
        _C.set_isa(isa)
        assert torch.equal(run(case), expected), isa


@pytest.mark.parametrize("num_nodes", [1, 30])
def test_bits_depend_neither_on_the_plan_nor_on_the_gpu(backend: Backend, num_nodes: int) -> None:
    """Windows that begin within leaves of any number, and units of any size."""
    if backend.name != "simt":
        pytest.skip("a GPU cannot be changed")
    for prefix, window in ((1990, 700), (2040, 30), (1100, 1000)):
        case = sliding(backend, prefix, num_nodes, window)
        expected = run(case, backend=backend)
        exact = attend(
            case.q[0], *(t[case.visible(0)] for t in (case.k, case.v)), case.scale, torch.float64
        )
        torch.testing.assert_close(expected[0].double(), exact, atol=2e-2, rtol=2e-2)
        for seed, num_sms, plan in (
            (1, 1, (8, 1)),
            (2, 5, (0, 0)),
            (3, 12, (4, 3)),
            (4, 64, (4, 16)),
        ):
            simt().set_schedule(seed)  # type: ignore[attr-defined]
            simt().set_device(num_sms, 232448 if seed % 2 else 92160)  # type: ignore[attr-defined]
            out = run(case, backend=backend, plan=ops.AttentionPlan(*plan))
            assert torch.equal(out, expected), (window, num_sms)


def test_a_window_of_all_there_is_changes_no_bit(backend: Backend) -> None:
    case = sliding(backend, 300, 9, 10**30)
    assert torch.equal(
        run(case, backend=backend), run(replace(case, sliding_window=None), backend=backend)
    )


def test_each_sequence_has_its_own_window(backend: Backend) -> None:
    cases = [sliding(backend, p, n, 40, 9.0) for p, n in ((0, 2), (45, 17), (300, 9))]
    args: dict[str, Any] = batch_arguments(cases, backend)
    args["workspace"] = None
    out = tree_attention(**args, sliding_window=40, cap=9.0).cpu()
    for b, case in enumerate(cases):
        assert torch.equal(out[b, : len(case.parents)], run(case, backend=backend))


def test_nan_stays_in_the_rows_that_see_it(backend: Backend) -> None:
    case = sliding(backend, 100, 30, 50, chain=True)
    expected = run(case, backend=backend)
    case.k[60], case.v[60] = float("nan"), float("nan")
    out = run(case, backend=backend)
    assert out[:10].isnan().all() and torch.equal(out[10:], expected[10:])


def test_a_window_is_given_blocks_and_memory_for_what_it_sees(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the GPU's kernel")
    sizes = 1, 8, 2, 128, 10, 2**17, backend.device
    seen = ops.tree_attention_workspace(*sizes, sliding_window=300)
    assert seen < ops.tree_attention_workspace(*sizes) / 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sliding_window", {"sliding_window": 0}),
        ("sliding_window", {"sliding_window": -3}),
        ("sliding_window", {"sliding_window": 5, "window": 5}),
        ("cap", {"cap": 0.0}),
        ("cap", {"cap": -1.0}),
        ("cap", {"cap": float("nan")}),
        ("cap", {"cap": float("inf")}),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(name: str, options: dict[str, Any]) -> None:
    args: dict[str, Any] = batch_arguments([make_case(24, 8)])
    with pytest.raises(ValueError, match=f"^{name}:"):
        tree_attention(**args, **options)


@pytest.mark.parametrize(("window", "cap"), [(-1, 0.0), (0, -1.0), (0, float("nan"))])
def test_what_the_extension_is_given_is_checked_there_too(window: int, cap: float) -> None:
    args: dict[str, Any] = batch_arguments([make_case(24, 8)])
    with pytest.raises(ValueError, match="^(sliding_window|cap):"):
        _C.tree_attention(*args.values(), *[None] * 4, 0, 0, 0, 0, None, window, cap)


@pytest.mark.parametrize(
    ("name", "value"), [("kv_len", 2**31 - 1), ("kv_len", -7), ("first_node", 2**31 - 1)]
)
def test_counts_that_cannot_be_touch_no_other_memory(
    backend: Backend, name: str, value: int
) -> None:
    """The shim's memory is guarded; the next launch must come out as before."""
    args: dict[str, Any] = batch_arguments([sliding(backend, 300, 70, 40)], backend)
    args["workspace"] = None
    expected = tree_attention(**args, sliding_window=40).clone()
    wrong = dict(args, out=torch.empty_like(expected))
    wrong[name] = torch.full_like(args[name], value)
    tree_attention(**wrong, sliding_window=40)
    assert torch.equal(tree_attention(**args, sliding_window=40), expected)
