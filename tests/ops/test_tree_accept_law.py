"""The acceptance kernel's law, by frequency: of seeded draws, and of rejection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import pytest
import torch

from specrt.accept import accept
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import AcceptResult
from tests.ops.test_tree_accept import INF, NAN, make_tree
from tests.oracles import acceptance as rules

DRAWS = 20_000


def assert_law(tokens: torch.Tensor, law: rules.Law) -> None:
    """Chi-square; a correct kernel fails with probability 1e-6, but the seeds are fixed."""
    observed = torch.bincount(tokens.long(), minlength=len(law)).double()
    expected = torch.tensor([float(mass) for mass in law], dtype=torch.float64) * len(tokens)
    assert observed[expected == 0].sum() == 0
    kept, largest = expected >= 5, expected.argmax()
    for counts in (observed, expected):  # what is too rare for the approximation
        counts[largest] += counts[~kept].sum()
    chi2 = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    k = max(1, int(kept.sum()) - 1)
    # Wilson-Hilferty quantile at 1 - 1e-6 (z = 4.7534).
    assert chi2 < k * (1 - 2 / (9 * k) + 4.7534 * math.sqrt(2 / (9 * k))) ** 3


LAW = rules.normalize([Fraction(n) for n in (3, 9, 1, 5, 2, 4)])
DRAFT = rules.normalize([Fraction(n) for n in (5, 2, 6, 1, 3, 0)])
# Under it a sibling that follows a rejected one is neither accepted nor rejected for sure.
DECISIVE = rules.normalize([Fraction(n) for n in (5, 6, 16, 9, 10, 2)])
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


def floats(laws: Sequence[rules.Law]) -> torch.Tensor:
    return torch.tensor([[float(mass) for mass in law] for law in laws])


@cache
def seeded(temperature: float, filters: tuple[tuple[str, float], ...]) -> SamplingTable:
    """A row for each seed."""
    options = {"temperature": temperature, **dict(filters)}
    params = [SamplingParams(seed=seed, **options) for seed in range(DRAWS)]
    return SamplingTable.build(params, [1] * DRAWS, len(LAW))


def draw_many(
    filters, tokens, parents, draft_probs=None, temperature=1.0, laws=None, num_nodes=None
) -> AcceptResult:
    """One batch row per seed. Each node's logits are of its law: LAW, so that each emitted token
    follows it, if ``laws`` names no other; ``draft_probs`` is ``[N, V]``."""
    nodes = len(parents)
    logits = floats(laws or [LAW] * nodes).log() * temperature
    probs = None if draft_probs is None else draft_probs.expand(DRAWS, nodes, -1)
    counts = None if num_nodes is None else [num_nodes] * DRAWS
    tree = make_tree([[0] * nodes] * DRAWS, [parents] * DRAWS, counts, probs)
    tree.draft_tokens.copy_(torch.as_tensor(tokens))
    table = seeded(temperature, tuple(filters.items()))
    ones = torch.ones(DRAWS, dtype=torch.int32)
    return accept(tree, logits.expand(DRAWS, -1, -1), table, ones[:, None], ones)


def drawn_children(law: rules.Law, count: int) -> torch.Tensor:
    """``[DRAWS, 1 + count]``: a root, and tokens drawn from ``law``."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.multinomial(floats([law]).expand(DRAWS, -1), count, True, generator=generator)
    return torch.cat([torch.zeros(DRAWS, 1, dtype=torch.int64), drawn], 1)


@pytest.mark.parametrize("filters", LAWS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_seeded_tree_law(filters: dict, temperature: float) -> None:
    result = draw_many(filters, [0, 1, 3, 1, 0], [-1, 0, 0, 1, 2], temperature=temperature)
    assert_law(result.tokens[:, 0], exact_law(filters))
    second = result.tokens[:, 1]  # the bonus, or an inner node's token: same law
    assert_law(second[second >= 0], exact_law(filters))


def assert_rejection_law(draft: rules.Law, width: int, filters: dict) -> AcceptResult:
    tokens = drawn_children(draft, width)
    result = draw_many(filters, tokens, [-1] + [0] * width, floats([draft]))
    assert_law(result.tokens[:, 0], exact_law(filters))
    second = result.tokens[:, 1]
    assert_law(second[second >= 0], exact_law(filters))  # the bonus behind an accepted child
    return result


@pytest.mark.parametrize("filters", LAWS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_rejection_law(filters: dict, width: int) -> None:
    result = assert_rejection_law(DRAFT, width, filters)
    if width == 1:
        rate = sum(min(p, d) for p, d in zip(exact_law(filters), DRAFT, strict=True))
        got = (result.accept_length == 1).double().mean().item()
        assert abs(got - float(rate)) < 5 * math.sqrt(0.25 / DRAWS)


@pytest.mark.parametrize("width", [2, 4])
def test_rejection_law_where_later_siblings_need_a_uniform(width: int) -> None:
    assert_rejection_law(DECISIVE, width, {})


def test_rejection_law_down_a_chain() -> None:
    """Each depth draws afresh, so the law at one does not depend on what was accepted above."""
    result = draw_many({}, drawn_children(DRAFT, 2), [-1, 0, 1], floats([DRAFT]))
    for depth in range(3):
        tokens = result.tokens[:, depth]
        assert_law(tokens[tokens >= 0], exact_law({}))


def flattened(tree: rules.Tree) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
    """Tokens, parents and prefixes of the nodes, level by level."""
    tokens, parents, prefixes = [0], [-1], [()]
    for node, prefix in enumerate(prefixes):
        for token in tree.get(prefix, ()):
            tokens.append(token)
            parents.append(node)
            prefixes.append((*prefix, token))
    return tokens, parents, prefixes


@pytest.mark.parametrize(
    ("seed", "zeros", "filters"),
    [(10, 0, {}), (58, 1, {}), (199, 2, {"top_k": 4})],
    ids=str,
)
def test_what_a_given_tree_emits_has_the_rules_law(seed: int, zeros: int, filters: dict) -> None:
    """Of whole paths, in a tree that was not drawn: each uniform shows, and each node's laws.

    With laws of these seeds one uniform for all siblings would move 17 % of the mass or more, as
    would accepting what a draft's law excludes, and testing all siblings against the first law.
    """
    tree = {(): [2, 0, 2, 5], (2,): [1, 3], (0,): [4, 4, 1], (5,): [0, 2, 3]}
    target, draft = rules.memory_target(seed, 6, **filters), rules.memory_target(-seed, 6, zeros)
    law = rules.emitted(target, rules.rejection, tree, draft)
    tokens, parents, prefixes = flattened(tree)
    padding = [1, 4]  # below the root, if it were looked at
    laws = [rules.memory_target(seed, 6)(prefix) for prefix in prefixes + [()] * len(padding)]
    probs = floats([draft(prefix) for prefix in prefixes + [()] * len(padding)])
    nodes = tokens + padding, parents + [0] * len(padding)
    result = draw_many(filters, *nodes, probs, laws=laws, num_nodes=len(tokens))
    place = {text: i for i, text in enumerate(law)}
    lengths, texts = result.accept_length.tolist(), result.tokens.tolist()
    outcomes = [
        place[tuple(text[: length + 1])] for text, length in zip(texts, lengths, strict=True)
    ]
    assert_law(torch.tensor(outcomes), tuple(law.values()))
    accepted = result.path[:, 1:] >= 0
    names = torch.tensor(tokens)[result.path[:, 1:].clamp(min=0)]
    assert torch.equal(names[accepted], result.tokens[:, :-1][accepted].long())


@pytest.mark.parametrize(("tokens", "parents"), [([0], [-1]), ([0, 1, 2], [-1, 0, 0])])
def test_a_node_without_children_draws_the_seeded_token_despite_draft_probs(
    tokens: list[int], parents: list[int]
) -> None:
    """Nodes from ``num_nodes`` on are no children."""
    result = draw_many({}, tokens, parents, floats([DRAFT]), num_nodes=1)
    assert torch.equal(result.tokens[:, 0], draw_many({}, [0], [-1]).tokens[:, 0])


def certainly(token: int) -> torch.Tensor:
    """``[1, V]``: a draft's law that is sure."""
    return torch.nn.functional.one_hot(torch.tensor([token]), 6).float()


def test_a_child_that_its_own_law_excludes_is_passed_over() -> None:
    """It was not drawn from that law: to accept it, or to take the law off the target's, biases."""
    result = draw_many({}, [0, 3, 3], [-1, 0, 0], certainly(1))
    assert (result.accept_length == 0).all()
    assert_law(result.tokens[:, 0], exact_law({}))


def test_a_masked_child_is_never_accepted() -> None:
    """Probability 0 under the target, certain under the draft: no uniform may accept it."""
    masked = rules.normalize([Fraction(0) if v == 1 else mass for v, mass in enumerate(LAW)])
    result = draw_many({}, [0, 1, 1], [-1, 0, 0], certainly(1), laws=[masked] * 3)
    assert (result.accept_length == 0).all() and not (result.tokens[:, 0] == 1).any()


@pytest.mark.parametrize("scale", [1.0, 1.0 + 2**-22])
def test_equal_laws_always_accept(scale: float) -> None:
    """Also where the draft's probability was rounded above 1."""
    result = draw_many({"top_k": 1}, [0, 1], [-1, 0], scale * certainly(1))
    assert (result.accept_length == 1).all()


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0, NAN, INF])
def test_empty_residual_and_broken_draft_laws_stay_in_the_kept_set(value: float) -> None:
    law = torch.full((1, 6), value)
    result = draw_many({"top_k": 2}, [0, 2, 2, 0], [-1, 0, 0, 0], law)
    assert set(result.tokens[:, 0].tolist()) <= {1, 3}


def broken(value: float) -> torch.Tensor:
    """``[V]``: DRAFT, one of whose numbers is wrong."""
    law = floats([DRAFT])[0]
    law[4] = value
    return law


@pytest.mark.parametrize("value", [NAN, INF, -0.2, 0.5, 0.0])
def test_from_what_is_no_law_nothing_was_drawn(value: float) -> None:
    """So the token is the seed's, whatever was proposed."""
    result = draw_many({}, [0, 1, 2, 1], [-1, 0, 0, 1], broken(value)[None])
    assert (result.accept_length == 0).all()
    assert torch.equal(result.tokens[:, 0], draw_many({}, [0], [-1]).tokens[:, 0])


def test_a_law_that_is_broken_below_some_draws_does_not_bias() -> None:
    """The children of such a node are cut, and siblings behind them; not what stands before: to
    drop a whole tree for what was drawn would favour the other draws."""
    tokens = drawn_children(DRAFT, 3)  # 1 and 3 are the root's children, 2 that of 1
    probs = floats([DRAFT]).expand(DRAWS, 4, -1).clone()
    probs[tokens[:, 1] == 2, 1] = broken(NAN)
    result = draw_many({}, tokens, [-1, 0, 1, 0], probs)
    is_broken = tokens[:, 1] == 2
    assert (result.path[is_broken] == 1).any() and not (result.path[is_broken] > 1).any()
    assert (result.path[~is_broken] == 2).any() and (result.path[~is_broken] == 3).any()
    for depth in range(2):
        drawn = result.tokens[:, depth]
        assert_law(drawn[drawn >= 0], exact_law({}))


def test_laws_over_another_vocabulary_are_none() -> None:
    result = draw_many({}, [0, 1, 2], [-1, 0, 0], floats([DRAFT])[:, :5])
    assert torch.equal(result.tokens[:, 0], draw_many({}, [0], [-1]).tokens[:, 0])
