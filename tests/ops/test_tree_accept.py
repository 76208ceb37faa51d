"""The acceptance kernel: its draws bit by bit, and every known trap."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from transformers.generation import logits_process as hf

from specrt import _C
from specrt.accept import accept
from specrt.ops import TileMaxima, gumbel_noise
from specrt.ops.tree_accept import gpu_workspace_size, workspace_parts, workspace_size
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import AcceptResult, DraftTree
from tests.ops.conftest import Backend
from tests.oracles.tile_maxima import tile_maxima

INF, NAN = math.inf, math.nan
CPU = Backend("cpu", torch.device("cpu"))


def i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_tree(tokens, parents, num_nodes=None, draft_probs=None) -> DraftTree:
    tokens, parents = i32(tokens), i32(parents)
    batch, nodes = tokens.shape
    depth = torch.zeros_like(tokens)
    for j in range(1, nodes):
        depth[:, j] = depth.gather(1, parents[:, j : j + 1].long().clamp(min=0))[:, 0] + 1
    ancestors = torch.zeros(batch, nodes, (nodes + 63) // 64, dtype=torch.int64)  # not read
    count = i32([nodes] * batch if num_nodes is None else num_nodes)
    return DraftTree(tokens, parents, depth, ancestors, count, draft_probs)


def on(backend: Backend, tensors: object) -> object:
    """A tree or a table, where the backend has its tensors."""
    found = {n: x for n, x in vars(tensors).items() if isinstance(x, torch.Tensor)}
    return replace(tensors, **{n: x.to(backend.device) for n, x in found.items()})


def scratch_on(backend: Backend, shape: torch.Size, has_draft_probs: bool) -> torch.Tensor | None:
    if not backend.runs_cuda_source:
        return None
    return torch.zeros(
        gpu_workspace_size(*shape, has_draft_probs=has_draft_probs), device=backend.device
    )


def maxima_on(backend, tree, logits, table, history_len) -> TileMaxima:
    """What the product that made the logits would have left; nodes may be none."""
    depth = torch.zeros_like(tree.parents)
    for b, parents in enumerate(tree.parents.tolist()):
        for node in range(len(parents)):
            at = node
            while at > 0 and 0 <= parents[at] < at:
                at = parents[at]
                depth[b, node] += 1
    keys = tile_maxima(logits.flatten(0, 1), table.rows.cpu(), history_len, depth)
    lens = history_len.to(backend.device)
    return TileMaxima(keys.to(backend.device), table.rows, lens, depth.to(backend.device))


def run(
    tree, logits, params, history=None, prompt_len=None, backend=CPU, scratch=None,
    has_maxima=False, **kw,
) -> AcceptResult:  # fmt: skip
    batch, vocab = logits.shape[0], logits.shape[2]
    params = [params] * batch if isinstance(params, SamplingParams) else params
    history = [[0]] * batch if history is None else history
    width = max(len(h) for h in history)
    padded = i32([h + [-7] * (width - len(h)) for h in history]).to(backend.device)
    lens = [len(h) for h in history]
    table = on(backend, SamplingTable.build(params, prompt_len or lens, vocab))
    if scratch is None:
        scratch = scratch_on(backend, logits.shape, tree.draft_probs is not None)
    maxima = maxima_on(backend, tree, logits, table, i32(lens)) if has_maxima else None
    result = accept(
        on(backend, tree), backend.hold(logits), table, padded, i32(lens).to(backend.device),
        workspace=scratch, maxima=maxima, **kw,
    )  # fmt: skip
    return on(CPU, result)


def processed(logits, params, history, prompt_len) -> torch.Tensor:
    vocab = logits.shape[0]
    table = SamplingTable.build([params], [prompt_len], vocab)
    one, out = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, vocab), NAN)
    _C.processed_logits(
        out, one, one - 1, one[0] + 1, None, logits.view(1, 1, -1), table.rows, table.bias_ids,
        table.bias_values, i32([history]), i32([len(history)]),
        torch.full((1, workspace_size(vocab)), NAN), one.clone(), one[0].clone(), one.clone(),
        None, None, None, None,
    )  # fmt: skip
    return out[0]


# --- processing against transformers ------------------------------
def by_transformers(logits, p: SamplingParams, history, prompt_len) -> torch.Tensor:
    ids, scores = torch.tensor([history]), logits[None].clone()
    if p.logit_bias:
        bias = {(token,): float(value) for token, value in p.logit_bias.items()}
        scores = hf.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if p.repetition_penalty is not None:
        scores = hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
    counts = torch.bincount(
        torch.tensor(history[prompt_len:], dtype=torch.int64), minlength=len(logits)
    )
    scores = scores - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)
    if p.is_greedy:
        return scores[0]
    scores = hf.TemperatureLogitsWarper(p.temperature)(ids, scores)
    if p.top_k:
        scores = hf.TopKLogitsWarper(p.top_k)(ids, scores)
    if p.top_p < 1.0:
        scores = hf.TopPLogitsWarper(p.top_p)(ids, scores)
    if p.min_p > 0.0:
        scores = hf.MinPLogitsWarper(p.min_p)(ids, scores)
    return scores[0]


EDITS = [
    {},
    {"logit_bias": {3: 2.5, 7: -INF}},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": -0.25},
    {
        "logit_bias": {3: 2.5},
        "repetition_penalty": 0.8,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.2,
    },
]
FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 33, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("vocab", [11, 100, 1003])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("edits", EDITS, ids=str)
def test_processing_equals_transformers(edits, filters, vocab) -> None:
    generator = torch.Generator().manual_seed(vocab)
    params = SamplingParams(**{"temperature": 1.0, "seed": 0, **edits, **filters})
    for _ in range(4):
        logits = torch.randn(vocab, generator=generator) * 3
        history = torch.randint(0, vocab, (30,), generator=generator).tolist()
        got, want = (
            processed(logits, params, history, 12),
            by_transformers(logits, params, history, 12),
        )
        assert torch.equal(got == -INF, want == -INF)
        torch.testing.assert_close(got, want, rtol=3e-7, atol=1e-6)


def test_top_k_keeps_ties_and_top_p_breaks_them_by_id() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, -1.0])
    kept = processed(logits, SamplingParams(temperature=1.0, seed=0, top_k=2), [0], 1) > -INF
    assert kept.tolist() == [False, True, True, False, True, False]
    kept = (
        processed(logits, SamplingParams(temperature=1.0, seed=0, top_k=2, top_p=0.5), [0], 1)
        > -INF
    )
    assert kept.tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("vocab", [4, 8, 64, 1024])
def test_the_nucleus_ends_where_its_mass_is_exactly_top_p(vocab: int, top_p: float) -> None:
    params = SamplingParams(temperature=1.0, seed=0, top_p=top_p)
    flat = torch.zeros(vocab)
    kept, theirs = (f(flat, params, [0], 1) > -INF for f in (processed, by_transformers))
    assert kept.tolist() == [v < top_p * vocab for v in range(vocab)]  # of equals the lowest ids
    assert kept.sum() == theirs.sum()


@pytest.mark.parametrize("favourite", [0, 1, 2])
def test_a_favourite_of_exactly_top_p_is_alone(favourite: int) -> None:
    weight = _C.exp_of(-0.25)
    top_p = 1.0 / (1.0 + 2.0 * weight)
    assert top_p * (1.0 + 2.0 * weight) == 1.0
    logits = torch.full((3,), -0.25)
    logits[favourite] = 0.0
    params = SamplingParams(temperature=1.0, seed=0, top_p=top_p)
    assert (processed(logits, params, [0], 1) > -INF).nonzero().tolist() == [[favourite]]


# --- the same text with any tree ------------------------------
VOCAB = 70


def fake_model(prefix: list[int]) -> torch.Tensor:
    digest = hashlib.sha256(str(prefix).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(VOCAB, generator=generator) * 2


def random_tree(rng: torch.Generator, nodes: int, prefix: list[int], is_useful: bool):
    tokens, parents, prefixes = [prefix[-1]], [-1], [prefix]
    for j in range(1, nodes):
        parent = int(torch.randint(0, j, (1,), generator=rng))
        likely = fake_model(prefixes[parent]).topk(3).indices
        token = int(likely[torch.randint(0, 3, (1,), generator=rng)])
        if not is_useful:
            token = int(torch.randint(-1, VOCAB + 5, (1,), generator=rng))
        tokens.append(token)
        parents.append(parent)
        prefixes.append([*prefixes[parent], token])
    return tokens, parents, prefixes


def generate(all_params, prompts, length: int, nodes: int, is_useful=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    texts, accepted = [list(p) for p in prompts], 0
    lens = [len(p) for p in prompts]
    while any(len(t) < n + length for t, n in zip(texts, lens, strict=True)):
        trees = [random_tree(rng, nodes, text, is_useful) for text in texts]
        logits = torch.stack([torch.stack([fake_model(p) for p in tree[2]]) for tree in trees])
        tree = make_tree([t[0] for t in trees], [t[1] for t in trees])
        result = run(tree, logits, all_params, texts, lens)
        for b, text in enumerate(texts):
            count = int(result.accept_length[b]) + 1
            text += result.tokens[b, :count].tolist()
            accepted += count - 1
    return [t[: n + length] for t, n in zip(texts, lens, strict=True)], accepted


@pytest.mark.parametrize("is_useful", [True, False])
@pytest.mark.parametrize("nodes", [4, 17])
def test_text_depends_on_the_seed_alone(nodes: int, is_useful: bool) -> None:
    """Greedy, sampled and penalised sequences in one batch, against one-node decoding alone."""
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=3, top_p=0.9),
        SamplingParams(**penalties),
        SamplingParams(temperature=1.1, seed=9, top_k=20, logit_bias={5: 1.5}, **penalties),
    ]
    prompts = [[1], [2, 3], [4, 4, 5], [6, 7]]
    texts, accepted = generate(params, prompts, 20, nodes, is_useful, seed=nodes)
    assert accepted > 10 or not is_useful
    for b in range(len(params)):
        alone, _ = generate(params[b], prompts[b : b + 1], 20, 1)
        assert texts[b] == alone[0]


# --- penalties of the tree's own tokens ------------------------------
@pytest.mark.parametrize("mode", ["greedy", "sampled", "rejection"])
@pytest.mark.parametrize(
    ("penalty", "logit", "token"),
    [
        ({"frequency_penalty": 1.0}, 6.5, 2),
        ({"presence_penalty": 1.0}, 5.5, 2),
        ({"presence_penalty": 1.0}, 6.5, 1),  # however often
        ({"repetition_penalty": 2.0}, 9.0, 2),
        ({"repetition_penalty": 2.0}, 11.0, 1),
    ],
    ids=str,
)
def test_penalties_count_ancestors_and_nobody_else(
    backend: Backend, penalty, logit, token, mode: str
) -> None:
    """At the end of the path 1, 1: tokens 2 and 3 are siblings of these, and 4 is a child."""
    tokens, parents = [[0, 1, 2, 1, 3, 4]], [[-1, 0, 0, 1, 1, 3]]
    logits = torch.zeros(1, 6, 6)
    logits[0, :2, 1] = 99.0
    logits[0, 3, 1:4] = torch.tensor([logit, 5.0, 4.6])
    probs = torch.full_like(logits, 1 / 6) if mode == "rejection" else None
    temperature = 0.0 if mode == "greedy" else 0.01  # no noise outweighs 0.4
    params = SamplingParams(temperature=temperature, seed=1, **penalty)
    tree = make_tree(tokens, parents, draft_probs=probs)
    result = run(tree, logits, params, [[5, 0]], [1], backend)
    assert result.tokens[0, :3].tolist() == [1, 1, token]
    assert result.path[0, :3].tolist() == [0, 1, 3]


# --- traps ------------------------------
@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 200, 4099, 8193])
def test_greedy_takes_the_lowest_id_on_ties_anywhere_in_the_row(
    backend: Backend, vocab: int
) -> None:
    firsts = sorted({0, vocab // 2, vocab - 1})
    logits = torch.full((len(firsts), 1, vocab), -3.0)
    for row, first in zip(logits[:, 0], firsts, strict=True):
        row[first:] = 0.0
        row[first + 1 :: 2] = -0.0  # ties with 0
    tree = make_tree([[0]] * len(firsts), [[-1]] * len(firsts))
    assert run(tree, logits, SamplingParams(), backend=backend).tokens[:, 0].tolist() == firsts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF, "masked"])
@pytest.mark.parametrize("vocab", [7, 100])
def test_a_bad_row_ends_its_sequence_only(bad, vocab: int, temperature: float) -> None:
    logits = torch.randn(3, 2, vocab, generator=torch.Generator().manual_seed(0))
    tree = make_tree([[0, 1]] * 3, [[-1, 0]] * 3)
    params = SamplingParams(temperature=temperature, seed=1)
    good = run(tree, logits, params)
    for column in range(vocab):
        broken = logits.clone()
        if bad == "masked":
            broken[1, 0] = -INF
        else:
            broken[1, 0, column] = bad
        result = run(tree, broken, params, want_logprobs=True)
        assert result.accept_length[1] == -1 and (result.tokens[1] == -1).all()
        assert (result.path[1] == -1).all() and result.logprobs[1].isnan().all()
        for b in (0, 2):
            assert torch.equal(result.tokens[b], good.tokens[b])
    off_path = logits.clone()
    off_path[:, 1] = torch.where(good.accept_length.view(-1, 1) == 0, NAN, off_path[:, 1])
    assert torch.equal(run(tree, off_path, params).tokens, good.tokens)


def test_masked_tokens_are_fine(backend: Backend) -> None:
    logits = torch.full((3, 1, 100), -INF)
    logits[:, 0, 97] = -50.0
    filters = {"top_k": 5, "top_p": 0.5}, {"top_k": 5}
    params = [SamplingParams(), *(SamplingParams(temperature=1.0, seed=2, **f) for f in filters)]
    tree = make_tree([[0]] * 3, [[-1]] * 3)
    assert run(tree, logits, params, backend=backend).tokens[:, 0].tolist() == [97] * 3


def test_unequal_paths_duplicates_and_padding_in_one_batch(backend: Backend) -> None:
    logits = torch.zeros(3, 4, 8)
    for node, token in enumerate([1, 2, 3, 4]):
        logits[:, node, token] = 5.0
    tree = make_tree(
        [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 1, 2]], [[-1, 0, 1, 2]] * 2 + [[-1, 0, 0, 1]], [4, 2, 4]
    )
    result = run(tree, logits, SamplingParams(), backend=backend, want_logprobs=True)
    assert result.accept_length.tolist() == [3, 1, 2]
    assert result.path.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [0, 1, 3, -1]]
    assert result.tokens.tolist() == [[1, 2, 3, 4], [1, 2, -1, -1], [1, 2, 4, -1]]
    assert torch.equal(result.logprobs.isnan(), result.tokens < 0)


def test_logprobs_are_of_the_unprocessed_law(backend: Backend) -> None:
    logits = torch.randn(1, 1, 1003, generator=torch.Generator().manual_seed(5)) * 4
    params = SamplingParams(temperature=0.5, seed=1, top_k=10, logit_bias={1: 40.0})
    tree = make_tree([[0]], [[-1]])
    result = run(tree, logits, params, backend=backend, want_logprobs=True)
    assert result.tokens.item() == 1
    want = logits[0, 0].double().log_softmax(0)[1].item()
    assert result.logprobs.item() == pytest.approx(want, rel=1e-6)


def mixed_batch(batch: int = 6, nodes: int = 5, vocab: int = 3001):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(batch, nodes, vocab, generator=generator) * 3
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.3, seed=1),
        SamplingParams(temperature=0.7, seed=2, top_p=0.8, repetition_penalty=1.4),
        SamplingParams(temperature=0.9, seed=3, top_k=17, min_p=0.01),
        SamplingParams(frequency_penalty=1.0),
        SamplingParams(temperature=1.0, seed=4, top_k=100, top_p=0.95),
    ]
    q = logits.roll(1, 1).softmax(-1)
    tokens = torch.cat([torch.zeros(batch, 1), logits[:, :-1].argmax(-1).float()], 1).int().tolist()
    return make_tree(tokens, [[-1, 0, 1, 2, 3]] * batch, draft_probs=q), logits, params


@pytest.mark.parametrize("uses_draft_probs", [False, True])
def test_instruction_sets_and_threads_give_the_same_bits(uses_draft_probs: bool) -> None:
    tree, logits, params = mixed_batch()
    if not uses_draft_probs:
        tree = DraftTree(
            tree.draft_tokens, tree.parents, tree.depth, tree.ancestors, tree.num_nodes
        )
    active, threads = _C.active_isa(), torch.get_num_threads()
    want = run(tree, logits, params, want_logprobs=True)
    try:
        for isa in _C.build_info()["cpu_isas"]:
            for count in (1, 2, 3, 8):
                _C.set_isa(isa)
                torch.set_num_threads(count)
                got = run(tree, logits, params, want_logprobs=True)
                assert torch.equal(got.tokens, want.tokens) and torch.equal(got.path, want.path)
                assert torch.equal(got.logprobs.nan_to_num(), want.logprobs.nan_to_num())
    finally:
        _C.set_isa(active)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_pruning_does_not_change_the_draw(scale: float) -> None:
    for seed in range(50):
        row = torch.randn(5003, generator=torch.Generator().manual_seed(seed)) * scale
        got = run(
            make_tree([[0]], [[-1]]), row.view(1, 1, -1), SamplingParams(temperature=1.0, seed=seed)
        )
        assert got.tokens.item() == (row + gumbel_noise(seed, 1, 5003)).argmax().item()


def test_errors_name_the_argument(backend: Backend) -> None:
    tree, logits = make_tree([[0]], [[-1]]), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="logits: expected"):
        run(tree, logits.double(), SamplingParams(), backend=backend)
    with pytest.raises(ValueError, match="draft_tokens: expected"):
        run(make_tree([[0, 1]], [[-1, 0]]), logits, SamplingParams(), backend=backend)
    table = on(backend, SamplingTable.build([SamplingParams()] * 2, [1, 1], 8))
    ones = i32([1]).to(backend.device)
    with pytest.raises(ValueError, match=r"sampling: expected \[B, 8\]"):
        accept(on(backend, tree), logits.to(backend.device), table, ones[None], ones)


def test_many_walks_share_the_scratch_of_threads() -> None:
    """But for those of a large vocabulary, whose rows all threads share."""
    threads = torch.get_num_threads()
    assert workspace_parts(50_000, 32_000) == threads
    assert workspace_parts(5, 128_256) == 5
    assert workspace_parts(0, 128_256) == 1
