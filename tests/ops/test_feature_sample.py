"""``feature_sample``: right to rounding in every form, and each row's bits its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from specrt import _C
from specrt.ops import feature_sample, feature_sample_workspace, rms_norm
from specrt.ops.feature_sample import FeatureWeights
from specrt.ops.graph import CpuGraph
from tests.ops.conftest import OnAnotherGpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
EPS = 1e-5


@pytest.fixture(autouse=True)
def restore_settings():  # type: ignore[no-untyped-def]
    isa, threads = _C.active_isa(), torch.get_num_threads()
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Weights:
    """What a drafter hands over, by the wrapper's names."""

    embed: torch.Tensor | None
    fc: torch.Tensor
    fc_bias: torch.Tensor | None
    norm: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    token_fc: torch.Tensor | None = None
    token_gate: torch.Tensor | None = None

    @classmethod
    def random(
        cls, hidden: int, wide: int | None, dtype: torch.dtype = torch.float32, vocab: int = 50
    ) -> Weights:
        """FSPAD's, or EAGLE's if ``wide`` (I) is None; products of a size with their operands."""
        generator = torch.Generator().manual_seed(hidden)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(rows, columns, generator=generator)
            return (values / columns**0.5).to(dtype)

        embed = torch.randn(vocab, hidden, generator=generator).to(dtype)
        eagle = cls(embed, matrix(hidden, 2 * hidden), torch.randn(hidden, generator=generator))
        if wide is None:
            return eagle
        return replace(
            eagle,
            norm=torch.randn(hidden, generator=generator),
            gate=matrix(wide, hidden),
            up=matrix(wide, hidden),
            down=matrix(hidden, wide),
        )

    def folded(self, fc: bool, gate: bool) -> Weights:
        """With float32 tables in place of what they fold."""
        assert self.embed is not None and self.fc_bias is not None
        e, hidden, result = self.embed.float(), self.embed.shape[1], self
        if fc:
            table = e @ self.fc[:, :hidden].float().T + self.fc_bias
            half = self.fc[:, hidden:].contiguous()
            result = replace(result, fc=half, fc_bias=None, token_fc=table)
        if gate and self.gate is not None:
            result = replace(result, gate=None, token_gate=e @ self.gate.float().T)
        is_unused = fc and result.gate is None
        return replace(result, embed=None) if is_unused else result

    def run(
        self, tokens: torch.Tensor, source: torch.Tensor | None, features: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        return feature_sample(tokens, source, features, **vars(self), eps=EPS, **rest)


def by_torch(
    w: Weights, tokens: torch.Tensor, features: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The formula, computed in ``dtype``."""
    fields = {name: None if t is None else t.to(dtype) for name, t in vars(w).items()}
    embed, fc, bias, norm, gate, up, down, *_ = fields.values()
    assert embed is not None and fc is not None
    e = embed[tokens.long()]
    h = F.linear(torch.cat([e, features.to(dtype)], -1), fc, bias)
    if gate is None or up is None or down is None:
        return h
    n = F.rms_norm(h, h.shape[-1:], norm, EPS)
    return h + F.linear(F.silu(F.linear(e, gate)) * F.linear(n, up), down)


def inputs(num_rows: int, hidden: int, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    tokens = torch.randint(vocab, (num_rows,), generator=generator, dtype=torch.int32)
    return tokens, torch.randn(num_rows, hidden, generator=generator)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [None, 1, 37, 176])
@pytest.mark.parametrize("hidden", [1, 24, 67])
def test_error_within_twice_torchs(hidden: int, wide: int | None, dtype: torch.dtype) -> None:
    weights = Weights.random(hidden, wide, dtype)
    size = feature_sample_workspace(hidden, wide or 0)
    for num_rows in (1, 3, 20):
        tokens, features = inputs(num_rows, hidden)
        workspace = torch.full((num_rows + 1, size), NAN)
        out = torch.full((num_rows, hidden), NAN)
        returned = weights.run(tokens, None, features, workspace=workspace, out=out)
        assert returned is out
        assert workspace[num_rows].isnan().all()
        exact = by_torch(weights, tokens, features, torch.float64)
        theirs = (by_torch(weights, tokens, features, torch.float32) - exact).abs().max()
        assert (out - exact).abs().max() <= 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [None, 37])
def test_every_folding_gives_the_same(wide: int | None, dtype: torch.dtype) -> None:
    weights = Weights.random(40, wide, dtype)
    tokens, features = inputs(9, 40)
    source = torch.tensor([8, 0, 3, 3, 1, 8, 2, 7, 4], dtype=torch.int32)
    exact = by_torch(weights, tokens, features[source.long()], torch.float64)
    for fc, gate in product((False, True), (False, wide is not None)):
        folded = weights.folded(fc, gate)
        assert (folded.embed is None) == (fc and (gate or wide is None))
        assert (folded.run(tokens, source, features) - exact).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_every_dtype(dtype: torch.dtype) -> None:
    """A table's float32 twin of equal values gives equal bits."""
    folded = Weights.random(24, 19).folded(True, True)
    assert folded.token_fc is not None and folded.token_gate is not None
    narrow = replace(
        folded, token_fc=folded.token_fc.to(dtype), token_gate=folded.token_gate.to(dtype)
    )
    assert narrow.token_fc is not None and narrow.token_gate is not None
    twin = replace(narrow, token_fc=narrow.token_fc.float(), token_gate=narrow.token_gate.float())
    tokens, features = inputs(6, 24)
    assert same_bits(narrow.run(tokens, None, features), twin.run(tokens, None, features))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("wide", [None, 95])
def test_bits_depend_on_the_row_alone(wide: int | None, fold: bool) -> None:
    weights = Weights.random(72, wide, torch.bfloat16)
    weights = weights.folded(True, True) if fold else weights
    tokens, features = inputs(60, 72)
    alone = torch.cat(
        [weights.run(tokens[m : m + 1], None, features[m : m + 1]) for m in range(60)]
    )
    for isa in _C.build_info()["cpu_isas"]:
        _C.set_isa(isa)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for rows in (1, 2, 5, 8, 17, 60):
                out = weights.run(tokens[:rows], None, features[:rows])
                assert same_bits(out, alone[:rows]), (isa, threads, rows)


def test_source_chooses_the_feature() -> None:
    weights = Weights.random(33, 20)
    tokens, features = inputs(7, 33)
    for order in ([6, 5, 4, 3, 2, 1, 0], [2, 2, 2, 2, 2, 2, 2], [5, 0, 5, 1, 1, 6, 2]):
        picked = features[order]
        source = torch.tensor(order, dtype=torch.int32)
        expected = weights.run(tokens, None, picked)
        assert same_bits(weights.run(tokens, source, features), expected)


def test_indices_out_of_range_are_clamped() -> None:
    least, most = -(2**31), 2**31 - 1
    for weights in (Weights.random(17, 5), Weights.random(17, 5).folded(True, True)):
        tokens = torch.tensor([least, -1, 50, most, 3], dtype=torch.int32)
        source = torch.tensor([most, 4, -1, least, 2], dtype=torch.int32)
        _, features = inputs(4, 17)
        out = weights.run(tokens, source, features)
        expected = weights.run(tokens.clamp(0, 49), source.clamp(0, 3), features)
        assert same_bits(out, expected)


def test_a_bad_row_stays_alone() -> None:
    weights = Weights.random(40, 33)
    tokens, features = inputs(9, 40)
    healthy = weights.run(tokens, None, features)
    features[4] = NAN
    out = weights.run(tokens, None, features)
    assert out[4].isnan().all()
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert same_bits(out[keep], healthy[keep])


def test_strided_rows() -> None:
    weights = Weights.random(20, 9)
    assert weights.embed is not None
    tokens, features = inputs(5, 20)
    expected = weights.run(tokens, None, features)

    def widened(t: torch.Tensor) -> torch.Tensor:
        return F.pad(t, (3, 4), value=NAN)[:, 3 : 3 + t.shape[1]]

    out = widened(torch.empty(5, 20))
    workspace = widened(torch.empty(5, feature_sample_workspace(20, 9)))
    strided = replace(weights, embed=widened(weights.embed))
    strided.run(tokens, None, widened(features), workspace=workspace, out=out)
    assert same_bits(out.contiguous(), expected)


def test_norm_is_rms_norm() -> None:
    """With silu(gate) of nearly 1 and up, down the identity, h is left beside its own norm."""
    norm = torch.randn(16, generator=torch.Generator().manual_seed(3))
    table = torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    weights = Weights(
        None,
        torch.zeros(16, 16),
        None,
        norm=norm,
        up=torch.eye(16),
        down=torch.eye(16),
        token_fc=table,
        token_gate=torch.full((4, 16), 32.0),
    )
    out = weights.run(torch.arange(4, dtype=torch.int32), None, torch.zeros(4, 16))
    assert torch.equal(out, table + 32 * rms_norm(table, norm, EPS))


def test_nothing_to_do() -> None:
    none = torch.empty(0, dtype=torch.int32)
    weights = Weights.random(16, 8, vocab=0)
    assert weights.run(none, none, torch.empty(0, 16)).shape == (0, 16)


@pytest.mark.parametrize(("wide", "fold", "launches"), [(None, True, 2), (37, False, 7)])
def test_a_graph_with_new_contents(wide: int | None, fold: bool, launches: int) -> None:
    weights = Weights.random(24, wide)
    weights = weights.folded(True, True) if fold else weights
    tokens, features = inputs(6, 24)
    source = torch.arange(6, dtype=torch.int32)
    workspace, out = torch.empty(6, feature_sample_workspace(24, wide or 0)), torch.empty(6, 24)
    graph = CpuGraph.capture(
        lambda: weights.run(tokens, source, features, workspace=workspace, out=out)
    )
    assert graph.num_launches == launches
    tokens.copy_(tokens.flip(0))
    source.fill_(2)
    features.mul_(-0.5)
    for stale in (workspace, out):
        stale.fill_(NAN)
    graph.launch()
    assert same_bits(out, weights.run(tokens, source, features))


FOLD_FC = {"fc": torch.zeros(8, 8), "fc_bias": None, "token_fc": torch.zeros(5, 8)}
FOLD_GATE = {"gate": None, "token_gate": torch.zeros(5, 6)}
EAGLE = dict.fromkeys(("norm", "gate", "up", "down"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"^tokens: expected \[M\] .* int32"),
        ({"source": torch.zeros(2, dtype=torch.int32)}, r"^source: expected \[M\] = \[3\] int32"),
        ({"features": torch.zeros(2, 8)}, r"^features: expected at least 3 rows, got \[2, 8\]"),
        ({"features": torch.zeros(3, 8).double()}, "^features: expected bfloat16 or float16"),
        ({"features": torch.zeros(3, 8).half()}, "^embed: expected float16 like features"),
        ({"embed": torch.zeros(5, 7)}, r"^embed: expected \[V, H\] = \[5, 8\]"),
        ({"embed": torch.zeros(5, 8).double()}, "^embed: expected float32, bfloat16 or float16"),
        ({"embed": torch.zeros(0, 8)}, "^embed: expected at least one token's row"),
        ({"embed": None}, r"^embed: expected \[V, H\], unless token_fc is given, got None"),
        ({"embed": None, **FOLD_FC}, r"^embed: expected \[V, H\], unless token_gate"),
        ({"embed": None, **FOLD_GATE}, r"^embed: expected \[V, H\], unless token_fc"),
        ({"fc": torch.zeros(8, 8)}, r"^fc: expected \[H, 2 H\] = \[8, 16\]"),
        ({"fc": torch.zeros(16, 8).T}, "^fc: "),
        ({"fc_bias": torch.zeros(7)}, r"^fc_bias: expected \[H\] = \[8\]"),
        ({**FOLD_FC, "fc": torch.zeros(8, 16)}, r"^fc: expected \[H, H\] = \[8, 8\]"),
        ({**FOLD_FC, "fc_bias": torch.zeros(8)}, "^fc_bias: expected None, token_fc holds it"),
        ({**FOLD_FC, "token_fc": torch.zeros(5, 7)}, r"^token_fc: expected \[V, H\]"),
        ({**FOLD_FC, "token_fc": torch.zeros(4, 8)}, r"^embed: expected \[V, H\] = \[4, 8\]"),
        ({"norm": None}, r"^norm: expected \[H\], for norm, gate, up and down come together"),
        ({"norm": torch.zeros(8).bfloat16()}, r"^norm: expected \[H\] = \[8\] float32"),
        ({"gate": None}, r"^gate: expected \[I, H\], or token_gate, got None"),
        ({"gate": torch.zeros(7, 8)}, r"^gate: expected \[I, H\] = \[6, 8\]"),
        ({"up": None}, r"^up: expected \[I, H\], for"),
        ({"up": torch.zeros(6, 9)}, r"^up: expected \[I, H\]"),
        ({"down": None}, r"^down: expected \[H, I\], for"),
        ({"down": torch.zeros(8, 7)}, r"^down: expected \[H, I\] = \[8, 6\]"),
        ({"token_gate": torch.zeros(5, 6)}, "^gate: expected None, token_gate replaces it"),
        ({**FOLD_GATE, "token_gate": torch.zeros(4, 6)}, r"^token_gate: expected \[V, I\] = \[5,"),
        ({**EAGLE, "token_gate": torch.zeros(5, 6)}, "^norm: expected"),
        ({"workspace": torch.zeros(2, 99)}, r"^workspace: expected at least \[3, 48\], got \[2,"),
        ({"workspace": torch.zeros(3, 47)}, r"^workspace: expected at least \[3, 48\]"),
        ({"out": torch.zeros(3, 9)}, r"^out: expected \[M, H\] = \[3, 8\]"),
        ({"fc": torch.zeros(8, 16, device="meta")}, "^fc: expected a CPU or CUDA tensor"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": torch.zeros(3, dtype=torch.int32),
        "source": None,
        "features": torch.zeros(3, 8),
        "eps": EPS,
        **vars(Weights.random(8, 6, vocab=5)),
    }
    feature_sample(**arguments)
    with pytest.raises(ValueError, match=message):
        feature_sample(**{**arguments, **change})


@pytest.mark.parametrize("name", ["fc", "down", "norm", "embed"])
def test_tensors_on_two_devices_are_named(name: str) -> None:
    """By the check of 16-bit rows, which are a GPU's."""
    tensors = {
        n: None if t is None else t.bfloat16() if t.dim() == 2 else t
        for n, t in vars(Weights.random(8, 8)).items()
    }
    tensors[name] = OnAnotherGpu(tensors[name])  # type: ignore[assignment]
    message = f"^{name}: expected a tensor on cpu as features is, got one on cuda:1"
    weights = FeatureWeights(**tensors)  # type: ignore[arg-type]
    rows, tokens = torch.zeros(3, 48, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        _C.feature_check(
            tokens, None, rows[:, :8], *weights, EPS, rows, rows[:, 8:16], *[None] * 6, *[[]] * 5
        )


def test_compiles() -> None:
    weights = Weights.random(24, 37)
    tokens, features = inputs(6, 24)
    tensors: dict[str, Any] = dict(vars(weights))  # torch 2.11 cannot trace the fields themselves

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return feature_sample(tokens, None, features, **tensors, eps=EPS) * 2

    assert torch.equal(step(tokens, features), weights.run(tokens, None, features) * 2)
