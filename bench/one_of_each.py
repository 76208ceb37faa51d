"""Every CUDA kernel once on small shapes, each result compared with a torch expression's, or with
the CPU's bits where there are ways that torch has not (``bench.round_bits``).

For tools that make a launch a hundred times as slow (compute-sanitizer), and for a machine without
pytest. Outputs are poisoned before; shapes have ragged ends in every direction.
"""

from __future__ import annotations

import argparse

import torch

from bench import gpu, small_kernels_cuda, tree_attention_cuda
from bench.fake_gpu import FakeGpu
from bench.gpu import Place
from bench.gpu_check.judge import READY
from bench.limits import Model
from bench.round_bits import run_round_bits
from bench.tree_attention_cuda import Case
from specrt import ops
from specrt.device import Device
from specrt.models.float8 import float8_matrix, in_order
from specrt.sampling import SamplingParams, SamplingTable

MODELS = (Model(256, 208, 2, 4, 2, 64), Model(1032, 72, 3, 8, 1, 128), Model(80, 40, 1, 2, 2, 80))
ROWS = (1, 9, 67)
PRODUCTS = ((72, 104, 1), (33, 40, 9), (96, 72, 17), (48, 1032, 33), (40, 88, 65), (16, 1032, 129))
"""Weights and rows of x: every number of rows that there is a kernel for, K in slices and not."""
TREES = ((1, 130, 1), (3, 70, 9), (2, 300, 65))
"""Batch, prefix, nodes."""


def run_small_kernels(place: Place) -> int:
    """Raises where a kernel and torch differ; the number of comparisons."""
    done = 0
    for kernel in small_kernels_cuda.KERNELS.values():
        for model in MODELS:
            for rows in ROWS:
                small_kernels_cuda.contenders(*kernel.sets(model, rows, 1, place))
                done += 1
    return done


def run_tree_attention(place: Place) -> int:
    """The same for tree attention, against SDPA."""
    done = 0
    for model in MODELS:
        for batch, prefix, nodes in TREES:
            case = Case("small", model, batch, prefix, nodes)
            bench = tree_attention_cuda.Bench(case, 1, place)
            outputs = {"ours": bench.ours()[1], "sdpa": bench.sdpa()[1]}
            failures: dict[str, str] = {}
            tree_attention_cuda.checked(outputs, failures)
            if failures:
                raise RuntimeError(str(failures))
            done += 1
    return done


def run_linear(place: Place) -> int:
    """The same for products, in both types; gated ones where weights are rows of gate and up.

    The CPU's product, which stands in for a GPU's, takes rows of float32 and gates none.
    """
    done = 0
    is_on_gpu = place.dtype != torch.float32
    for dtype in (torch.bfloat16, torch.float16) if is_on_gpu else (place.dtype,):
        for num_outputs, num_inputs, rows in PRODUCTS:
            x, weight, residual = (
                torch.randn(*size, device=place.device).to(dtype)
                for size in ((rows, num_inputs), (num_outputs, num_inputs), (rows, num_outputs))
            )
            bias = torch.randn(num_outputs, device=place.device)
            sums = x.float() @ weight.float().T + bias
            out = torch.full_like(residual, float("nan"))
            ops.linear(x, weight, bias, residual, out)
            _assert_near(out, sums + residual, num_inputs)
            if is_on_gpu and num_outputs % 16 == 0:
                gate, up = sums.unflatten(1, (-1, 2, 8)).unbind(2)
                out = ops.linear(x, weight, bias, is_gated=True)
                expected = (torch.nn.functional.silu(gate) * up).flatten(1)
                _assert_near(out, expected, num_inputs)
            if is_on_gpu:
                check_maxima(place, x, weight)
                check_operands(x, weight, sums - bias)
            check_float8(x, weight, is_on_gpu=is_on_gpu)
            done += 1
    return done


def _assert_near(out: torch.Tensor, expected: torch.Tensor, num_inputs: int) -> None:
    """But for a rounding to ``out``'s dtype, and for the order of sums of K numbers around 1."""
    eps, order = torch.finfo(out.dtype).eps, 1e-5 * num_inputs
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=eps, atol=order)


def check_float8(x: torch.Tensor, weight: torch.Tensor, *, is_on_gpu: bool) -> None:
    """By weights of one byte, of as many columns as a GPU takes."""
    width = x.shape[1] // 16 * 16
    narrow = float8_matrix(weight[:, :width], Device(x.device, is_gpu=is_on_gpu))
    values = in_order(narrow.values) if is_on_gpu else narrow.values
    expected = x[:, :width].float() @ (values.float() * narrow.scale[:, None]).T
    out = torch.full_like(expected, float("nan"), dtype=x.dtype)
    _assert_near(ops.linear(x[:, :width], narrow, out=out), expected, width)


def check_maxima(place: Place, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Of every other row, which is greedy: the others are drawn."""
    num_rows, vocab = len(x), len(weight)
    drawn = SamplingParams(temperature=1.0, seed=1)
    params = [drawn if row % 2 else SamplingParams() for row in range(num_rows)]
    sampling = SamplingTable.build(params, [1] * num_rows, vocab).rows.to(place.device)
    logits = torch.empty(num_rows, vocab, device=place.device)
    keys = torch.empty(num_rows, -(-vocab // 64), dtype=torch.int64, device=place.device)
    counts = torch.ones(num_rows, dtype=torch.int32, device=place.device)
    maxima = ops.TileMaxima(keys, sampling, counts, counts[:, None])
    ops.linear(x, weight, out=logits, maxima=maxima)
    padded = torch.nn.functional.pad(logits, (0, -vocab % 64), value=float("-inf"))
    best = padded.unflatten(1, (-1, 64)).argmax(-1)
    tokens = (~keys & (2**32 - 1)) % 64
    torch.testing.assert_close(tokens[::2], best[::2])


def check_operands(x: torch.Tensor, weight: torch.Tensor, sums: torch.Tensor) -> None:
    """Rows of tables, read from their ends; K in two parts, and the sums for gate and residual."""
    num_rows, begin = len(x), x.shape[1] // 16 * 8
    back = torch.arange(num_rows, device=x.device).flip(0).int()
    first, second, gate, residual = (
        ops.GatheredRows(table.flip(0).contiguous(), back)
        for table in (x[:, :begin], x[:, begin:], sums.to(x.dtype), sums.to(x.dtype))
    )
    out = ops.linear(first, weight, None, residual, second=second, gate=gate)
    rounded = sums.to(x.dtype).float()
    expected = torch.nn.functional.silu(rounded) * sums + rounded
    # The gate multiplies what sums differ by.
    torch.testing.assert_close(out, expected.to(x.dtype), rtol=1e-2, atol=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="the CPU's kernels instead of a GPU's")
    is_dry = parser.parse_args().dry
    place = FakeGpu.place if is_dry else Place()
    if not is_dry:
        gpu.require_gpu()
    torch.zeros(1, device=place.device).add_(1).item()
    print(READY, flush=True)
    torch.manual_seed(0)
    print(f"small kernels: {run_small_kernels(place)} comparisons", flush=True)
    print(f"bits of a round: {run_round_bits(place)} calls", flush=True)
    print(f"linear: {run_linear(place)} comparisons", flush=True)
    print(f"tree_attention: {run_tree_attention(place)} comparisons", flush=True)


if __name__ == "__main__":
    main()
