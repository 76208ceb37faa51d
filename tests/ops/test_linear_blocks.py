"""Matrices in blocks: products against integers, rows against gguf's own dequantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from specrt import _C, ops
from specrt.ops.matrix import MatrixKind, PackedMatrix
from specrt.ops.matrix_pack import matrix_pack
from tests.ops.garbage import guarded

gguf = pytest.importorskip("gguf")

Array = np.ndarray
BLOCK = {
    MatrixKind.Q8_0: (32, 34),
    MatrixKind.Q4_0: (32, 18),
    MatrixKind.Q4_1: (32, 20),
    MatrixKind.Q4_K: (256, 144),
    MatrixKind.Q6_K: (256, 210),
}
HALVES = {
    MatrixKind.Q8_0: [0],
    MatrixKind.Q4_0: [0],
    MatrixKind.Q4_1: [0, 2],
    MatrixKind.Q4_K: [0, 2],
    MatrixKind.Q6_K: [208],
}
"""Where float16 scales lie in a block."""
KINDS = [MatrixKind.INT8, *BLOCK]
ISAS = _C.build_info()["cpu_isas"]


ROW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 63, 64, 65, 130]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    active, threads = _C.active_isa(), torch.get_num_threads()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(active)
    torch.set_num_threads(threads)


def file_rows(kind: MatrixKind, rows: int, width: int, seed: int, most: float = 2.0) -> Array:
    """Random bytes, but for scales, which are finite: of both signs, denormal ones among them."""
    depth, size = BLOCK[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, width // depth, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = rng.uniform(-most, most, blocks.shape[:2]).astype(np.float16)
        halves[rng.random(halves.shape) < 0.2] *= np.float16(1e-6)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantised(kind: MatrixKind, source: Array) -> Array:
    return gguf.quants.dequantize(source, gguf.GGMLQuantizationType[kind.name])


def packed(kind: MatrixKind, source: Array | torch.Tensor, width: int) -> PackedMatrix:
    matrix = PackedMatrix.empty(kind, len(source), width)
    assert matrix_pack(torch.as_tensor(source), matrix)
    return matrix


def dense(matrix: PackedMatrix) -> torch.Tensor:
    tokens = torch.arange(len(matrix), dtype=torch.int32)
    return ops.embed(tokens, matrix, torch.empty(matrix.shape))


def bits(x: Array | torch.Tensor) -> Array:
    return np.ascontiguousarray(np.asarray(x, dtype=np.float32)).view(np.uint32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Of float32, rounded once: the product of two is exact in float64, and the sum is exact there
    too or is rounded to odd, so that the second rounding does no harm."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    is_even = (total.view(np.int64) & 1) == 0
    away = np.where((rest > 0) == (total > 0), 1, -1)
    odd = (total.view(np.int64) + np.where((rest != 0) & is_even, away, 0)).view(np.float64)
    return np.where(rest == 0, total, odd).astype(np.float32)


def rounded(x: Array) -> tuple[Array, Array]:
    """Rows in 16 bits, and what a step is."""
    most = np.abs(x).max(axis=1, keepdims=True)
    is_small = most < np.float32(2.0**-100)
    inverse = np.where(is_small, 0, np.float32(32512) / np.where(is_small, 1, most))
    q = np.rint(x * inverse.astype(np.float32)).astype(np.int64)
    return q, (most / np.float32(32512))[:, 0]


def int8_oracle(weights: Array, x: Array) -> Array:
    """Weights are the original floats."""
    most = np.abs(weights).max(axis=1)
    inverse = 127.0 / np.where(most > 0, most, 1).astype(np.float64)
    steps = np.rint(weights.astype(np.float64) * inverse[:, None])
    scale = (most / np.float32(127)).astype(np.float64)
    q, step = rounded(x)
    dots = q @ steps.astype(np.int64).T
    factor = step.astype(np.float64)[:, None] * scale[None]
    return (dots.astype(np.float64) * factor).astype(np.float32)


def parts(kind: MatrixKind, source: Array) -> tuple[Array, Array, Array | None]:
    """Integers ``[N, K]``, a scale and what is added of each group ``[N, groups]``."""
    depth, size = BLOCK[kind]
    blocks = source.reshape(len(source), -1, size)
    group = 16 if kind is MatrixKind.Q6_K else 32

    def with_scales(*values: float) -> Array:
        # Dequantised with other float16 in the file's places, the rest is told.
        other = blocks.copy()
        for at, value in zip(HALVES[kind], values, strict=True):
            other[..., at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        return dequantised(kind, other.reshape(source.shape)).reshape(len(source), -1, group)

    halves = [
        np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]
        for at in HALVES[kind]
    ]
    per_block = depth // group
    d = np.repeat(halves[0].astype(np.float32), per_block, axis=1)
    if kind in (MatrixKind.Q8_0, MatrixKind.Q4_0):
        return with_scales(1.0), d, None
    if kind is MatrixKind.Q4_1:
        return with_scales(1.0, 0.0), d, halves[1].astype(np.float32)
    if kind is MatrixKind.Q4_K:
        sc, m = gguf.quants.Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
        quants = (
            blocks[..., 16:].reshape(len(source), -1, 4, 1, 32)
            >> np.array([0, 4], np.uint8)[:, None]
        )
        dmin = np.repeat(halves[1].astype(np.float32), per_block, axis=1)
        sc, m = (t.reshape(len(source), -1).astype(np.float32) for t in (sc, m))
        return (quants & 15).reshape(len(source), -1, 32), d * sc, -(dmin * m)
    sc = blocks[..., 192:208].view(np.int8).reshape(len(source), -1).astype(np.float32)
    other = blocks.copy()
    other[..., 192:208] = 1
    other[..., 208:210] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    quants = dequantised(kind, other.reshape(source.shape)).reshape(len(source), -1, 16)
    return quants, d * sc, None


def blocks_oracle(kind: MatrixKind, source: Array, x: Array) -> Array:
    quants, scale, offset = parts(kind, source)
    q, step = rounded(x)
    groups = q.reshape(len(x), quants.shape[1], -1)
    out = np.zeros((len(x), len(source)), np.float32)
    for g in range(quants.shape[1]):
        dots = groups[:, g] @ quants[:, g].astype(np.int64).T
        out = fma(dots.astype(np.float32), np.broadcast_to(scale[:, g], out.shape), out)
        if offset is not None:
            sums = groups[:, g].sum(axis=1).astype(np.float32)[:, None]
            out = fma(
                np.broadcast_to(sums, out.shape), np.broadcast_to(offset[:, g], out.shape), out
            )
    return out * step[:, None]


def inputs(rows: int, width: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[0, width // 3] = 40.0
    return x


def case(
    kind: MatrixKind, outputs: int, width: int, seed: int
) -> tuple[PackedMatrix, Array, Callable[[Array], Array]]:
    """A matrix, its weights as float32, and what a product by it has to give."""
    if kind is MatrixKind.INT8:
        weights = np.random.default_rng(seed).normal(size=(outputs, width)).astype(np.float32)
        matrix = packed(kind, weights, width)
        return matrix, dense(matrix).numpy(), lambda x: int8_oracle(weights, x)
    source = file_rows(kind, outputs, width, seed)
    return (
        packed(kind, source, width),
        dequantised(kind, source),
        lambda x: blocks_oracle(kind, source, x),
    )


def test_product_is_what_integers_say(isa: str) -> None:
    for kind in KINDS:
        for outputs, width in [(16, 256), (37, 768)]:
            matrix, _, oracle = case(kind, outputs, width, seed=outputs)
            x = inputs(5, width, seed=1)
            x[3] = 2.0**-101
            expected = oracle(x.numpy())
            assert (bits(ops.linear(x, matrix)) == bits(expected)).all(), (kind, outputs)
            bias, residual = inputs(1, outputs, 2)[0], inputs(5, outputs, 3)
            y = ops.linear(x, matrix, bias, residual)
            assert (bits(y) == bits((expected + bias.numpy()) + residual.numpy())).all(), kind


@pytest.mark.parametrize(
    "kind", [MatrixKind.INT8, MatrixKind.Q8_0, MatrixKind.Q4_0, MatrixKind.Q4_1]
)
def test_odd_widths(isa: str, kind: MatrixKind) -> None:
    for width in [32, 96] if kind is not MatrixKind.INT8 else [1, 33, 100]:
        matrix, _, oracle = case(kind, 20, width, seed=width)
        x = inputs(3, width, seed=2)
        assert (bits(ops.linear(x, matrix)) == bits(oracle(x.numpy()))).all(), width


def test_large_sums_of_int8_are_exact(isa: str) -> None:
    weights = torch.ones(16, 20000)
    weights[:, ::3] = -1.0
    x = torch.ones(20, 20000)  # two blocks of rows, being long
    x[1:, 5:] = -1.0
    matrix = packed(MatrixKind.INT8, weights, 20000)
    expected = int8_oracle(weights.numpy(), x.numpy())
    assert (bits(ops.linear(x, matrix)) == bits(expected)).all()


def extreme_inputs(width: int) -> Array:
    rng = np.random.default_rng(width)
    signs = np.sign(rng.normal(size=width))
    rows = [
        signs,
        np.ones(width),
        np.full(width, -0.0),
        signs * 3.4e38,
        signs * 1e-41,  # counts as zeros
        np.full(width, np.nextafter(np.float32(2.0**-100), np.float32(0))),  # so does this
        signs * 2.0**-100,
        np.where(signs > 0, 32512.0, rng.integers(-300, 300, width) + 0.5),  # ties, in steps of 1
        np.eye(1, width, width - 1)[0],
    ]
    return np.array(rows, np.float32)


def extreme_rows(kind: MatrixKind, width: int) -> Array:
    """What a matrix is packed of: all bits ones or zeros, greatest and least scales."""
    if kind is MatrixKind.INT8:
        largest = np.array([[3e38], [-3e38], [1.0], [1e-37], [0.0]], np.float32)
        return np.broadcast_to(largest, (5, width)).copy()
    halves = np.array([65504, -65504, 6e-8, 1, 0], np.float16)
    blocks = np.full((5, width // BLOCK[kind][0], BLOCK[kind][1]), 255, np.uint8)
    blocks[3] = 0
    for at in HALVES[kind]:
        blocks[..., at : at + 2] = halves.view(np.uint8).reshape(5, 1, 2)
    return blocks.reshape(5, -1)


@pytest.mark.parametrize("kind", KINDS)
@np.errstate(over="ignore", invalid="ignore")
def test_extremes(isa: str, kind: MatrixKind) -> None:
    source, x = extreme_rows(kind, 512), extreme_inputs(512)
    matrix = packed(kind, source, 512)
    is_int8 = kind is MatrixKind.INT8
    expected = int8_oracle(source, x) if is_int8 else blocks_oracle(kind, source, x)
    found = ops.linear(torch.from_numpy(x), matrix).numpy()
    is_nan = np.isnan(expected)  # of the difference of two infinities
    assert ((bits(found) == bits(expected)) | (is_nan & np.isnan(found))).all()
    if not is_int8:
        assert (bits(dense(matrix)) == bits(dequantised(kind, source))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_its_own(isa: str, kind: MatrixKind) -> None:
    """Whatever others there are, wherever it lies, however many threads share the work."""
    matrix, _, oracle = case(kind, 37, 256, seed=3)
    x, residual, bias = inputs(131, 259, 4)[:, :256], inputs(131, 42, 5)[:, :37], torch.randn(37)
    expected = bits((oracle(x.contiguous().numpy()) + bias.numpy()) + residual.numpy())
    for count in ROW_COUNTS:
        torch.set_num_threads(1 + count % 3)
        rows = slice(count % (132 - count), count % (132 - count) + count)
        out = torch.full((count, 38), torch.nan)[:, :-1]
        scratch = ops.row_scratch(256, count).fill_(torch.nan)
        ops.linear(x[rows], matrix, bias, residual[rows], out, scratch)
        assert (bits(out) == expected[rows]).all(), count


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beyond_the_tensors_is_touched(isa: str, kind: MatrixKind, at_end: bool) -> None:
    for outputs, width in [(1, 32), (21, 96)] if kind.name[-1] != "K" else [(21, 256)]:
        width += 15 if kind is MatrixKind.INT8 else 0
        is_int8 = kind is MatrixKind.INT8
        source = inputs(outputs, width, 1) if is_int8 else file_rows(kind, outputs, width, 1)
        expected = packed(kind, source, width)
        values = guarded(torch.zeros_like(expected.values), at_end)
        matrix = PackedMatrix(values, kind, outputs, width)
        assert matrix_pack(guarded(torch.as_tensor(source), at_end), matrix)
        assert torch.equal(values, expected.values)
        weights = guarded(torch.zeros(outputs, width), at_end)
        tokens = torch.arange(outputs, dtype=torch.int32)
        assert torch.equal(ops.embed(tokens, matrix, weights), dense(expected))
        x, bias, residual, out, scratch = (
            guarded(t, at_end)
            for t in (
                inputs(3, width, 2),
                torch.ones(outputs),
                torch.ones(3, outputs),
                torch.zeros(3, outputs),
                ops.row_scratch(width, 3),
            )
        )
        ops.linear(x, matrix, bias, residual, out, scratch)
        assert torch.equal(out, ops.linear(x, expected, bias, residual))


def test_nothing_is_written_where_nobody_is_open(isa: str) -> None:
    matrix, _, _ = case(MatrixKind.Q4_0, 20, 64, seed=3)
    out = torch.full((3, 20), torch.nan)
    ops.linear(inputs(3, 64, 1), matrix, out=out, is_open=torch.zeros(2, dtype=torch.int32))
    assert out.isnan().all()


@pytest.mark.parametrize("kind", list(BLOCK))
def test_rows_are_dequantised_as_gguf_does(isa: str, kind: MatrixKind) -> None:
    source = file_rows(kind, 19, 512, seed=5, most=60000.0)
    assert (bits(dense(packed(kind, source, 512))) == bits(dequantised(kind, source))).all()


def test_int8_rows(isa: str) -> None:
    for dtype in [torch.float32, torch.bfloat16, torch.float16]:
        weights = inputs(18, 77, seed=6).to(dtype)
        weights[4] = 0.0
        weights[5, 0] = 254.0
        weights[5, 1:] = 3.0  # halfway between two steps: to the even one
        matrix = packed(MatrixKind.INT8, weights, 77)
        wide = weights.float().numpy()
        most = np.abs(wide).max(axis=1, keepdims=True)
        most_steps = 127.0 / np.where(most > 0, most, 1).astype(np.float64)
        steps = np.rint(wide.astype(np.float64) * most_steps) + 0.0  # no negative zeros
        expected = steps.astype(np.float32) * (most / np.float32(127))
        assert (bits(dense(matrix)) == bits(expected)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_16_bits(kind: MatrixKind) -> None:
    matrix, weights, _ = case(kind, 64, 2048, seed=7)
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(8))
    exact = x.double().numpy() @ weights.astype(np.float64).T
    error = ops.linear(x, matrix).double().numpy() - exact
    assert np.sqrt((error**2).mean() / (exact**2).mean()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_gives_nan(isa: str, kind: MatrixKind) -> None:
    matrix, _, _ = case(kind, 16, 256, seed=9)
    x = inputs(4, 256, seed=10)
    clean = bits(ops.linear(x, matrix))
    x[1, 200], x[2, 0] = float("inf"), float("nan")
    y = ops.linear(x, matrix)
    assert torch.isnan(y[1:3]).all()
    assert (bits(y[[0, 3]]) == clean[[0, 3]]).all()


def test_rows_that_are_not_finite_are_told() -> None:
    for kind in BLOCK:
        for at in HALVES[kind]:
            source = file_rows(kind, 3, 256, seed=11)
            source[1, at : at + 2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
            assert not matrix_pack(torch.as_tensor(source), PackedMatrix.empty(kind, 3, 256)), kind
    weights = torch.ones(2, 64)
    weights[1, 63] = float("nan")
    assert not matrix_pack(weights, PackedMatrix.empty(MatrixKind.INT8, 2, 64))


def test_rows_are_packed_in_pieces() -> None:
    source = file_rows(MatrixKind.Q4_K, 37, 512, seed=12)
    whole, pieces = (
        packed(MatrixKind.Q4_K, source, 512),
        PackedMatrix.empty(MatrixKind.Q4_K, 37, 512),
    )
    for first, last in [(20, 37), (0, 3), (3, 20)]:
        assert matrix_pack(torch.as_tensor(source[first:last]), pieces, first)
    assert torch.equal(pieces.values, whole.values)


def test_what_does_not_fit_is_refused() -> None:
    matrix = PackedMatrix.empty(MatrixKind.Q4_0, 4, 64)
    with pytest.raises(ValueError, match="source"):
        matrix_pack(torch.zeros(4, 35, dtype=torch.uint8), matrix)
    with pytest.raises(ValueError, match="source"):
        matrix_pack(torch.zeros(4, 64), matrix)
    narrow = PackedMatrix(matrix.values, MatrixKind.Q4_K, 4, 64)
    with pytest.raises(ValueError, match="multiple of 256"):
        ops.linear(torch.zeros(1, 64), narrow)


def test_bytes_of_a_weight() -> None:
    for kind, (depth, size) in BLOCK.items():
        matrix = PackedMatrix.empty(kind, 64, 2048)
        assert matrix.nbytes <= 64 * 2048 // depth * size * 1.04, kind
