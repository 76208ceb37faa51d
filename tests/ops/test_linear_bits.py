"""``linear`` on a GPU: the order of its sums is the weights' shape's, and nobody else's."""

from __future__ import annotations

import pytest
import torch

from specrt import ops
from tests.ops.conftest import Backend, load_simt
from tests.oracles import linear as oracle

DTYPES = [torch.bfloat16, torch.float16]
COUNTS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129)
"""Of rows: around every size that rows are padded to, and with more than one piece."""
PLANS = [ops.LinearPlan(128 if stages % 2 else 64, stages) for stages in range(2, 9)]
"""Every number of stages: each waits for its own."""
NAN = float("nan")
Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def on_a_gpu(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the CUDA source")


def spread(rows: int, depth: int, dtype: torch.dtype, backend: Backend, seed: int = 0) -> Tensor:
    """Values of very different sizes, of which one in two cancels its neighbour but one: a sum's
    first bits show how it was made."""
    generator = torch.Generator().manual_seed(seed)
    sizes, signs = (torch.randn(rows, depth, generator=generator) for _ in range(2))
    values = (2 * sizes).exp2() * signs
    position = torch.arange(depth)
    is_second = (position % 4 == 2) & (position // 16 % 2 == 1)
    values = torch.where(is_second, -values.roll(2, 1), values)
    return values.to(backend.device, dtype)


def made(
    shape: tuple[int, int], rows: int, backend: Backend, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """x and weights; in every other 16 columns weights are by twos the same, so products cancel."""
    x = spread(rows, shape[1], dtype, backend)
    weight = spread(*shape, dtype, backend, seed=1).abs()
    position = torch.arange(shape[1], device=backend.device)
    is_second = (position % 4 == 2) & (position // 16 % 2 == 1)
    return x, torch.where(is_second, weight.roll(2, 1), weight).contiguous()


def run(x: Tensor, weight: Tensor, **rest: object) -> Tensor:
    """Float32, so that no rounding hides a bit; a workspace that shows what it was left as."""
    out = torch.full((len(x), len(weight)), NAN, device=x.device)
    size = ops.linear_workspace(len(weight), x.shape[1], len(x))
    workspace = torch.full((size,), NAN, device=x.device)
    workspace[:512] = 0
    ops.linear(x, weight, out=out, workspace=workspace, **rest)  # type: ignore[arg-type]
    assert not workspace[:512].view(torch.int32).any(), "tickets"
    assert not out.isnan().any()
    return out


@pytest.fixture
def simt(backend: Backend) -> object:
    if backend.name != "simt":
        pytest.skip("a GPU cannot be changed, nor is its arithmetic ours")
    return load_simt()


# One to sixteen slices, of which one is none; rows of weights and K with ragged ends.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(33, 40), (72, 72), (8, 1032), (24, 2048), (8, 4104), (16, 8200)], ids=str
)
def test_the_order_of_sums(
    backend: Backend, simt: object, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight = made(shape, 3, backend, dtype)
    bias, residual = torch.randn(shape[0]), torch.randn(3, shape[0]).to(dtype)
    assert torch.equal(run(x, weight), oracle.linear(x, weight))
    expected = oracle.linear(x, weight, bias, residual)
    assert torch.equal(run(x, weight, bias=bias, residual=residual), expected)
    assert torch.equal(ops.linear(x, weight, bias, residual), expected.to(dtype))


def test_slices_follow_from_the_shape_alone(simt: object) -> None:
    """Told by the workspace: tickets, and a float of each result and slice."""
    counts = {(6144, 4096): 4, (4096, 14336): 4, (28672, 4096): 1, (2560, 8192): 8, (64, 65536): 16}
    for shape, count in counts.items():
        assert oracle.slices_of(*shape)[0] == count
        for rows, padded in ((1, 16), (60, 64), (65, 128), (129, 256), (5000, 256)):
            results = shape[0] + shape[0] % 128
            floats = 512 + results * padded * count if count > 1 else 0
            assert ops.linear_workspace(*shape, rows) == floats, (shape, rows)
    assert ops.linear_workspace(4096, 4096, 0) == 0


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize(
    ("shape", "counts"), [((72, 104), COUNTS), ((8, 1032), (70, 1, 8, 9, 33, 65))], ids=str
)
def test_bits_do_not_depend_on_the_number_of_rows(
    backend: Backend, shape: tuple[int, int], counts: tuple[int, ...]
) -> None:
    x, weight = made(shape, max(counts), backend)
    whole = run(x, weight)
    for rows in counts:
        assert torch.equal(run(x[:rows], weight), whole[:rows]), rows
    for first in (1, 44, 61):
        assert torch.equal(run(x[first : first + 9], weight), whole[first : first + 9]), first


def test_every_number_of_rows(backend: Backend) -> None:
    x, weight = made((16, 40), 128, backend)
    whole = run(x, weight)
    for rows in range(1, 129):
        assert torch.equal(run(x[:rows], weight), whole[:rows])
        assert torch.equal(run(x[-rows:], weight), whole[-rows:])


@pytest.mark.tensor_cores("sm_80", "sm_90")
def test_every_plan_gives_the_same_bits(backend: Backend) -> None:
    x, weight = made((72, 1032), 9, backend)
    expected = run(x, weight)
    for plan in PLANS:
        assert torch.equal(run(x, weight, plan=plan), expected), plan


@pytest.mark.parametrize("shape", [(33, 40), (72, 1032)], ids=str)
def test_nothing_is_read_past_the_ends(
    backend: Backend, simt: object, shape: tuple[int, int]
) -> None:
    """Under an even seed a tensor ends where reading is an error."""
    x, weight = made(shape, 9, backend)
    bias, residual = torch.randn(shape[0]), spread(9, shape[0], x.dtype, backend, seed=3)
    expected = run(x, weight, bias=bias, residual=residual)
    simt.set_schedule(2)  # type: ignore[attr-defined]
    for plan in (ops.LinearPlan(64, 2), ops.LinearPlan(128, 8)):
        assert torch.equal(run(x, weight, bias=bias, residual=residual, plan=plan), expected)


@pytest.mark.parametrize("rows", [5, 20, 60, 100, 129])
def test_every_plan_for_more_rows(backend: Backend, rows: int) -> None:
    for shape in ((136, 200), (8, 1032)) if rows < 100 else ((136, 200),):
        x, weight = made(shape, rows, backend)
        expected = run(x, weight)
        for plan in PLANS:
            assert torch.equal(run(x, weight, plan=plan), expected), plan


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 3, 5])
def test_bits_under_every_schedule(backend: Backend, simt: object, seed: int) -> None:
    for shape, rows in (((136, 264), 9), ((72, 1032), 20), ((8, 2056), 65)):
        x, weight = made(shape, rows, backend)
        expected = run(x, weight)
        simt.set_schedule(seed)  # type: ignore[attr-defined]
        for plan in (ops.LinearPlan(64, 2), ops.LinearPlan(128, 3)):
            assert torch.equal(run(x, weight, plan=plan), expected), plan


def test_bits_do_not_depend_on_the_gpu(backend: Backend, simt: object) -> None:
    x, weight = made((72, 1032), 20, backend)
    expected = run(x, weight)
    for num_sms, shared in ((1, 232448), (132, 232448), (8, 101376), (64, 49152)):
        simt.set_device(num_sms, shared)  # type: ignore[attr-defined]
        assert torch.equal(run(x, weight), expected)


@pytest.mark.parametrize("shape", [(33, 40), (24, 1032)], ids=str)
def test_a_bad_row_stays_alone(backend: Backend, shape: tuple[int, int]) -> None:
    x, weight = made(shape, 11, backend)
    healthy = run(x, weight)
    x[4] = NAN
    out = torch.empty_like(healthy)
    ops.linear(x, weight, out=out)
    assert out[4].isnan().all()
    keep = [row for row in range(11) if row != 4]
    assert torch.equal(out[keep], healthy[keep])


def test_rows_of_wider_tensors(backend: Backend) -> None:
    """What lies beside and behind the rows is neither seen nor touched."""
    for num_outputs in (33, 40):
        x, weight = made((num_outputs, 72), 9, backend)
        expected = run(x, weight)
        wide = torch.full((12, 104), NAN, dtype=x.dtype, device=x.device)
        wide[1:10, 16:88] = x
        for dtype, width in ((torch.float32, 50), (x.dtype, 56)):
            for left, beside in ((8, 0), (1, 0), (8, 1)):  # where rows of out and residual begin
                outs = torch.full((11, width), NAN, dtype=dtype, device=x.device)
                residuals = torch.zeros(9, width, dtype=x.dtype, device=x.device)
                out = outs[1:10, left : left + num_outputs]
                residual = residuals[:, beside : beside + num_outputs]
                ops.linear(wide[1:10, 16:88], weight, None, residual, out)
                assert torch.equal(out, expected.to(dtype))
                assert outs.isnan().sum() == outs.numel() - out.numel()


def test_residual_in_place(backend: Backend) -> None:
    for shape in ((40, 72), (24, 1032)):
        x, weight = made(shape, 9, backend)
        residual = spread(9, shape[0], x.dtype, backend, seed=3)
        expected = ops.linear(x, weight, None, residual)
        ops.linear(x, weight, None, residual, residual)
        assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(144, 72), (32, 1032)], ids=str)
def test_gate_and_up(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(backend.device)
        for size in ((70, shape[1]), shape, shape[:1])
    )
    x, weight = x.to(dtype), (weight / 4).to(dtype)
    both = run(x, weight, bias=bias)
    exact = oracle.gated(both.double())
    whole = torch.empty(70, shape[0] // 2, device=x.device)
    ops.linear(x, weight, bias, out=whole, is_gated=True)
    assert torch.allclose(whole.double(), exact, rtol=1e-6, atol=1e-6)
    rounded = ops.linear(x, weight, bias, is_gated=True)
    assert torch.equal(rounded, whole.to(dtype))
    for rows in (1, 9, 64):
        assert torch.equal(ops.linear(x[:rows], weight, bias, is_gated=True), rounded[:rows])


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_torch(backend: Backend, dtype: torch.dtype) -> None:
    for shape in ((72, 264), (40, 1032)):
        generator = torch.Generator().manual_seed(6)
        x, weight = (
            torch.randn(*size, generator=generator).to(backend.device, dtype)
            for size in ((17, shape[1]), shape)
        )
        exact, usual = x.double() @ weight.double().T, x @ weight.T
        assert (ops.linear(x, weight) - exact).abs().max() <= 2 * (usual - exact).abs().max()
        # Each group of 16 is truncated once, as a tensor core does.
        bound = 2.0**-22 * exact.abs().max() * shape[1] / 16
        assert (run(x, weight) - exact).abs().max() <= bound


def test_many_rows_share_a_bounded_workspace(backend: Backend, simt: object) -> None:
    for shape, launches in (((8, 1032), 2), ((8, 72), 1)):
        x, weight = made(shape, 257, backend)
        residual = spread(257, shape[0], x.dtype, backend, seed=3)
        before = simt.num_launches()  # type: ignore[attr-defined]
        whole = run(x, weight, residual=residual)
        assert simt.num_launches() - before == launches  # type: ignore[attr-defined]
        assert torch.equal(run(x[256:], weight, residual=residual[256:]), whole[256:])


def test_nothing_to_do(backend: Backend) -> None:
    x, weight = made((16, 1032), 3, backend)
    assert ops.linear(x[:0], weight).shape == (0, 16)
    assert ops.linear(x, weight[:0]).shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 16)}, "x: expected bfloat16 or float16 on a GPU, got"),
        ({"x": torch.zeros(2, 24).half()}, r"x: expected \[M, K\] = \[\*, 16\] float16"),
        ({"x": torch.zeros(9, 20).half()[:, :16]}, "x: expected rows at multiples of 16 bytes"),
        ({"x": torch.zeros(99).half()[1:33].view(2, 16)}, "x: expected to start at a multiple"),
        ({"weight": torch.zeros(4, 16).bfloat16()}, "weight: expected float16 like x"),
        ({"weight": torch.zeros(4, 12).half()}, "weight: expected K to be a multiple of 8"),
        ({"weight": torch.zeros(16, 4).half().T}, "weight: "),
        ({"bias": torch.zeros(5)}, r"bias: expected \[N\] = \[4\]"),
        ({"residual": torch.zeros(2, 4)}, r"residual: expected \[M, N\] = \[2, 4\] float16"),
        ({"out": torch.zeros(2, 4).bfloat16()}, r"out: expected \[M, N\] = \[2, 4\] float16"),
        ({"is_gated": True}, "weight: expected a multiple of 16 rows"),
        ({"plan": ops.LinearPlan(32, 4)}, "plan: expected tile_rows of 64 or 128"),
        ({"plan": ops.LinearPlan(64, 9)}, "plan: expected .* num_stages from 2 to 8"),
    ],
)
def test_wrong_arguments_are_named(
    backend: Backend, change: dict[str, object], message: str
) -> None:
    given: dict[str, object] = {
        "x": torch.zeros(2, 16).half(),
        "weight": torch.zeros(4, 16).half(),
        **change,
    }
    there = {
        name: backend.hold(value) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    with pytest.raises(ValueError, match=message):
        ops.linear(**there)  # type: ignore[arg-type]


def test_a_workspace_that_does_not_do(backend: Backend) -> None:
    x, weight = made((8, 1032), 2, backend)
    for short in (torch.zeros(2559), torch.zeros(2560, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"workspace: expected "):
            ops.linear(x, weight, workspace=short.to(backend.device))
    residual = torch.zeros(2, 16, dtype=x.dtype, device=x.device)
    gate_up = torch.zeros(16, 1032, dtype=x.dtype, device=x.device)
    out = torch.empty(2, 8, dtype=x.dtype, device=x.device)
    with pytest.raises(ValueError, match="residual: expected None with is_gated"):
        ops.linear(x, gate_up, None, residual, out, is_gated=True)
