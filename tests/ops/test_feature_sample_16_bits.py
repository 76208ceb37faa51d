"""``feature_sample`` of 16-bit rows, a GPU's: products that take rows out of tables, and a norm."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from specrt.ops import feature_sample, feature_sample_workspace, linear_workspace
from tests.ops.conftest import Backend, load_simt
from tests.ops.test_feature_sample import EPS, NAN, Weights, by_torch, inputs

pytestmark = pytest.mark.usefixtures("stand_in_linear")

DTYPES = [torch.bfloat16, torch.float16]
VOCAB = 50


def there(weights: Weights, dtype: torch.dtype, backend: Backend) -> Weights:
    """Matrices and tables in the rows' type, vectors in float32."""
    fields = {
        name: None if t is None else t.to(backend.device, dtype if t.dim() == 2 else None)
        for name, t in vars(weights).items()
    }
    return Weights(**fields)  # type: ignore[arg-type]


def made(hidden: int, wide: int | None, form: str, dtype: torch.dtype, backend: Backend) -> Weights:
    """``folded``, or ``plain``; without a bias too where that is asked."""
    weights = Weights.random(hidden, wide, dtype)
    if "folded" in form:
        weights = weights.folded(True, True)
    if "no bias" in form:
        weights = replace(weights, fc_bias=None)
    return there(weights, dtype, backend)


def given(
    num_rows: int, hidden: int, dtype: torch.dtype, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, features = inputs(num_rows, hidden)
    return tokens.to(backend.device), features.to(backend.device, dtype)


def formula(
    w: Weights, tokens: torch.Tensor, features: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """In ``dtype``, of folded weights too."""
    if w.token_fc is None:
        return by_torch(w, tokens, features, dtype)
    fields = {name: None if t is None else t.to(dtype) for name, t in vars(w).items()}
    _, fc, _, norm, _, up, down, token_fc, token_gate = fields.values()
    assert fc is not None and token_fc is not None
    h = token_fc[tokens.long()] + F.linear(features.to(dtype), fc)
    if norm is None or up is None or down is None or token_gate is None:
        return h
    n = F.rms_norm(h, h.shape[-1:], norm, EPS)
    return h + F.linear(F.silu(token_gate[tokens.long()]) * F.linear(n, up), down)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "plain, no bias", "folded"])
@pytest.mark.parametrize(("hidden", "wide"), [(64, None), (64, 176), (72, None), (24, 40)])
def test_error_within_twice_torchs(
    backend: Backend, hidden: int, wide: int | None, form: str, dtype: torch.dtype
) -> None:
    weights = made(hidden, wide, form, dtype, backend)
    size = feature_sample_workspace(hidden, wide or 0)
    matrices = (weights.fc, weights.gate, weights.up, weights.down)
    values = max(linear_workspace(*m.shape, 130) for m in matrices if m is not None)
    lent = torch.zeros(values, device=backend.device)
    for num_rows in (1, 10, 60, 130):
        tokens, features = given(num_rows, hidden, dtype, backend)
        workspace = torch.full((num_rows + 1, size), NAN, dtype=dtype, device=backend.device)
        out = torch.full((num_rows, hidden), NAN, dtype=dtype, device=backend.device)
        rest = {"workspace": workspace, "linear_workspace": lent, "out": out}
        assert weights.run(tokens, None, features, **rest) is out
        assert workspace[num_rows].isnan().all()
        exact = formula(weights, tokens, features, torch.float64)
        ours, theirs = (
            (result.double() - exact).square().mean().sqrt()
            for result in (out, formula(weights, tokens, features, dtype))
        )
        assert 0 < ours <= 2 * theirs, num_rows


@pytest.mark.parametrize("form", ["plain", "folded"])
@pytest.mark.parametrize("wide", [None, 96])
def test_bits_depend_on_the_row_alone(backend: Backend, wide: int | None, form: str) -> None:
    weights = made(72, wide, form, torch.bfloat16, backend)
    tokens, features = given(130, 72, torch.bfloat16, backend)
    whole = weights.run(tokens, None, features)
    for rows in ([0], [59], [129], [7, 5, 8], list(range(30, 100))):
        some = weights.run(tokens[rows].contiguous(), None, features[rows].contiguous())
        assert same_bits(some, whole[rows]), rows


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_sources_and_indices_out_of_range(backend: Backend, form: str) -> None:
    least, most = -(2**31), 2**31 - 1
    weights = made(24, 40, form, torch.float16, backend)
    _, features = given(4, 24, torch.float16, backend)
    tokens = torch.tensor([least, -1, VOCAB, most, 3, 3], dtype=torch.int32)
    source = torch.tensor([most, 4, -1, least, 2, 2], dtype=torch.int32)
    got = weights.run(tokens.to(backend.device), source.to(backend.device), features)
    clamped = tokens.clamp(0, VOCAB - 1).to(backend.device)
    picked = features[source.clamp(0, 3).long().to(backend.device)]
    assert same_bits(got, weights.run(clamped, None, picked))


def test_a_bad_row_stays_alone(backend: Backend) -> None:
    weights = made(40, 32, "plain", torch.bfloat16, backend)
    tokens, features = given(9, 40, torch.bfloat16, backend)
    healthy = weights.run(tokens, None, features)
    features[4] = NAN
    out = weights.run(tokens, None, features)
    assert out[4].isnan().all()
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert same_bits(out[keep], healthy[keep])


def test_nothing_to_do(backend: Backend) -> None:
    weights = there(Weights.random(16, 8, vocab=0), torch.float16, backend)
    none = torch.empty(0, dtype=torch.int32, device=backend.device)
    features = torch.empty(0, 16, dtype=torch.float16, device=backend.device)
    assert weights.run(none, none, features).shape == (0, 16)


@pytest.mark.parametrize(
    ("wide", "form", "expected"),
    [(None, "plain", 1), (None, "folded", 1), (40, "plain", 5), (40, "folded", 4)],
)
def test_launches(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, wide: int | None, form: str, expected: int
) -> None:
    """Products, and the norm, which is the only one of the shim's here."""
    if backend.name != "simt":
        pytest.skip("the extension's launches are not counted")
    weights = made(24, wide, form, torch.bfloat16, backend)
    module: Any = sys.modules["specrt.ops.feature_sample"]
    product, calls = module.linear, []

    def count(*args: Any, **asked: Any) -> torch.Tensor:
        calls.append(args)
        return product(*args, **asked)

    monkeypatch.setattr(module, "linear", count)
    before = load_simt().num_launches()
    tokens, features = given(5, 24, torch.bfloat16, backend)
    weights.run(tokens, None, features)
    assert len(calls) + load_simt().num_launches() - before == expected


# --- what is refused ------------------------------------------------------------------------------

NARROW = {"up": (6, 8), "gate": (6, 8), "down": (8, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 8).double()}, "^features: expected bfloat16 or float16, got"),
        ({"embed": torch.zeros(5, 8)}, "^embed: expected bfloat16 like features, got"),
        ({"down": torch.zeros(8, 8).half()}, "^down: expected bfloat16 like features, got"),
        ({"norm": torch.zeros(8).bfloat16()}, r"^norm: expected \[H\] = \[8\] float32"),
        ({"up": torch.zeros(8, 9).bfloat16()}, r"^up: expected \[I, H\]"),
        ({"workspace": torch.zeros(3, 48)}, r"^workspace: expected .* bfloat16, got"),
        ({"workspace": torch.zeros(3, 47).bfloat16()}, r"^workspace: expected at least \[3, 48\]"),
        ({"workspace": torch.zeros(3, 60).bfloat16()}, "^workspace: expected rows at multiples of"),
        ({"features": torch.zeros(3, 12).bfloat16()[:, :8]}, "^features: expected rows at"),
        ({"embed": torch.zeros(5, 12).bfloat16()[:, :8]}, "^embed: expected rows at multiples of"),
        (
            {n: torch.zeros(s).bfloat16() for n, s in NARROW.items()},
            "^down: expected H and I to be multiples of 8 in 16 bits, got 8 and 6",
        ),
        ({"out": torch.zeros(3, 8)}, r"^out: expected \[M, H\] = \[3, 8\] bfloat16"),
    ],
)
def test_wrong_arguments_are_named(backend: Backend, change: dict[str, Any], message: str) -> None:
    weights = there(Weights.random(8, 8, vocab=5), torch.bfloat16, backend)
    tokens, features = given(3, 8, torch.bfloat16, backend)
    change = {name: backend.hold(t) for name, t in change.items()}
    wrong = replace(weights, **{n: t for n, t in change.items() if n in vars(weights)})
    rest = {n: t for n, t in change.items() if n not in vars(weights)}
    features = rest.pop("features", features)
    with pytest.raises(ValueError, match=message):
        wrong.run(tokens.clamp(max=4), None, features, **rest)


@pytest.mark.gpu
def test_compiles(backend: Backend) -> None:
    weights = made(64, 176, "plain", torch.bfloat16, backend)
    tokens, features = given(6, 64, torch.bfloat16, backend)
    fields = dict(vars(weights))  # dynamo does not look into a frozen dataclass

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return feature_sample(tokens, None, features, **fields, eps=EPS) * 2

    assert torch.equal(step(tokens, features), weights.run(tokens, None, features) * 2)
