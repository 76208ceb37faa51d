"""What kernels compute under the shim: against plain Python, the PTX ISA's layouts and torch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.simt import _simt
from tests.simt.fragments import multiplied, pairs, same

SEEDS = [0, 1, 2, 5]


def shuffle_source(lane: int, kind: int, argument: int, width: int) -> int:
    """The lane that ``shfl`` reads from: PTX ISA, "shfl.sync", with CUDA's clamp for a width."""
    segment = 32 - width
    clamp = 0 if kind == 1 else 31
    last = (lane & segment) | (clamp & ~segment)
    source = [
        (lane & segment) | (argument & 31 & ~segment),
        lane - argument,
        lane + argument,
        lane ^ argument,
    ][kind]
    is_inside = source >= last if kind == 1 else source <= last
    return source if is_inside else lane


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("kind", range(4))
def test_shuffle(kind: int, width: int) -> None:
    tensors = {
        "ints": torch.zeros(32, dtype=torch.int32),
        "longs": torch.zeros(32, dtype=torch.int64),
        "doubles": torch.zeros(32, dtype=torch.float64),
        "halves": torch.zeros(32, dtype=torch.float16),
    }
    for argument in range(32):
        _simt.set_schedule(argument)
        _simt.run_probe("shuffle", tensors, [kind, argument, width])
        want = [100 + shuffle_source(lane, kind, argument, width) for lane in range(32)]
        for name, out in tensors.items():
            assert out.tolist() == want, (name, argument)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x55555555, 0x80000001, 0x7FFFFFFF])
def test_votes_and_reductions(mask: int) -> None:
    x = torch.tensor(random.Random(mask).choices(range(-(2**31), 2**31), k=64), dtype=torch.int32)
    x[:32] = x[:32].abs()
    for seed in SEEDS:
        _simt.set_schedule(seed)
        out = torch.zeros(64, 12, dtype=torch.int32)
        signed_mask = mask - (mask >> 31 << 32)
        _simt.run_probe("vote", {"x": x, "out": out}, [signed_mask], block=[64])
        for thread, row in enumerate(out.tolist()):
            base, lane = thread // 32 * 32, thread % 32
            inside = mask >> lane & 1
            lanes = [i for i in range(32) if (mask >> i & 1) == inside]
            values = [int(x[base + i]) for i in lanes]
            bits = [value % 2**32 for value in values]
            want = [
                sum(1 << i for i, value in zip(lanes, values, strict=True) if value > 0),
                any(value > 0 for value in values),
                all(value > 0 for value in values),
                sum(values),
                min(values),
                max(values),
                sum(bits),
                min(bits),
                max(bits),
                np.bitwise_and.reduce(bits),
                np.bitwise_or.reduce(bits),
                np.bitwise_xor.reduce(bits),
            ]
            assert [value % 2**32 for value in row] == [int(value) % 2**32 for value in want]


def test_block_votes() -> None:
    x = (torch.rand(6, 96, generator=torch.Generator().manual_seed(0)) < 0.5).int()
    x[1], x[2] = 0, 1
    for seed in SEEDS:
        _simt.set_schedule(seed)
        out = torch.full((6, 96, 3), -1, dtype=torch.int32)
        _simt.run_probe("block_vote", {"x": x, "out": out}, grid=[6], block=[96])
        want = torch.stack([x.sum(1), x.any(1), x.all(1)], dim=1).int()
        assert torch.equal(out, want[:, None].expand(6, 96, 3))


@pytest.mark.parametrize("block", [32, 64, 96, 1024])
def test_block_sum(block: int) -> None:
    x = torch.randint(-99, 99, (5, block), generator=torch.Generator().manual_seed(1)).float()
    for seed in SEEDS:
        _simt.set_schedule(seed)
        out = torch.empty(5, block)
        _simt.run_probe("sum_blocks", {"x": x, "out": out}, [3], grid=[5], block=[block])
        assert torch.equal(out, (x.sum(1, keepdim=True) + 2 * block).expand(5, block))


def test_dimensions() -> None:
    grid, block = (3, 2, 2), (5, 3, 4)
    for seed in SEEDS:
        _simt.set_schedule(seed)
        out = torch.full((12, 60, 7), -1, dtype=torch.int32)
        _simt.run_probe("where", {"out": out}, grid=grid, block=block)
        for number in range(12):
            for thread in range(60):
                want = [number % 3, number // 3 % 2, number // 6]
                want += [thread % 5, thread // 5 % 3, thread // 15, thread % 32]
                assert out[number, thread].tolist() == want


def test_atomics() -> None:
    total = 4 * 96
    for seed in SEEDS:
        _simt.set_schedule(seed)
        i = torch.zeros(9 + total + 1, dtype=torch.int32)
        i[4] = -1
        u = torch.zeros(2, dtype=torch.int64)
        f, d = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
        tensors = {"i": i, "u": u, "f": f, "d": d}
        _simt.run_probe("count_atomically", tensors, grid=[4], block=[96])
        assert i[:5].tolist() == [total, total - 1, 1 - total, 2**31 - 1, -(2**31)]
        assert 0 <= i[5] < total and i[6] == total % 7 and i[7:9].tolist() == [0, total]
        assert sorted(i[9 : 9 + total].tolist()) == list(range(total))
        assert u.tolist() == [total << 40, 1 << 59]
        assert f.item() == total and d.item() == total / 2


@pytest.mark.parametrize("form", range(6))
def test_ldmatrix(form: int) -> None:
    count, is_transposed = (1, 2, 4)[form % 3], form >= 3
    words = torch.randperm(256, generator=torch.Generator().manual_seed(2)).to(torch.int16)
    out = torch.full((32, 4), -1, dtype=torch.int32)
    tensors = {"words": pairs(words), "out": out}
    _simt.run_probe("load_matrices", tensors, [form], shared_bytes=512)
    matrices = words.view(4, 8, 8)
    for lane in range(32):
        for m in range(4):
            row, column = lane // 4, lane % 4 * 2
            matrix = matrices[m].T if is_transposed else matrices[m]
            low, high = matrix[row, column : column + 2].tolist()
            assert out[lane, m] == (low | high << 16 if m < count else -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    total = np.zeros((16, 8), dtype=np.float32)
    for k in range(16):
        total += np.outer(a[:, k].float().numpy(), b[k].float().numpy())
    want = torch.from_numpy(c.numpy() + total)
    for seed in SEEDS:
        _simt.set_schedule(seed)
        assert torch.equal(multiplied(a, b, c), want)
    exact = a.double() @ b.double() + c.double()
    assert (want.double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_rows_are_apart(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    c[0, 0] = -0.0
    want = multiplied(a, b, c)
    broken_a, broken_b = a.clone(), b.clone()
    broken_a[5], broken_b[:, 3] = torch.nan, torch.inf
    out = multiplied(broken_a, broken_b, c)
    kept = torch.ones(16, 8, dtype=torch.bool)
    kept[5], kept[:, 3] = False, False
    assert torch.equal(out[kept], want[kept]) and not out[~kept].isfinite().any()
    unchanged = multiplied(a * 0, b, c)
    assert torch.equal(unchanged.view(torch.int32), c.view(torch.int32))


def test_floats_to_16_bits_and_back() -> None:
    generator = torch.Generator().manual_seed(5)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    anything = torch.randint(-(2**31), 2**31, (65536,), generator=generator).int()
    halves = every.view(torch.float16).float()
    middles = torch.nextafter(halves, torch.tensor(torch.inf)).view(torch.int32) & -4096 | 4096
    bf16_middles = every.to(torch.int32) << 16 | 0x8000
    scaled = torch.randn(65536, generator=generator) * 2.0 ** torch.arange(-40, 24).repeat(1024)
    small = (torch.arange(65536.0) * 2.0**-27).view(torch.int32)  # quarters of subnormal halves
    inputs = [anything, middles, middles - 1, middles + 1, small, scaled.view(torch.int32)]
    inputs += [bf16_middles, bf16_middles - 1, bf16_middles + 1]
    x = torch.cat(inputs).view(torch.float32)
    tensors = {"x": x, "bf16": torch.empty_like(x).bfloat16(), "f16": torch.empty_like(x).half()}
    tensors |= {"from_bf16": torch.empty_like(x), "from_f16": torch.empty_like(x)}
    _simt.run_probe("convert", tensors, grid=[x.numel() // 1024], block=[1024])
    assert same(tensors["bf16"], x.bfloat16()) and same(tensors["f16"], x.half())
    assert same(tensors["from_bf16"], x.bfloat16().float())
    assert same(tensors["from_f16"], x.half().float())
    back = {"bf16": every.view(torch.bfloat16), "f16": every.view(torch.float16)}
    outs = {f"from_{name}": torch.empty(65536) for name in back}
    _simt.run_probe("convert_back", back | outs, grid=[64], block=[1024])
    for name, values in back.items():
        assert same(outs[f"from_{name}"], values.float())


def test_exp2() -> None:
    x = torch.cat([torch.linspace(-130, 130, 1021), torch.tensor([0.0, -torch.inf, torch.inf])])
    out = torch.empty(1024)
    _simt.run_probe("exp2", {"x": x, "out": out}, block=[1024])
    want = torch.exp2(x.double())
    want[want < 2.0**-126] = 0.0
    assert torch.allclose(out.double(), want.float().double(), rtol=2.0**-22, atol=0.0)
    assert out[-3:].tolist() == [1.0, 0.0, torch.inf]


def test_bit_functions() -> None:
    values = [
        0,
        1,
        -1,
        12,
        -(2**31),
        2**31 - 1,
        *random.Random(6).choices(range(-(2**30), 2**30), k=26),
    ]
    x = torch.tensor(values, dtype=torch.int32)
    out = torch.empty(32, 7, dtype=torch.int32)
    _simt.run_probe("bits", {"x": x, "out": out})
    for value, row in zip(values, out.tolist(), strict=True):
        unsigned, wide = value % 2**32, (value << 20) % 2**64
        assert row == [
            unsigned.bit_count(),
            (unsigned & -unsigned).bit_length(),
            32 - unsigned.bit_length(),
            wide.bit_count(),
            (wide & -wide).bit_length(),
            min(value, 7),
            max(value, -7),
        ]
