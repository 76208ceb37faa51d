"""Each fault that the shim finds, planted; and beside it what is no fault."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.simt import _simt

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(8)
FULL = -1  # all 32 lanes


def is_right(name: str, out: torch.Tensor, want: torch.Tensor, flag: int, **shape) -> bool:
    out.fill_(-1.0)
    _simt.run_probe(name, {"out": out}, [flag], **shape)
    return torch.equal(out, want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "other"), [("exchange", (torch.arange(256) + 32) % 256), ("exchange_in_warp", None)]
)
def test_missing_barrier(name: str, other: torch.Tensor | None, seed: int) -> None:
    want = (torch.arange(256) ^ 5 if other is None else other).float().repeat(5)
    _simt.set_schedule(seed)
    shape = {"grid": [5], "block": [256]}
    assert is_right(name, torch.empty(1280), want, 1, **shape)
    assert not is_right(name, torch.empty(1280), want, 0, **shape)


def last_block_sum(is_right: int) -> float:
    tensors = {
        "parts": torch.full((512,), torch.nan),
        "ticket": torch.zeros(1, dtype=torch.int32),
        "out": torch.full((1,), torch.nan),
    }
    _simt.run_probe("sum_in_last_block", tensors, [is_right], grid=[4], block=[128])
    return tensors["out"].item()


def test_racy_tail() -> None:
    wrong = set()
    for seed in SEEDS:
        for resident_blocks in (1, 3):
            _simt.set_schedule(seed, resident_blocks)
            assert last_block_sum(1) == 511 * 256
        if last_block_sum(0) != 511 * 256:
            wrong.add(seed)
    assert len(wrong) >= 4


def test_divergent_barrier() -> None:
    out = torch.zeros(64)
    for seed in SEEDS:
        _simt.set_schedule(seed)
        with pytest.raises(RuntimeError, match="divergent barrier") as caught:
            _simt.run_probe("exit_before_barrier", {"out": out}, [40], block=[64])
        text = str(caught.value)
        assert text.startswith("kernel exit_before_barrier, block (0,0,0), thread (")
        assert "faults.cu:" in text
        with pytest.raises(RuntimeError, match="divergent barrier") as caught:
            _simt.run_probe("two_barriers", {"out": out}, block=[64])
        assert str(caught.value).count("faults.cu:") == 2
        assert not out.any()
    _simt.set_schedule(1, strict=False)
    _simt.run_probe("exit_before_barrier", {"out": out}, [40], block=[64])
    assert out[:40].all() and not out[40:].any()
    _simt.run_probe("two_barriers", {"out": out}, block=[64])
    assert out.all()


@pytest.mark.parametrize("seed", [0, 1])
def test_out_of_bounds(seed: int) -> None:
    """At the exact end with an even seed, at the exact start with an odd one; 5000 is far off."""
    _simt.set_schedule(seed)
    x, out = torch.zeros(100), torch.zeros(1)
    for index, words in [
        (100, "0 bytes past the end"),
        (101, "4 bytes past the end"),
        (-1, "[1-4] bytes before the start"),
        (-5000, "20000 bytes before the start"),
        (5000, "19600 bytes past the end"),
    ]:
        with pytest.raises(RuntimeError, match=f"write {words} of buffer #0 .x, 400 bytes"):
            _simt.run_probe("write_at", {"x": x}, [index])
    assert not x.any()
    for index, words in [(-5000, "before the start"), (5000, "past the end")]:
        pattern = rf"read_at, block .0,0,0., thread .3,0,0.: .* read .*{words} of buffer #1 .x"
        with pytest.raises(RuntimeError, match=pattern):
            _simt.run_probe("read_at", {"x": x, "out": out}, [index])
    guarded, other = (100, -1) if seed == 0 else (-1, 100)
    with pytest.raises(RuntimeError, match="read"):
        _simt.run_probe("read_at", {"x": x, "out": out}, [guarded])
    _simt.run_probe("read_at", {"x": x, "out": out}, [other])
    assert out.isnan().all()
    _simt.run_probe("read_at", {"x": x, "out": out}, [99])
    assert out.item() == 0.0


def test_null_and_empty() -> None:
    out, empty = torch.zeros(1), torch.empty(0)
    with pytest.raises(RuntimeError, match="read through a null pointer"):
        _simt.run_probe("read_null", {"out": out})
    with pytest.raises(RuntimeError, match=r"read 0 bytes past the end of buffer #1 .x, 0 bytes"):
        _simt.run_probe("read_at", {"x": empty, "out": out}, [0])


def test_views_share_a_copy() -> None:
    whole = torch.arange(8.0)
    _simt.run_probe("read_at", {"x": whole[2:], "out": whole[7:]}, [1])
    assert whole.tolist() == [0, 1, 2, 3, 4, 5, 6, 3]


def test_stack_overflow() -> None:
    with pytest.raises(RuntimeError, match=r"thread .*: stack overflow"):
        _simt.run_probe("overflow_stack", {"out": torch.zeros(1)}, [1000], block=[1])


@pytest.mark.parametrize(
    ("kind", "index", "words"),
    [
        (0, 32, "write 0 bytes past the end of static shared array #0"),
        (0, 35, "write 12 bytes past the end of static shared array #0"),
        (1, 16, "write 0 bytes past the end of dynamic shared memory"),
        (1, -1, "write before the start of dynamic shared memory"),
        (1, 1 << 17, "write far outside of the block's shared memory"),
    ],
)
def test_out_of_bounds_shared(kind: int, index: int, words: str) -> None:
    for seed in SEEDS:
        _simt.set_schedule(seed, resident_blocks=1 + seed % 3)
        _simt.run_probe("write_shared", {}, [kind, 0], grid=[4], shared_bytes=64)
        with pytest.raises(RuntimeError, match=rf"kernel write_shared, block .1,0,0.*{words}"):
            _simt.run_probe("write_shared", {}, [kind, index], grid=[4], shared_bytes=64)


def test_fresh_shared_memory_is_nan() -> None:
    for seed in (0, 1):
        _simt.set_schedule(seed, resident_blocks=1)
        out = torch.zeros(64)
        _simt.run_probe("read_fresh_shared", {"out": out}, grid=[3], shared_bytes=128)
        assert out.isnan().all()


def test_too_much_shared_memory() -> None:
    out = torch.zeros(64)
    with pytest.raises(RuntimeError, match="read_fresh_shared: a block of 232449 bytes of shared"):
        _simt.run_probe("read_fresh_shared", {"out": out}, shared_bytes=232449)
    with pytest.raises(RuntimeError, match="shared memory: 232576 bytes in all"):
        _simt.run_probe("read_fresh_shared", {"out": out}, shared_bytes=232448)
    with pytest.raises(RuntimeError, match="48 KiB"):
        _simt.run_probe("big_static_array", {"out": out})
    _simt.set_device(shared_bytes=1024)
    with pytest.raises(RuntimeError, match="shared memory, may have 1024"):
        _simt.run_probe("read_fresh_shared", {"out": out}, shared_bytes=1025)


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ([0], [32]),
        ([1, 65536], [1]),
        ([1, 1, 65536], [1]),
        ([1], [0]),
        ([1], [1025]),
        ([1], [32, 33]),
        ([1], [1, 1, 65]),
    ],
)
def test_launch_limits(grid: list[int], block: list[int]) -> None:
    with pytest.raises(RuntimeError, match="kernel limits: a (grid|block) of .* must be 1 to"):
        _simt.run_probe("limits", {"out": torch.zeros(2)}, grid=grid, block=block)


def test_device() -> None:
    out = torch.zeros(2, dtype=torch.int32)
    for sms, shared_bytes in [(8, 232448), (108, 166912)]:
        _simt.set_device(sms, shared_bytes)
        _simt.run_probe("limits", {"out": out}, block=[1])
        assert out.tolist() == [sms, shared_bytes]


@pytest.mark.parametrize(
    ("low", "high", "source", "words"),
    [
        (0xFFFF, FULL << 16, 20, "lane 20, which does not take part"),
        (FULL, 0xFFFF, 0, "which is not in it|which has exited|lanes disagree on the mask"),
        (FULL, FULL << 16, 16, "lanes disagree on the mask|which has exited|waits for it"),
    ],
)
def test_masks(low: int, high: int, source: int, words: str) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    for seed in SEEDS:
        _simt.set_schedule(seed)
        with pytest.raises(RuntimeError, match=f"kernel shuffle_from, .*({words})"):
            _simt.run_probe("shuffle_from", {"out": out}, [low, high, source])


def test_absent_lanes() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="reads from lane 16, which does not take part"):
        _simt.run_probe("shuffle_from", {"out": out}, [FULL, FULL, 16], block=[16])
    _simt.run_probe("shuffle_from", {"out": out}, [FULL, FULL, 15], block=[16])
    assert out.tolist() == [15] * 16 + [0] * 16
    for seed in SEEDS:
        _simt.set_schedule(seed)
        with pytest.raises(RuntimeError, match="exited"):
            _simt.run_probe("vote_after_exit", {"out": out}, [5])
        _simt.set_schedule(seed, strict=False)
        out.zero_()
        _simt.run_probe("vote_after_exit", {"out": out}, [5])
        # Lanes that leave later than a vote may have been waited for, but none votes.
        assert out.tolist() == [31] * 5 + [0] * 27


def test_different_operations() -> None:
    with pytest.raises(RuntimeError, match="different operations: .*__syncwarp|__ballot_sync"):
        _simt.run_probe("different_operations", {})


def test_deadlock() -> None:
    for seed in SEEDS:
        _simt.set_schedule(seed)
        with pytest.raises(RuntimeError, match=r"thread \(0,0,0\): deadlock: .*__syncwarp"):
            _simt.run_probe("barrier_against_warp", {}, block=[64])
        # The same between blocks: what spins needs the other to be resident.
        _simt.set_schedule(seed, resident_blocks=3)
        word = torch.zeros(1, dtype=torch.int32)
        _simt.run_probe("wait_for_last_block", {"word": word}, grid=[3])
    _simt.set_schedule(0, resident_blocks=1)
    with pytest.raises(RuntimeError, match="livelock"):
        _simt.run_probe("wait_for_last_block", {"word": word.zero_()}, grid=[3])


def test_ldmatrix_address() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    _simt.run_probe("load_matrix_at", {"out": out}, [16], shared_bytes=512)
    for offset, words in [(8, "misaligned row"), (368, "out-of-bounds read")]:
        with pytest.raises(RuntimeError, match=rf"thread .9,0,0.: ldmatrix: {words}"):
            _simt.run_probe("load_matrix_at", {"out": out}, [offset], shared_bytes=512)
    with pytest.raises(RuntimeError, match="needs all 32 lanes"):
        _simt.run_probe("load_matrix_at", {"out": out}, [0], block=[31], shared_bytes=512)


def test_misaligned_atomic() -> None:
    with pytest.raises(RuntimeError, match="atomicAdd: misaligned"):
        _simt.run_probe("misaligned_atomic", {"word": torch.zeros(2, dtype=torch.int32)})


def test_misaligned_packs() -> None:
    x, out = torch.randn(12), torch.zeros(12)
    _simt.run_probe("copy_pack", {"x": x, "out": out}, [4, 8], block=[1])
    assert torch.equal(out[8:], x[4:8])
    for numbers in ([2, 0], [0, 1]):
        with pytest.raises(RuntimeError, match="misaligned address, must be a multiple of 16"):
            _simt.run_probe("copy_pack", {"x": x, "out": out}, numbers, block=[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_land_at_their_wait(seed: int) -> None:
    _simt.set_schedule(seed)
    x, out = torch.randn(3, 128), torch.empty(3, 128)
    for is_waiting in (1, 0):
        _simt.run_probe(
            "copy_in_groups", {"x": x, "out": out}, [3, is_waiting], shared_bytes=3 * 512
        )
        num_landed = 2 if is_waiting else 0
        assert torch.equal(out[:num_landed], x[:num_landed])
        assert out[num_landed:].isnan().all()


def test_copy_faults() -> None:
    x, out = torch.zeros(32), torch.ones(128)
    for committed in (0, 1):
        with pytest.raises(RuntimeError, match="exited with 1 cp.async never waited for"):
            _simt.run_probe("copy_never_awaited", {"x": x}, [committed], shared_bytes=512)
    for source, target, words in [
        (4, 0, "misaligned source"),
        (0, 4, "misaligned destination"),
        (128, 0, r"read 0 bytes past the end of buffer #0 \(x"),
        (0, 64, "destination is not in the block's shared memory"),
    ]:
        with pytest.raises(RuntimeError, match=f"cp.async: .*{words}"):
            _simt.run_probe("copy_at", {"x": x}, [source, target], shared_bytes=64)
    with pytest.raises(RuntimeError, match="destination is not in the block's shared memory"):
        _simt.run_probe("copy_to_global", {"x": x, "out": out})
    _simt.run_probe("copy_zeros", {"out": out}, shared_bytes=512)
    assert not out.any()


def test_the_next_launch_works() -> None:
    before = _simt.num_launches()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            _simt.run_probe("write_at", {"x": torch.zeros(4)}, [1 << 20])
        assert last_block_sum(1) == 511 * 256
    assert _simt.num_launches() == before + 3


def test_launches_take_turns() -> None:
    sums = []
    threads = [threading.Thread(target=lambda: sums.append(last_block_sum(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [511 * 256] * 4


def test_other_faults_go_their_way() -> None:
    code = """
import ctypes, torch
from tests.simt import _simt
try:
    _simt.run_probe("write_at", {"x": torch.zeros(4)}, [1 << 20])
except RuntimeError:
    print("caught", flush=True)
ctypes.string_at(16)
"""
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout == "caught\n" and run.returncode == -11
    assert "Segmentation fault" in run.stderr
