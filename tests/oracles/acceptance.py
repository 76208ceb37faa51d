"""Acceptance rules in exact arithmetic: every outcome of a draft tree, with its probability.

A law is a tuple of Fractions over the vocabulary; a target maps a prefix (tuple of tokens) to one.
Texts are compared over a fixed length: what a round leaves open, plain decoding completes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from math import prod

Law = tuple[Fraction, ...]
Target = Callable[[tuple[int, ...]], Law]
Outcomes = dict[tuple[int, ...], Fraction]
Tree = dict[tuple[int, ...], Sequence[int]]  # prefix -> children
# rule(target law, draft law or None, children) -> [(token, child index or None, probability)]
Rule = Callable[[Law, "Law | None", Sequence[int]], list[tuple[int, "int | None", Fraction]]]


def normalize(weights: Sequence[Fraction]) -> Law:
    total = sum(weights)
    return tuple(w / total for w in weights)


def random_law(rng: random.Random, size: int, zeros: int = 0) -> Law:
    weights = [Fraction(rng.randint(1, 9)) for _ in range(size)]
    for v in rng.sample(range(size), zeros):
        weights[v] = Fraction(0)
    return normalize(weights)


def memory_target(seed: int, size: int, zeros: int = 0, **filters: object) -> Target:
    """Another law after every prefix."""

    def target(prefix: tuple[int, ...]) -> Law:
        law = random_law(random.Random(f"{seed}:{prefix}"), size, zeros)
        return filtered(law, **filters) if filters else law

    return target


def filtered(
    law: Law, top_k: int = 0, top_p: Fraction = Fraction(1), min_p: Fraction = Fraction(0)
):
    """Top-k with ties kept, top-p over what is left (larger first, then lower id), min-p."""
    kept = set(range(len(law)))
    if 0 < top_k < len(law):
        kth = sorted(law, reverse=True)[top_k - 1]
        kept = {v for v in kept if law[v] >= kth}
    mass, before, survivors = sum(law[v] for v in kept), Fraction(0), set()
    for v in sorted(kept, key=lambda v: (-law[v], v)):
        if top_p == 1 or before < top_p * mass:
            survivors.add(v)
        before += law[v]
    kept = {v for v in survivors if law[v] >= min_p * max(law)}
    return normalize([law[v] if v in kept else Fraction(0) for v in range(len(law))])


def sampled_verify(p: Law, q: Law | None, children: Sequence[int]):
    """Draw from the target, look the token up."""
    lookup = {token: i for i, token in reversed(list(enumerate(children)))}
    return [(v, lookup.get(v), mass) for v, mass in enumerate(p) if mass]


def rejection(p: Law, q: Law | None, children: Sequence[int]):
    """min(1, p/q) child by child, p becoming the residual after each rejection. A child that its
    own law excludes was not drawn from it and is passed over."""
    outcomes, reach = [], Fraction(1)
    for i, x in enumerate(children):
        if not q[x]:
            continue
        ratio = min(Fraction(1), p[x] / q[x])
        if ratio:
            outcomes.append((x, i, reach * ratio))
        reach *= 1 - ratio
        if reach == 0:
            return outcomes
        p = normalize([max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)])
    return outcomes + [(v, None, reach * mass) for v, mass in enumerate(p) if mass]


def rejection_without_update(p: Law, q: Law | None, children: Sequence[int]):
    """WRONG, and shipped by others: siblings tested against the first law."""
    outcomes, reach = [], Fraction(1)
    for i, x in enumerate(children):
        ratio = min(Fraction(1), p[x] / q[x])
        outcomes.append((x, i, reach * ratio))
        reach *= 1 - ratio
    if reach == 0:
        return outcomes
    rest = [max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]
    rest = normalize(rest) if sum(rest) else p
    return outcomes + [(v, None, reach * mass) for v, mass in enumerate(rest) if mass]


def rejection_by_one_uniform(p: Law, q: Law | None, children: Sequence[int]):
    """WRONG: all siblings are tested with the same uniform, so one is accepted only where its ratio
    is above those before it."""
    outcomes, reach = [], Fraction(0)
    for i, x in enumerate(children):
        ratio = min(Fraction(1), p[x] / q[x])
        outcomes.append((x, i, max(ratio - reach, Fraction(0))))
        reach = max(reach, ratio)
        if reach == 1:
            return outcomes
        p = normalize([max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)])
    return outcomes + [(v, None, (1 - reach) * mass) for v, mass in enumerate(p) if mass]


def rejection_closed(p: Law, q: Law | None, children: Sequence[int], steps: int = 4):
    """WRONG: uniforms 0, 1/steps, ... tested with u * q <= p, so u = 0 accepts probability 0."""
    outcomes, reach = [], Fraction(1)
    for i, x in enumerate(children):
        hits = sum(Fraction(u, steps) * q[x] <= p[x] for u in range(steps))
        outcomes.append((x, i, reach * Fraction(hits, steps)))
        reach *= 1 - Fraction(hits, steps)
        if reach == 0:
            return outcomes
        p = normalize([max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)])
    return outcomes + [(v, None, reach * mass) for v, mass in enumerate(p) if mass]


def plain(target: Target, length: int, prefix: tuple[int, ...] = ()) -> Outcomes:
    """The target's own law over texts of ``length`` more tokens."""
    if length == 0:
        return {(): Fraction(1)}
    out: Outcomes = {}
    for token, mass in enumerate(target(prefix)):
        if not mass:
            continue
        for rest, share in plain(target, length - 1, (*prefix, token)).items():
            out[(token, *rest)] = out.get((token, *rest), Fraction(0)) + mass * share
    return out


def emitted(
    target: Target,
    rule: Rule,
    tree: Tree,
    draft: Target | None,
    prefix: tuple[int, ...] = (),
    bonus: Target | None = None,
) -> Outcomes:
    """What a round over a tree gives: the accepted tokens and the one behind them.

    ``bonus`` is the law used at nodes without children; the target's if not given.
    """
    children = tree.get(prefix, ())
    law = target(prefix) if children or bonus is None else bonus(prefix)
    q = draft(prefix) if draft and children else None
    out: Outcomes = {}
    for token, child, mass in (rule if children else sampled_verify)(law, q, children):
        after = (*prefix, token)
        rest_law = {(): Fraction(1)}
        if child is not None:
            rest_law = emitted(target, rule, tree, draft, after, bonus)
        for rest, share in rest_law.items():
            text = (token, *rest)
            out[text] = out.get(text, Fraction(0)) + mass * share
    return {text: mass for text, mass in out.items() if mass}


def one_round(
    target: Target,
    rule: Rule,
    tree: Tree,
    draft: Target | None,
    length: int,
    bonus: Target | None = None,
) -> Outcomes:
    """What a round gives, cut to ``length`` or completed to it by plain decoding."""
    out: Outcomes = {}
    for text, mass in emitted(target, rule, tree, draft, bonus=bonus).items():
        for rest, share in plain(target, max(length - len(text), 0), text).items():
            whole = (*text, *rest)[:length]
            out[whole] = out.get(whole, Fraction(0)) + mass * share
    return out


def drawn_trees(
    draft: Target, widths: Sequence[int], prefix: tuple[int, ...] = ()
) -> Iterator[tuple[Tree, Fraction]]:
    """Every tree that has ``widths[depth]`` independent draws below each node, with its chance.

    Siblings that are equal have one subtree, since only the first of them can be accepted.
    """
    if not widths:
        yield {}, Fraction(1)
        return
    law = draft(prefix)
    for children in product([v for v, mass in enumerate(law) if mass], repeat=widths[0]):
        below = [list(drawn_trees(draft, widths[1:], (*prefix, v))) for v in set(children)]
        for parts in product(*below):
            tree: Tree = {prefix: children}
            for part, _ in parts:
                tree |= part
            yield tree, prod([law[v] for v in children] + [chance for _, chance in parts])


def over_drawn_trees(
    target: Target, rule: Rule, draft: Target, widths: Sequence[int], length: int
) -> Outcomes:
    """The mean of ``one_round`` over all draws of a tree."""
    out: Outcomes = {}
    for tree, chance in drawn_trees(draft, widths):
        for text, mass in one_round(target, rule, tree, draft, length).items():
            out[text] = out.get(text, Fraction(0)) + chance * mass
    return {text: mass for text, mass in out.items() if mass}
