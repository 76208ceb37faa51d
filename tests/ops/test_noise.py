"""The counter-based noise: its numbers, and that every kernel draws from these very ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from specrt import _C
from specrt.ops import Purpose, gumbel_noise
from specrt.sampling import SamplingParams
from tests.ops.test_tree_accept import make_tree, run
from tests.ops.test_tree_build import Coupling, grow


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, want) -> None:
    """Random123's kat_vectors for philox4x32-10."""
    assert _C.philox4x32(counter, key) == want


def test_uniforms_and_noise_at_the_ends() -> None:
    assert 0.0 < _C.uniform_from(0) < _C.uniform_from(2**32 - 1) < 1.0
    for bits in [0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 12345678, 3456789012]:
        w = (bits + 0.5) / 2**32
        want = -math.log(-math.log1p(-w))
        assert _C.gumbel_from(bits) == pytest.approx(want, rel=2e-6, abs=2e-6)
        assert _C.gumbel_from(bits) < 23.0


def test_noise_depends_on_every_key_and_has_gumbel_moments() -> None:
    base = gumbel_noise(1, 2, 200_000)
    assert base.mean().item() == pytest.approx(0.57722, abs=0.015)
    assert base.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    others = [
        gumbel_noise(2, 2, 200_000),
        gumbel_noise(1, 3, 200_000),
        gumbel_noise(1 + 2**32, 2, 200_000),
    ]
    others += [gumbel_noise(1, 2, 200_000, purpose) for purpose in list(Purpose)[1:]]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1].item()) < 0.015
    assert torch.equal(gumbel_noise(-1, 0, 8), gumbel_noise(2**64 - 1, 0, 8))


@pytest.fixture(params=_C.build_info()["cpu_isas"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    active = _C.active_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(active)


def drawn(rows: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """The target's token at position 1, of logits ``[B, V]``."""
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in seeds]
    batch = len(seeds)
    return run(make_tree([[0]] * batch, [[-1]] * batch), rows[:, None], params).tokens[:, 0]


def drafted(rows: torch.Tensor, seeds: list[int], tokens: torch.Tensor | None) -> torch.Tensor:
    """``[B, 2]``: the best children of a coupled tree there."""
    noise = Coupling.of(
        [SamplingParams(temperature=1.0, seed=seed) for seed in seeds], [1] * len(seeds)
    )
    return grow([rows[:, None]], 2, noise=noise, token_map=tokens)[0].tokens[:, :2]


def test_all_64_bits_of_a_seed_count(isa: str) -> None:
    seeds, vocab = [1, 1 + 2**32, 1 + 2**40, 1 + 2**63, 2**64 - 1], 1003
    noise = torch.stack([gumbel_noise(seed, 1, vocab) for seed in seeds])
    best, flat = noise.topk(2).indices, torch.zeros(len(seeds), vocab)
    assert len(set(best[:, 0].tolist())) == len(seeds)
    assert torch.equal(drawn(flat, seeds), best[:, 0].int())
    assert torch.equal(drafted(flat, seeds, None), best.int())
    tokens = torch.randperm(vocab, generator=torch.Generator().manual_seed(1)).int()
    assert torch.equal(drafted(flat, seeds, tokens), best.int())


@pytest.mark.parametrize(("margin", "winner"), [(0.25, 173), (-0.25, 0)])
def test_the_largest_noise_there_is_outweighs_what_it_must(margin: float, winner: int) -> None:
    """All 32 bits of token 173 are 0 here, so no search may pass its logit over unseen."""
    seed, token, vocab = 16782656, 173, 200
    noise = gumbel_noise(seed, 1, vocab)
    assert noise[token] == _C.gumbel_from(0)
    row = torch.full((1, vocab), -100.0)
    row[0, 0], row[0, token] = 0.0, noise[0] - noise[token] + margin
    assert drawn(row, [seed]).tolist() == [winner]
    order = [winner, token - winner]  # the other
    assert drafted(row, [seed], None).tolist() == [order]
    assert drafted(row, [seed], torch.arange(vocab).int()).tolist() == [order]
