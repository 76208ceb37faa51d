"""Acceptance on a GPU gives the CPU's bits: all that rows may ask for, mixed in one batch."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from specrt import _C
from specrt.sampling import SamplingParams
from specrt.types import AcceptResult, DraftTree
from tests.ops.conftest import Backend, use_simt
from tests.ops.test_layouts import untouched
from tests.ops.test_tree_accept import (
    CPU,
    EDITS,
    FILTERS,
    INF,
    NAN,
    i32,
    make_tree,
    run,
    scratch_on,
)

MORE_FILTERS = [
    {"top_p": 0.9999},
    {"top_p": 0.999999},
    {"top_k": 7, "top_p": 0.5},
    {"temperature": 0.01, "min_p": 0.3},
]
KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.5, "top_k": 3, "frequency_penalty": 0.5},
]
"""One for each way through the kernels."""


def sampled(**options: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 5, **options})


def every_kind() -> list[SamplingParams]:
    pairs = itertools.product([*FILTERS, *MORE_FILTERS], EDITS)
    rows = [sampled(seed=seed, **f, **e) for seed, (f, e) in enumerate(pairs)]
    return [*(SamplingParams(**edits) for edits in EDITS), *rows]


def on_the_cpu(*args: object, **options: object) -> AcceptResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["specrt.ops.tree_accept"], "_C", _C)
        return run(*args, **options)


def check(
    backend: Backend,
    *args: object,
    scratch: torch.Tensor | None = None,
    has_maxima: tuple[bool, ...] = (False, True),
) -> AcceptResult:
    """Bit for bit; on a GPU also from the keys that the product of the logits leaves."""
    want = on_the_cpu(*args, want_logprobs=True)
    for from_maxima in has_maxima if backend.runs_cuda_source else (False,):
        got = run(
            *args, backend=backend, scratch=scratch, want_logprobs=True, has_maxima=from_maxima
        )
        for name in ("path", "accept_length", "tokens"):
            assert torch.equal(getattr(got, name), getattr(want, name)), (name, from_maxima)
        assert torch.equal(got.logprobs.isnan(), want.logprobs.isnan())
        bits = [result.logprobs.nan_to_num().view(torch.int32) for result in (got, want)]
        assert torch.equal(*bits), from_maxima
    return want


def batch_of(params: list[SamplingParams], vocab: int, scale: float, has_draft_probs: bool):
    """Trees 0-1-3, 0-2 whose children hold what is likely; their history holds repetitions."""
    generator, batch = torch.Generator().manual_seed(vocab), len(params)
    logits = torch.randn(batch, 4, vocab, generator=generator) * scale
    best = logits.topk(2).indices.int()
    tokens = torch.stack([best[:, 0, 0], best[:, 0, 0], best[:, 0, 1], best[:, 1, 0]], 1)
    law = (logits * 0.8).softmax(-1) if has_draft_probs else None
    tree = make_tree(tokens.tolist(), [[-1, 0, 0, 1]] * batch, draft_probs=law)
    history = torch.randint(0, vocab, (batch, 9), generator=generator)
    history[:, 3:5] = best[:, 0]
    return tree, logits, params, history.tolist(), [4] * batch


@pytest.mark.parametrize("has_draft_probs", [False, True])
def test_all_that_rows_ask_for_in_one_batch(backend: Backend, has_draft_probs: bool) -> None:
    """Two thirds of them; the rest is slow."""
    want = check(backend, *batch_of(every_kind()[has_draft_probs::3], 131, 2.0, has_draft_probs))
    assert want.accept_length.unique().tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("has_draft_probs", [False, True])
def test_in_any_order_of_threads(
    monkeypatch: pytest.MonkeyPatch, seed: int, has_draft_probs: bool
) -> None:
    use_simt(seed, monkeypatch.setattr)
    simt = Backend("simt", torch.device("cpu"))
    check(simt, *batch_of(every_kind(), 131, 2.0, has_draft_probs))
    for scale in (1.0, 0.0):
        check(simt, *batch_of(every_kind()[seed::8], 9001, scale, has_draft_probs))


def test_rejected_siblings(backend: Backend) -> None:
    """Of a law unlike the target's, and only children; last, of a law that leaves no residual."""
    generator, batch, vocab = torch.Generator().manual_seed(4), 52, 6
    logits = torch.randn(batch, 5, vocab, generator=generator)
    law = torch.randn(batch, 5, vocab, generator=generator).softmax(-1)
    tokens = torch.cat([torch.zeros(batch, 1), law[:, 0].multinomial(4, generator=generator)], 1)
    best = logits[:, 0].argmax(-1)
    warmth = [0.5, 1.0]  # of chains and stars
    several = [sampled(seed=b, temperature=warmth[b % 2], top_k=int(b >= 48)) for b in range(batch)]
    for b in range(48, batch):
        law[b] = torch.zeros(vocab).index_fill_(0, best[b], 1.0)
        law[b, :, (best[b] + 1) % vocab] = 5e-5
        tokens[b, 1:3] = torch.stack([(best[b] + 1) % vocab, best[b]])
    star, chain = [-1, 0, 0, 0, 0], [-1, 0, 1, 2, 3]
    parents = [chain if b < 48 and b % 2 == 0 else star for b in range(batch)]
    tree = make_tree(tokens.tolist(), parents, draft_probs=law)
    want = check(backend, tree, logits, several, has_maxima=(False,))
    assert {-1, 1, 2} <= set(want.path[:48, 1].tolist())
    assert want.path[48:, 1].tolist() == [2] * 4


# --- long rows: several chunks, several blocks
def rows_of(vocab: int, scale: float, several: list[SamplingParams]):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(len(several), 1, vocab, generator=generator) * scale
    history = torch.randint(0, vocab, (len(several), 40), generator=generator).tolist()
    return make_tree([[0]] * len(several), [[-1]] * len(several)), logits, several, history


@pytest.mark.parametrize("scale", [3.0, 0.02, 0.0])
def test_long_rows(backend: Backend, scale: float) -> None:
    """Of 0.02 and 0, which are flat, more tokens may be the last one kept than are sorted."""
    options = [
        {"temperature": 0.8},
        {"top_p": 0.9},
        {"top_p": 0.999999},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 5000, "top_p": 0.8, "min_p": 0.001},
        {"top_k": 6000, "repetition_penalty": 1.3, "logit_bias": {9000: 2.0}},
        {"min_p": 0.2},
    ]
    several = [sampled(seed=i, **o) for i, o in enumerate(options)]
    check(backend, *rows_of(18_011, scale, several))


def test_a_row_of_128k(backend: Backend) -> None:
    options = [{"temperature": 0.7}, {"top_p": 0.95}, {"top_k": 40, "presence_penalty": 1.0}]
    several = [sampled(seed=i, **o) for i, o in enumerate(options)]
    check(backend, *rows_of(128_256, 3.0, several))


def test_slices_of_several_chunks(backend: Backend) -> None:
    """So many rows, though mostly padding, that each has one block, which edits chunk by chunk."""
    edits = {"repetition_penalty": 1.3, "frequency_penalty": 0.4}
    options = [{"temperature": 0.8}, {"top_p": 0.95}, {"min_p": 0.1}]
    several = [
        SamplingParams(**edits),
        *(sampled(seed=i, **edits, **o) for i, o in enumerate(options)),
    ]
    _, logits, params, history = rows_of(16_900, 2.0, several)
    batch, padding = len(several), [[0] * 128]
    tree = make_tree(padding * batch, [[-1] + [0] * 127] * batch, num_nodes=[1] * batch)
    check(backend, tree, logits.expand(-1, 128, -1), params, history, has_maxima=(False,))


@pytest.mark.parametrize("vocab", [1, 63, 64, 65])
def test_short_rows(backend: Backend, vocab: int) -> None:
    options = [
        {},
        {"top_k": vocab, "top_p": 0.3},
        {"top_k": vocab + 1},
        {"top_k": 1},
        {"top_p": 0.99, "logit_bias": {0: -INF} if vocab > 1 else {}},
    ]
    several = [SamplingParams(), *(sampled(seed=i, **o) for i, o in enumerate(options))]
    check(backend, *rows_of(vocab, 1.0, several))


@pytest.mark.parametrize("top_p", [0.25, 0.5, 1.0])
def test_ties_at_the_edges(backend: Backend, top_p: float) -> None:
    """Values of few kinds, among them -0 and 0: of equals the lowest ids are in the nucleus."""
    generator = torch.Generator().manual_seed(1)
    several = [sampled(seed=i, top_k=k, top_p=top_p) for i, k in enumerate((1, 2, 60, 150, 299))]
    several.append(sampled(seed=9, top_p=top_p))
    several += [sampled(seed=i, top_p=top_p, min_p=1.0) for i in range(8)]  # no more of the ties
    batch = len(several)
    logits = torch.randint(-2, 2, (batch, 1, 300), generator=generator).float()
    logits[:, :, ::7] *= -0.0
    check(backend, make_tree([[0]] * batch, [[-1]] * batch), logits, several)


# --- rows that cannot be used, trees that are none
@pytest.mark.parametrize("has_draft_probs", [False, True])
def test_bad_rows_end_their_sequences_alone(backend: Backend, has_draft_probs: bool) -> None:
    """NaN, +inf or nothing but -inf at the root, at a child, at a node that nobody comes to."""
    several = [SamplingParams(**{"seed": 3, **kind}) for kind in KINDS for _ in range(7)]
    tree, logits, *rest = batch_of(several, 70, 3.0, has_draft_probs)
    spoils = [(0, NAN), (0, INF), (0, -INF), (1, NAN), (2, NAN), (3, INF)]
    for b in range(len(several)):
        for node, value in spoils[b % 7 : b % 7 + 1]:  # of seven one is as it was
            logits[b, node, -1 if value > -INF else slice(None)] = value
            logits[b, node, 0] = value
    want = check(backend, tree, logits, *rest)
    assert -1 in want.accept_length and want.accept_length.max() > -1


@pytest.mark.parametrize("has_draft_probs", [False, True])
def test_trees_and_histories_that_are_none(backend: Backend, has_draft_probs: bool) -> None:
    several = [SamplingParams(**{"seed": 3, **kind}) for kind in KINDS for _ in range(4)]
    tree, logits, params, history, _ = batch_of(several, 70, 3.0, has_draft_probs)
    generator = torch.Generator().manual_seed(2)
    tree.parents[1::2] = torch.randint(-3, 7, tree.parents[1::2].shape, generator=generator).int()
    tree.draft_tokens[2::4, 2:] = i32([-5, 2**31 - 1])
    tree.num_nodes[3::4] = i32([-1, 99, 0, 2**31 - 1, -(2**31)])
    history = [[-1, 70, 2**31 - 1, *h] for h in history]
    check(backend, tree, logits, params, history, [-7] * len(several))


def test_the_largest_trees(backend: Backend) -> None:
    """A chain of all nodes there may be, and a child behind 126 others."""
    nodes = 128
    chain, star = [*range(-1, nodes - 1)], [-1] + [0] * (nodes - 1)
    logits = torch.eye(nodes).roll(1, 1).repeat(2, 1, 1) * 9.0  # after node n its successor
    logits[1, 0] = logits[1, nodes - 2]
    params = [SamplingParams(frequency_penalty=0.5), SamplingParams()]
    tree = make_tree([[*range(nodes)]] * 2, [chain, star])
    want = check(backend, tree, logits, params, has_maxima=(False,))
    assert want.accept_length.tolist() == [nodes - 1, 1]
    assert want.path[1, :2].tolist() == [0, nodes - 1]


# --- the workspace
def test_one_workspace_for_many_calls(backend: Backend) -> None:
    """What one call leaves in it is what the next one needs."""
    batch = len(KINDS)
    kinds = [SamplingParams(**{"seed": 3, **kind}) for kind in KINDS]
    scratch = scratch_on(backend, torch.Size((batch, 4, 500)), True)
    for params in (kinds, kinds[::-1], [SamplingParams()] * batch):
        for has_draft_probs in (True, False):
            args = batch_of(params, 500, 1.0, has_draft_probs)
            args[1][3, 0, 2] = NAN
            check(backend, *args, scratch=scratch)


def test_the_number_of_launches_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    simt = use_simt(1, monkeypatch.setattr)
    backend = Backend("simt", torch.device("cpu"))
    for params in ([SamplingParams()] * 2, [sampled(top_p=0.5), sampled(min_p=0.1)]):
        before = simt.num_launches()
        run(*batch_of(params, 70, 1.0, False), backend=backend)
        assert simt.num_launches() - before == 3


def test_errors_of_a_gpu_name_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    use_simt(1, monkeypatch.setattr)
    backend = Backend("simt", torch.device("cpu"))
    tree, logits = make_tree([[0]], [[-1]]), torch.zeros(1, 1, 8)
    for scratch in (torch.zeros(0), torch.zeros(100), torch.zeros(10**5)[1:]):
        with pytest.raises(ValueError, match="workspace: expected"):
            run(tree, logits, SamplingParams(), backend=backend, scratch=scratch)
    chain = make_tree([[0] * 129], [[*range(-1, 128)]])
    with pytest.raises(ValueError, match="logits: expected at most 128 nodes on a GPU"):
        run(chain, torch.zeros(1, 129, 8), SamplingParams(), backend=backend)


def test_a_vocabulary_too_large_is_refused() -> None:
    logits = untouched(2**31, torch.float32).view(1, 2, 2**30)
    tree = DraftTree(*[torch.zeros(1, 2, dtype=torch.int32)] * 3, torch.zeros(1, 2, 1), i32([2]))
    with pytest.raises(ValueError, match=r"logits: expected a vocabulary below 2\^31 / 2"):
        run(tree, logits, SamplingParams(), backend=CPU)
