"""``linear``: right to rounding, and each row's bits its own."""

from __future__ import annotations

import pytest
import torch

from specrt import _C, ops
from tests.ops.conftest import Backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore_settings():  # type: ignore[no-untyped-def]
    isa, threads = _C.active_isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (3, 16), (7, 40), (64, 256), (301, 704)])
def test_as_exact_as_torch(dtype: torch.dtype, outputs: int, depth: int) -> None:
    weight = random(outputs, depth, seed=1).to(dtype)
    bias = random(outputs, seed=2)
    for rows in (1, 2, 5, 6, 7, 13, 130):
        x, residual = random(rows, depth, seed=rows), random(rows, outputs, seed=3)
        exact = x.double() @ weight.double().T + bias.double() + residual.double()
        usual = x @ weight.float().T + bias + residual
        out = torch.full((rows, outputs), float("nan"))
        ops.linear(x, weight, bias, residual, out=out)
        floor = 1e-6 * depth**0.5
        assert (out - exact).abs().max() <= 2 * (usual - exact).abs().max() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "depth"), [(5, 33), (130, 256), (48, 72), (32, 1040)])
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, outputs: int, depth: int) -> None:
    weight, x = random(outputs, depth, seed=1).to(dtype), random(128, depth)
    bias, residual = random(outputs, seed=2), random(128, outputs, seed=3)
    alone = torch.cat(
        [ops.linear(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(128)]
    )
    for isa in _C.build_info()["cpu_isas"]:
        _C.set_isa(isa)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 31, 64, 127, 128):
                many = ops.linear(x[:rows], weight, bias, residual[:rows])
                assert torch.equal(many, alone[:rows]), (isa, rows)


def test_every_row_count() -> None:
    weight, x = random(34, 64, seed=1), random(128, 64)
    whole = ops.linear(x, weight)
    for rows in range(1, 129):
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows])
        assert torch.equal(ops.linear(x[128 - rows :], weight), whole[128 - rows :])


def test_a_bad_row_stays_alone() -> None:
    weight, x = random(40, 64, seed=1), random(9, 64)
    healthy = ops.linear(x, weight)
    x[4] = float("nan")
    out = ops.linear(x, weight)
    assert out[4].isnan().all()
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[keep], healthy[keep])


def test_strided_rows_and_output_in_place() -> None:
    weight, wide = random(24, 32, seed=1), random(10, 48)
    x = wide[:, 8:40]
    residual = random(10, 24, seed=2)
    expected = ops.linear(x.contiguous(), weight, residual=residual)
    ops.linear(x, weight, residual=residual, out=residual)
    assert torch.equal(residual, expected)


def test_results_are_not_written_over_rows() -> None:
    """Beside them they may be, where rows are columns of one tensor."""
    weight, wide = random(16, 16, seed=1), random(9, 40)
    expected = ops.linear(wide[:, 24:].clone(), weight)
    for x, out in (
        (wide[:, :16], wide[:, :16]),
        (wide[:, 8:24], wide[:, 20:36]),
        (wide[:4, 24:], wide[3:7, 24:]),
        (wide.view(-1)[:144].view(9, 16), wide[:, 24:]),
    ):
        with pytest.raises(ValueError, match="x: expected memory that is not out's"):
            ops.linear(x, weight, out=out)
    assert torch.equal(ops.linear(wide[:, 24:], weight, out=wide[:, 8:24]), expected)
    assert torch.equal(ops.linear(wide[:4, 24:], weight, out=wide[5:, 24:]), expected[:4])


def test_a_residual_is_the_output_or_lies_apart(backend: Backend) -> None:
    """A row that is read where another is written would be old or new by chance."""
    dtype = torch.bfloat16 if backend.runs_cuda_source else torch.float32
    x, weight = random(9, 16).to(backend.device, dtype), random(16, 16).to(backend.device, dtype)
    wide = torch.zeros(9, 48, dtype=dtype, device=backend.device)
    names = ("residual", "gate") if backend.runs_cuda_source else ("residual",)
    for name in names:
        for read, out in (
            (wide[:, :16], wide[:, 8:24]),
            (wide.view(-1)[:144].view(9, 16), wide[:, :16]),
            (wide[:, :16], wide.view(-1)[48:192].view(9, 16)),
        ):
            with pytest.raises(ValueError, match=f"^{name}: expected memory that is not out's"):
                ops.linear(x, weight, out=out, **{name: read})
        for out in (wide[:, :16], wide[:, 16:32]):
            ops.linear(x, weight, out=out, **{name: wide[:, :16]})


def test_nothing_to_do() -> None:
    assert ops.linear(torch.empty(0, 16), random(3, 16)).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 15)}, r"x: expected \[M, K\] = \[\*, 16\] float32, got \[2, 15\]"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x: expected .* float64"),
        ({"x": torch.zeros(16, 2).T}, "x: the last dimension must be contiguous"),
        ({"weight": torch.zeros(4, 16, dtype=torch.int32)}, "weight: expected float32, bfloat16"),
        ({"weight": torch.zeros(16, 4).T}, "weight: "),
        ({"bias": torch.zeros(5)}, r"bias: expected \[N\] = \[4\]"),
        ({"residual": torch.zeros(3, 4)}, r"residual: expected \[M, N\] = \[2, 4\]"),
        ({"out": torch.zeros(2, 5)}, r"out: expected \[M, N\] = \[2, 4\]"),
        ({"weight": torch.zeros(4, 16, device="meta")}, "weight: expected a CPU or CUDA tensor"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 16), "weight": torch.zeros(4, 16), **change}
    with pytest.raises(ValueError, match=message):
        ops.linear(**arguments)  # type: ignore[arg-type]


class Duck:
    """What is asked of a tensor that offers no C exchange (torch before 2.10)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.data_ptr, self.stride = tensor.data_ptr, tensor.stride
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.is_cuda = tensor.is_cuda


def test_tensors_by_duck_type() -> None:
    x, weight, bias = random(3, 16), random(5, 16, seed=1).bfloat16(), random(5, seed=2)
    for argument in (Duck(weight), torch.nn.Parameter(weight, requires_grad=False)):
        out = torch.empty(3, 5)
        ops.linear(Duck(x), argument, Duck(bias), out=out)  # type: ignore[arg-type]
        assert torch.equal(out, ops.linear(x, weight, bias))
    with pytest.raises(ValueError, match=r"bias: expected \[N\] = \[5\]"):
        ops.linear(x, weight, Duck(bias[:4]), out=torch.empty(3, 5))  # type: ignore[arg-type]


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        ops.linear(torch.zeros(1, 1), [[1.0]], out=torch.zeros(1, 1))  # type: ignore[arg-type]


def test_under_torch_compile() -> None:
    weight, x, bias = random(12, 16, seed=1), random(3, 16), random(12, seed=2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, weight, bias) * 2

    assert torch.equal(step(x), ops.linear(x, weight, bias) * 2)
