"""``tree_attention``: a row's bits are its own also as tensor cores add, where rounding shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specrt import ops
from tests.ops.conftest import Backend
from tests.ops.test_tree_attention import DTYPES, Case, alone, make_case, queries, run, simt
from tests.oracles.paged import lineage


def cancelling(case: Case) -> Case:
    """Equal weights; in every other 16 keys large values that cancel: what they take from a sum of
    small ones shows in its first bits, while rounding to 16 bits hides nearly all of the last."""
    depths = [len(lineage(case.parents, node)) - 1 for node in range(len(case.parents))]
    position = torch.tensor([*range(case.prefix), *(case.prefix + depth for depth in depths)])
    sign = torch.tensor([1, 0, -1, 0])[position % 4] * (position // 16 % 2)
    sign = sign[:, None, None].to(case.v.dtype)
    v = torch.where(sign != 0, 2.0**10 * sign * case.v[0], 2.0**-9 * case.v)
    return replace(case, k=case.k[:1].expand_as(case.k).clone(), v=v)


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_bits_of_a_sum_are_those_of_decoding_alone(
    backend: Backend, dtype: torch.dtype
) -> None:
    case = queries(cancelling(make_case(255, 41, dtype=dtype)), backend, dtype)
    out = run(case, backend=backend)
    for node in range(0, 41, 5):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.tensor_cores("sm_80", "sm_90")
def test_the_last_bits_depend_neither_on_the_plan_nor_on_the_gpu(backend: Backend) -> None:
    if backend.name != "simt":
        pytest.skip("a GPU cannot be changed")
    dtype = torch.bfloat16
    case = queries(cancelling(make_case(1100, 9, dtype=dtype)), backend, dtype)
    expected = run(case, backend=backend)
    for num_sms, plan in ((1, (8, 1)), (5, (0, 0)), (12, (4, 3))):
        simt().set_device(num_sms)  # type: ignore[attr-defined]
        assert torch.equal(run(case, backend=backend, plan=ops.AttentionPlan(*plan)), expected)


@pytest.mark.tensor_cores("sm_80", "sm_90")
def test_places_without_a_key_are_the_same_everywhere(backend: Backend) -> None:
    """They count as zeros times some value, and a tensor core may see the size of that value."""
    dtype = torch.bfloat16
    case = make_case(14, 6, dtype=dtype, chain=True)
    root = 14  # of no weight, since its key is opposed to all queries; a huge value
    case = replace(case, q=case.q.abs() + 1, k=case.k.abs(), v=2.0**-20 * case.v)
    case.k[root], case.v[root] = -100, 2.0**120
    case = queries(case, backend, dtype)
    out = run(case, backend=backend)
    for node in range(1, 6):
        assert torch.equal(out[node], alone(case, node, backend)), node
