"""``linear`` by weights of one byte: the sums of wider ones, to the bit, times a row's scale."""

from __future__ import annotations

import pytest
import torch

from specrt import _C, ops
from specrt.device import Device
from specrt.models.float8 import float8_matrix, in_order, in_turn
from tests.ops.conftest import Backend, load_simt
from tests.ops.test_linear_bits import spread
from tests.oracles import linear as oracle

COUNTS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 129)
SHAPES = [(33, 48), (72, 80), (8, 1040)]
"""N and K: ragged ends, K in one and in two slices."""
Tensor = torch.Tensor


def dtypes_of(backend: Backend) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] if backend.runs_cuda_source else [torch.float32]


def random_bytes(shape: tuple[int, int], backend: Backend, seed: int = 1) -> Tensor:
    """Every code but those of NaN."""
    codes = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(seed))
    codes += codes >= 127
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).to(backend.device)


def matrix_of(values: Tensor, backend: Backend, seed: int = 2) -> ops.Float8Matrix:
    scale = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) / 64
    turned = in_turn(values) if backend.runs_cuda_source else values
    return ops.Float8Matrix(turned, scale.to(backend.device))


def run(x: Tensor, weight: ops.Matrix, **rest: object) -> Tensor:
    out = torch.full((len(x), len(weight)), torch.nan, device=x.device)
    size = ops.linear_workspace(*weight.shape, len(x))
    workspace = torch.full((size,), torch.nan, device=x.device)
    workspace[:512] = 0
    ops.linear(x, weight, out=out, workspace=workspace, **rest)  # type: ignore[arg-type]
    assert not workspace[:512].view(torch.int32).any(), "tickets"
    return out


def test_every_code(backend: Backend) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).to(backend.device)
    values = codes.view(torch.float8_e4m3fn)
    expected = values.float().nan_to_num(nan=480.0)
    expected[15, 15] *= -1
    one = torch.ones(16, device=backend.device)
    turned = in_turn(values) if backend.runs_cuda_source else values
    for dtype in dtypes_of(backend):
        x = torch.eye(16, dtype=dtype, device=backend.device)
        assert torch.equal(run(x, ops.Float8Matrix(turned, one)), expected.T)


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_wider_weights(backend: Backend, shape: tuple[int, int]) -> None:
    values = random_bytes(shape, backend)
    matrix, bias = matrix_of(values, backend), torch.randn(shape[0]).to(backend.device)
    for dtype in dtypes_of(backend):
        x, residual = spread(9, shape[1], dtype, backend), spread(9, shape[0], dtype, backend)
        expected = run(x, values.to(dtype)) * matrix.scale
        assert torch.equal(run(x, matrix), expected)
        expected = expected + bias + residual.float()
        assert torch.equal(run(x, matrix, bias=bias, residual=residual), expected)
        assert torch.equal(ops.linear(x, matrix, bias, residual), expected.to(dtype))


def test_the_order_of_sums(backend: Backend) -> None:
    if backend.name != "simt":
        pytest.skip("a GPU's arithmetic is not ours")
    for shape in SHAPES:
        values = random_bytes(shape, backend)
        matrix, x = matrix_of(values, backend), spread(3, shape[1], torch.bfloat16, backend)
        expected = oracle.linear(x, values.bfloat16(), scale=matrix.scale)
        assert torch.equal(run(x, matrix), expected)


@pytest.mark.parametrize("shape", [(24, 80), (32, 80), (8, 1040)], ids=str)
def test_bits_depend_on_the_row_alone(backend: Backend, shape: tuple[int, int]) -> None:
    matrix = matrix_of(random_bytes(shape, backend), backend)
    dtype = dtypes_of(backend)[0]
    x = spread(129, shape[1], dtype, backend)
    whole = run(x, matrix)
    for rows in COUNTS:
        assert torch.equal(run(x[:rows], matrix), whole[:rows]), rows
    assert torch.equal(run(x[70:79], matrix), whole[70:79])


def test_every_plan_gives_the_same_bits(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("the CPU needs none")
    matrix = matrix_of(random_bytes((136, 1040), backend), backend)
    x = spread(20, 1040, torch.bfloat16, backend)
    expected = run(x, matrix)
    for stages in range(2, 9):
        assert torch.equal(run(x, matrix, plan=ops.LinearPlan(0, stages)), expected), stages
    with pytest.raises(ValueError, match="plan: expected tile_rows of 128 with float8_e4m3fn"):
        run(x, matrix, plan=ops.LinearPlan(64, 2))


def test_nothing_is_read_past_the_ends(backend: Backend) -> None:
    """Under an even seed a tensor ends where reading is an error."""
    if backend.name != "simt":
        pytest.skip("of the shim's memory")
    for shape in ((33, 48), (8, 1040)):
        matrix, x = (
            matrix_of(random_bytes(shape, backend), backend),
            spread(9, shape[1], torch.half, backend),
        )
        expected = run(x, matrix)
        load_simt().set_schedule(2)
        assert torch.equal(run(x, matrix), expected)


def test_gate_and_up(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("activate follows there")
    values = random_bytes((144, 80), backend)
    matrix = matrix_of(values, backend)
    x = torch.randn(20, 80).to(backend.device, torch.bfloat16) / 64
    exact = oracle.gated(run(x, matrix).double())
    assert torch.allclose(ops.linear(x, matrix, is_gated=True).double(), exact, rtol=1e-2)


def test_keys_of_logits(backend: Backend) -> None:
    """Those of the same logits by the kernel for wider weights."""
    if not backend.runs_cuda_source:
        pytest.skip("the CPU makes none")
    values = random_bytes((130, 80), backend)
    one = torch.ones(130, device=backend.device)
    x, keys = spread(4, 80, torch.bfloat16, backend), []
    for weight in (values.bfloat16(), ops.Float8Matrix(in_turn(values), one)):
        zeros = torch.zeros(4, 3, dtype=torch.int64, device=backend.device)
        maxima = ops.TileMaxima(
            zeros.clone(),
            torch.zeros(2, 8, dtype=torch.int64, device=backend.device),
            torch.zeros(2, dtype=torch.int32, device=backend.device),
            torch.zeros(2, 2, dtype=torch.int32, device=backend.device),
        )
        run(x, weight, maxima=maxima)
        keys.append(maxima.keys)
    assert keys[0].all() and torch.equal(*keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(5)}, r"scale: expected \[N\] = \[4\] float32, got \[5\] float32"),
        (
            {"scale": torch.ones(4).half()},
            r"scale: expected \[N\] = \[4\] float32, got \[4\] float16",
        ),
        ({"scale": None}, r"scale: expected \[N\] = \[4\] float32, as weight is float8_e4m3fn"),
        ({"values": torch.zeros(4, 16)}, "scale: expected None, as weight is float32"),
        ({"values": torch.zeros(16, 4).to(torch.float8_e4m3fn).T}, "weight: "),
        ({"values": torch.zeros(4, 16).to(torch.float8_e5m2)}, "weight: unsupported dtype .*e5m2"),
    ],
)
def test_wrong_arguments_are_named(
    backend: Backend, change: dict[str, Tensor | None], message: str
) -> None:
    given = {"values": torch.zeros(4, 16).to(torch.float8_e4m3fn), "scale": torch.ones(4), **change}
    there = {name: None if t is None else t.to(backend.device) for name, t in given.items()}
    x = torch.zeros(2, 16, dtype=dtypes_of(backend)[0], device=backend.device)
    with pytest.raises(ValueError, match=message):
        run(x, ops.Float8Matrix(**there))  # type: ignore[arg-type]


def test_columns_that_a_gpu_does_not_take(backend: Backend) -> None:
    matrix = matrix_of(random_bytes((4, 32), backend), backend)
    values = matrix.values[:, :24].contiguous()
    x = torch.zeros(2, 24, dtype=dtypes_of(backend)[0], device=backend.device)
    if backend.runs_cuda_source:
        with pytest.raises(ValueError, match="weight: expected K to be a multiple of 16 on a GPU"):
            run(x, ops.Float8Matrix(values, matrix.scale))
    else:
        assert not run(x, ops.Float8Matrix(values, matrix.scale)).any()


# --- on the CPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [5, 33, 256])
def test_every_instruction_set(depth: int) -> None:
    usual, cpu = _C.active_isa(), Backend("cpu", torch.device("cpu"))
    values = random_bytes((7, depth), cpu)
    matrix, x = matrix_of(values, cpu), spread(13, depth, torch.float32, cpu)
    expected = ops.linear(x, values.float()) * matrix.scale
    try:
        for isa in _C.build_info()["cpu_isas"]:
            _C.set_isa(isa)
            for rows in (1, 2, 4, 7, 13):
                assert torch.equal(ops.linear(x[:rows], matrix), expected[:rows]), (isa, rows)
    finally:
        _C.set_isa(usual)


# --- how matrices are rounded ---------------------------------------------------------------------


def test_rounded_to_nearest_by_rows() -> None:
    matrix = torch.randn(3000, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
    matrix[7] = 0
    matrix[8] *= 1e-38
    matrix[9] *= 2.0**100
    narrow = float8_matrix(matrix, Device())
    largest = narrow.values.float().abs().amax(1)
    assert (
        (largest == 448)
        .logical_or(torch.arange(3000) == 7)
        .logical_or(torch.arange(3000) == 8)
        .all()
    )
    wide = narrow.values.float() * narrow.scale[:, None]
    ulp = torch.maximum(
        narrow.values.float().abs().log2().floor().exp2() / 8, torch.tensor(2.0**-9)
    )
    assert ((wide - matrix.float()).abs() <= ulp / 2 * narrow.scale[:, None] * 1.001).all()
    assert not wide[7].any() and wide.isfinite().all()


def test_rows_that_are_not_finite_stay_so() -> None:
    matrix = torch.randn(4, 16)
    matrix[1, 3], matrix[2, 5] = torch.nan, torch.inf
    result = ops.linear(torch.ones(1, 16), float8_matrix(matrix, Device()))
    assert result.isnan().tolist() == [[False, True, True, False]]


def test_turns_and_order() -> None:
    values = torch.arange(64).view(2, 32)
    assert in_turn(values)[0, :6].tolist() == [0, 8, 1, 9, 2, 10]
    assert torch.equal(in_order(in_turn(values)), values)
    gpu = Device(is_gpu=True)
    assert torch.equal(
        float8_matrix(values, gpu).values.view(torch.uint8),
        in_turn(float8_matrix(values, Device()).values.view(torch.uint8)),
    )
    with pytest.raises(ValueError, match=r"float8: expected matrices of a multiple of 16 columns"):
        float8_matrix(torch.ones(3, 24), gpu)
