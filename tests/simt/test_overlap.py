"""Launches that overlap with the one before: what they may do before their wait, and what not."""

from __future__ import annotations

import pytest
import torch

from tests.simt import _simt

SEEDS = range(8)
FAULTS = {
    "no wait": (1, r"read at byte \d+ of buffer #\d \(x, 1024 bytes\) before wait_for_previous"),
    "early read": (2, r"read at byte \d+ of buffer #\d \(x, 1024 bytes\) before wait_for_prev"),
    "early write": (3, r"write at byte \d+ of buffer #\d \(out, 1024 bytes\) before wait_for_prev"),
    "early atomic": (4, r"(read|write) at byte 0 of buffer #\d \(ticket, 4 bytes\) before wait"),
    "early copy": (5, r"read at byte 0 of buffer #\d \(x, 1024 bytes\) before wait_for_previous"),
    "early read in the last block": (6, r"read at byte \d+ of buffer #\d \(x, .* before wait_for"),
    "an end without wait": (7, r"this thread ends without wait_for_previous"),
    "a constant written": (8, r"write at byte \d+ of buffer #\d \(weight, .* bytes\), a constant"),
}


def scaled(fault: int, overlaps: bool = True) -> torch.Tensor:
    tensors = {
        "weight": torch.arange(256.0),
        "x": torch.full((256,), 2.0),
        "out": torch.full((256,), torch.nan),
        "ticket": torch.zeros(1, dtype=torch.int32),
    }
    shape = {"grid": [8], "block": [32], "shared_bytes": 512, "overlaps": overlaps}
    _simt.run_probe("scale", tensors, [fault], **shape)
    return tensors["out"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, seed: int) -> None:
    number, words = FAULTS[fault]
    _simt.set_schedule(seed, resident_blocks=1 + seed % 3)
    block = r"\(7,0,0\)" if fault == "early read in the last block" else r"\(\d,0,0\)"
    with pytest.raises(RuntimeError, match=rf"kernel scale, block {block}, thread .*{words}"):
        scaled(number)


@pytest.mark.parametrize("seed", SEEDS)
def test_right(seed: int) -> None:
    """Constants are read before the wait, and the launch after a failed one finds its memory."""
    _simt.set_schedule(seed, resident_blocks=1 + seed % 3)
    before = _simt.num_launches(), _simt.num_overlapping()
    for overlaps in (True, False):
        with pytest.raises(RuntimeError):
            scaled(FAULTS["early write"][0])
        assert torch.equal(scaled(0, overlaps), 2 * torch.arange(256.0))
    assert (_simt.num_launches() - before[0], _simt.num_overlapping() - before[1]) == (2, 1)


def test_what_does_not_overlap_need_not_wait() -> None:
    for fault in ("no wait", "early read"):
        assert torch.equal(scaled(FAULTS[fault][0], overlaps=False), 2 * torch.arange(256.0))


def test_a_storage_that_is_not_only_constants() -> None:
    """``weight`` and ``x`` are views of one storage: what is constant cannot be told."""
    whole = torch.ones(512)
    tensors = {
        "weight": whole[:256],
        "x": whole[256:],
        "out": torch.empty(256),
        "ticket": torch.zeros(1, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match=r"read at byte 0 .*\(weight = x, 2048 bytes"):
        _simt.run_probe("scale", tensors, [0], grid=[8], block=[32], overlaps=True)
    _simt.run_probe("scale", tensors, [8], grid=[8], block=[32])
    assert tensors["out"].tolist() == [1.0] * 256


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_wait_apart(seed: int) -> None:
    _simt.set_schedule(seed)
    x, out = torch.arange(5.0), torch.empty(5, 64)
    _simt.run_probe("wait_and_meet", {"x": x, "out": out}, grid=[5], block=[64], overlaps=True)
    assert torch.equal(out, x[:, None] + torch.arange(64.0))
