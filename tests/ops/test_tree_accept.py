"""The acceptance kernel: its law by frequency, its draws bit by bit, and every known trap."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import pytest
import torch
from transformers.generation import logits_process as hf

from specrt import _C
from specrt.accept import accept
from specrt.ops import Purpose, gumbel_noise
from specrt.ops.tree_accept import workspace_size
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import AcceptResult, DraftTree
from tests.oracles import acceptance as rules

INF, NAN = math.inf, math.nan


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


def run(tree, logits, params, history=None, prompt_len=None, **kw) -> AcceptResult:
    batch, vocab = logits.shape[0], logits.shape[2]
    params = [params] * batch if isinstance(params, SamplingParams) else params
    history = [[0]] * batch if history is None else history
    width = max(len(h) for h in history)
    padded = i32([h + [-7] * (width - len(h)) for h in history])
    lens = [len(h) for h in history]
    table = SamplingTable.build(params, prompt_len or lens, vocab)
    return accept(tree, logits, table, padded, i32(lens), **kw)


def processed(logits, params, history, prompt_len) -> torch.Tensor:
    vocab = logits.shape[0]
    table = SamplingTable.build([params], [prompt_len], vocab)
    one, out = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, vocab), NAN)
    _C.processed_logits(
        out, one, one - 1, one[0] + 1, None, logits.view(1, 1, -1), table.rows, table.bias_ids,
        table.bias_values, i32([history]), i32([len(history)]),
        torch.full((1, workspace_size(vocab)), NAN), one.clone(), one[0].clone(), one.clone(), None,
    )  # fmt: skip
    return out[0]


# --- randomness ------------------------------
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


# --- processing against transformers ------------------------------
def by_transformers(logits, p: SamplingParams, history, prompt_len) -> torch.Tensor:
    ids, scores = torch.tensor([history]), logits[None].clone()
    if p.logit_bias:
        bias = {(token,): float(value) for token, value in p.logit_bias.items()}
        scores = hf.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if p.repetition_penalty != 1.0:
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
    flat = torch.zeros(1000)
    kept = processed(flat, SamplingParams(temperature=1.0, seed=0, top_p=0.25), [0], 1) > -INF
    assert kept[:249].all() and not kept[251:].any()


# --- the law, by frequency ------------------------------
DRAWS = 20_000


def assert_law(tokens: torch.Tensor, law: rules.Law) -> None:
    """Chi-square; a correct kernel fails with probability 1e-6, but the seeds are fixed."""
    observed = torch.bincount(tokens.long(), minlength=len(law)).double()
    expected = torch.tensor([float(mass) for mass in law], dtype=torch.float64) * len(tokens)
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    k = max(1, int(kept.sum()) - 1)
    # Wilson-Hilferty quantile at 1 - 1e-6 (z = 4.7534).
    assert chi2 < k * (1 - 2 / (9 * k) + 4.7534 * math.sqrt(2 / (9 * k))) ** 3


LAW = rules.normalize([Fraction(n) for n in (3, 9, 1, 5, 2, 4)])
DRAFT = rules.normalize([Fraction(n) for n in (5, 2, 6, 1, 3, 0)])
LAWS = [
    {},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"top_k": 4, "top_p": 0.8},
]


def exact_law(filters: dict) -> rules.Law:
    return rules.filtered(
        LAW, **{k: v if k == "top_k" else Fraction(str(v)) for k, v in filters.items()}
    )


def draw_many(filters, tokens, parents, draft_probs=None, temperature=1.0) -> AcceptResult:
    """One batch row per seed; every node has LAW's logits, so each emitted token follows it."""
    nodes = len(parents)
    logits = torch.tensor([math.log(mass) for mass in LAW]) * temperature
    tree = make_tree([[0] * nodes] * DRAWS, [parents] * DRAWS, draft_probs=draft_probs)
    tree.draft_tokens.copy_(torch.as_tensor(tokens))
    params = [
        SamplingParams(temperature=temperature, seed=seed, **filters) for seed in range(DRAWS)
    ]
    return run(tree, logits.expand(DRAWS, nodes, -1), params)


@pytest.mark.parametrize("filters", LAWS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_seeded_tree_law(filters: dict, temperature: float) -> None:
    result = draw_many(filters, [0, 1, 3, 1, 0], [-1, 0, 0, 1, 2], temperature=temperature)
    assert_law(result.tokens[:, 0], exact_law(filters))
    second = result.tokens[:, 1]  # the bonus, or an inner node's token: same law
    assert_law(second[second >= 0], exact_law(filters))


@pytest.mark.parametrize("filters", LAWS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_rejection_law(filters: dict, width: int) -> None:
    q = torch.tensor([float(mass) for mass in DRAFT])
    generator = torch.Generator().manual_seed(width)
    children = torch.multinomial(q.expand(DRAWS, -1), width, True, generator=generator)
    tokens = torch.cat([torch.zeros(DRAWS, 1, dtype=torch.int64), children], 1)
    probs = q.expand(DRAWS, width + 1, -1)
    result = draw_many(filters, tokens, [-1] + [0] * width, probs)
    assert_law(result.tokens[:, 0], exact_law(filters))
    second = result.tokens[:, 1]
    assert_law(second[second >= 0], exact_law(filters))  # the bonus behind an accepted child
    if width == 1:
        rate = sum(min(p, d) for p, d in zip(exact_law(filters), DRAFT, strict=True))
        got = (result.accept_length == 1).double().mean().item()
        assert abs(got - float(rate)) < 5 * math.sqrt(0.25 / DRAWS)


def test_a_tree_without_nodes_draws_the_seeded_token_despite_draft_probs() -> None:
    q = torch.tensor([float(mass) for mass in DRAFT]).expand(DRAWS, 1, -1)
    assert torch.equal(draw_many({}, [0], [-1], q).tokens, draw_many({}, [0], [-1]).tokens)


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


# --- traps ------------------------------
def test_greedy_takes_the_lowest_id_on_ties_anywhere_in_the_row() -> None:
    for vocab in (1, 5, 63, 64, 65, 200, 4099):
        for first in {0, vocab // 2, vocab - 1}:
            logits = torch.full((1, 1, vocab), -3.0)
            logits[0, 0, first:] = 1.0
            assert run(make_tree([[0]], [[-1]]), logits, SamplingParams()).tokens.item() == first


def test_a_masked_child_is_never_accepted() -> None:
    """Probability 0 under the target, certain under the draft: no uniform may accept it."""
    q = torch.zeros(6)
    q[1] = 1.0
    tokens, parents = [0, 1, 1], [-1, 0, 0]
    result = draw_many({"logit_bias": {1: -INF}}, tokens, parents, q.expand(DRAWS, 3, -1))
    assert (result.accept_length == 0).all() and not (result.tokens[:, 0] == 1).any()


@pytest.mark.parametrize("scale", [1.0, 1.0 + 2**-22])
def test_equal_laws_always_accept(scale: float) -> None:
    """Also where the draft's probability was rounded above 1."""
    q = torch.zeros(6)
    q[1] = scale
    result = draw_many({"top_k": 1}, [0, 1], [-1, 0], q.expand(DRAWS, 2, -1))
    assert (result.accept_length == 1).all()


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0, NAN, INF])
def test_empty_residual_and_broken_draft_laws_stay_in_the_kept_set(value: float) -> None:
    q = torch.full((6,), value)
    result = draw_many({"top_k": 2}, [0, 2, 2, 0], [-1, 0, 0, 0], q.expand(DRAWS, 4, -1))
    assert set(result.tokens[:, 0].tolist()) <= {1, 3}


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


def test_masked_tokens_are_fine() -> None:
    logits = torch.full((1, 1, 100), -INF)
    logits[0, 0, 97] = -50.0
    for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=2, top_k=5, top_p=0.5)):
        assert run(make_tree([[0]], [[-1]]), logits, params).tokens.item() == 97


def test_unequal_paths_duplicates_and_padding_in_one_batch() -> None:
    logits = torch.zeros(3, 4, 8)
    for node, token in enumerate([1, 2, 3, 4]):
        logits[:, node, token] = 5.0
    tree = make_tree(
        [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 1, 2]], [[-1, 0, 1, 2]] * 2 + [[-1, 0, 0, 1]], [4, 2, 4]
    )
    result = run(tree, logits, SamplingParams(), want_logprobs=True)
    assert result.accept_length.tolist() == [3, 1, 2]
    assert result.path.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [0, 1, 3, -1]]
    assert result.tokens.tolist() == [[1, 2, 3, 4], [1, 2, -1, -1], [1, 2, 4, -1]]
    assert torch.equal(result.logprobs.isnan(), result.tokens < 0)


def test_logprobs_are_of_the_unprocessed_law() -> None:
    logits = torch.randn(1, 1, 1003, generator=torch.Generator().manual_seed(5)) * 4
    params = SamplingParams(temperature=0.5, seed=1, top_k=10, logit_bias={1: 40.0})
    result = run(make_tree([[0]], [[-1]]), logits, params, want_logprobs=True)
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


def test_errors_name_the_argument() -> None:
    tree, logits = make_tree([[0]], [[-1]]), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="logits: expected"):
        run(tree, logits.double(), SamplingParams())
    with pytest.raises(ValueError, match="draft_tokens: expected"):
        run(make_tree([[0, 1]], [[-1, 0]]), logits, SamplingParams())
    table = SamplingTable.build([SamplingParams()] * 2, [1, 1], 8)
    with pytest.raises(ValueError, match=r"sampling: expected \[B, 8\]"):
        accept(tree, logits, table, i32([[0]]), i32([1]))
