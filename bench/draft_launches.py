"""What our drafters launch in a round, one by one: the list that predictions are made of.

FSPAD and EAGLE-2 run their layer once for the accepted pairs, whose last one gives the root's
children (level 0), and once for each level below. EESD runs the target's first layers and an exit
for each token of a chain, and leaves the last token's keys and values for verification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench import limits
from bench.limits import BF16, FLOAT, INT, Model, Work
from bench.round_model import (
    ATTENTION_LATENCY,
    KEY,
    KEYS_TOKENS,
    Launch,
    final_norm,
    head,
    layer_launches,
)

DEPTH, TOP_K = 6, 10
"""Levels, the root's children among them, and children of a node: EAGLE-2's."""
PAIRS = 8
"""Rows for the accepted pairs, a power of two, which level 0 runs as far as keys and values."""
CHAIN = 4
"""Tokens that EESD drafts."""
EXPAND_LATENCY = 4.5e-6
"""Keys of a row's tiles, the tiles that can hold one of the best, those sorted (2.8), and in the
last block of a sequence the frontier and the decision on it."""
RERANK_LATENCY = 2.6e-6
"""Scores, a bound of the best, those in order, their parents and the walk up (``docs/kernels.md``);
the launch comes besides."""
LEVEL, CHILDREN, RERANK, OBSERVE = "a level below", "level 0", "rerank", "observe"
TOKEN, LAST = "a token", "the last token"
_SAMPLING = ("fc", "sample_gate", "sample_up", "sample_down")


@dataclass(frozen=True)
class Draft:
    """An FSPAD (two outputs, feature sampling) or an EAGLE-2 of a target's shape."""

    has_sampling: bool
    is_folded: bool
    """Whether ``fc``'s embedding half and the gate are rows of tables."""
    head_rows: int
    weight_size: int = BF16
    """Bytes of a weight of the drafter's; scales of channels are not counted."""

    def __str__(self) -> str:
        name = "FSPAD" if self.has_sampling else "EAGLE-2"
        fold = "folded" if self.is_folded else "unfolded"
        size = "fp8" if self.weight_size < BF16 else "bf16"
        return f"{name}, {fold}, head of {self.head_rows:,}, {size}"


def matrices(model: Model, draft: Draft) -> Mapping[str, tuple[int, int]]:
    """Outputs and inputs of each that a step multiplies."""
    hidden, wide = model.hidden_size, model.intermediate_size
    q_size, kv_size = (n * model.head_dim for n in (model.num_heads, 2 * model.num_kv_heads))
    found = {"fc": (hidden, hidden if draft.is_folded else 2 * hidden)}
    if draft.has_sampling:
        if not draft.is_folded:
            found["sample_gate"] = wide, hidden
        found |= {"sample_up": (wide, hidden), "sample_down": (hidden, wide)}
    found |= {"qkv": (q_size + kv_size, hidden), "o": (hidden, q_size)}
    found |= {"gate_up": (2 * wide, hidden), "down_predict": (hidden, wide)}
    if draft.has_sampling:
        found["down_regress"] = hidden, wide
    return found | {"head": (draft.head_rows, hidden)}


def weight_bytes(model: Model, draft: Draft) -> int:
    """What a step streams."""
    return draft.weight_size * sum(a * b for a, b in matrices(model, draft).values())


def level_launches(model: Model, draft: Draft, level: int, prefix: int) -> Iterator[Launch]:
    """Of one level.

    Args:
        model: the target's shape.
        draft: the drafter's.
        level: 0 runs all pairs as far as keys and values, and the last of them further.
        prefix: tokens before it.
    """
    stage, rows, pairs = (LEVEL, TOP_K, TOP_K) if level else (CHILDREN, 1, PAIRS)
    norm = limits.rms_norm(model, rows)
    attention = limits.tree_attention(model, 1, prefix, rows, rows * (level + 1))
    for name, (num_outputs, num_inputs) in matrices(model, draft).items():
        num_rows = pairs if name in (*_SAMPLING, "qkv") else rows
        work = limits.linear(num_outputs, num_inputs, num_rows, draft.weight_size)
        if name == "sample_up":
            sampled = limits.rms_norm(model, pairs)
            yield Launch(stage, "sample_norm", sampled, is_before_linear=True)
        if name == "o":
            # Of level 0 the earlier pairs' and the last one's.
            appended = limits.rope_append(model, pairs)
            yield Launch(stage, "rope_append", appended, 1 if level else 2)
            yield Launch(stage, "tree_attention", attention, latency=ATTENTION_LATENCY)
        if name == "gate_up":
            yield Launch(stage, "rms_norm", norm, is_before_linear=True)
        if name == "head":  # whose output is float32
            work = replace(work, num_bytes=work.num_bytes + rows * num_outputs * BF16)
        yield Launch(stage, name, work, is_linear=True)
    yield expand(stage, rows, draft.head_rows, is_before_linear=level < DEPTH - 1)


def expand(stage: str, rows: int, head_rows: int, *, is_before_linear: bool) -> Launch:
    """Of the tiles that can hold one of a row's best, of which the head has left the keys."""
    tiles = rows * -(-head_rows // KEYS_TOKENS)
    work = Work(tiles * (KEY + FLOAT) + rows * TOP_K * (KEYS_TOKENS * FLOAT + 2 * INT + FLOAT))
    return Launch(stage, "tree_expand", work, 1, EXPAND_LATENCY, is_before_linear=is_before_linear)


def rerank(nodes: int) -> Launch:
    """The best of all that was scored."""
    pool = TOP_K + (DEPTH - 1) * TOP_K**2
    work = Work(pool * FLOAT + 2 * nodes * (2 * INT + FLOAT))
    return Launch(RERANK, "tree_rerank", work, latency=RERANK_LATENCY)


def fspad_launches(model: Model, draft: Draft, nodes: int, prefix: int) -> Iterator[Launch]:
    """All that FSPAD or EAGLE-2 launches in a round.

    Args:
        model: the target's shape.
        draft: the drafter's.
        nodes: of the tree.
        prefix: tokens before it.
    """
    for level in range(DEPTH):
        yield from level_launches(model, draft, level, prefix)
    yield rerank(nodes)
    yield Launch(OBSERVE, "features", Work(2 * PAIRS * model.hidden_size * BF16))


def eesd_launches(model: Model, num_layers: int, prefix: int) -> Iterator[Launch]:
    """All that EESD launches in a round.

    Args:
        model: the target's shape.
        num_layers: N, those that are run for each token.
        prefix: tokens before it.
    """
    lower, exit_layer = (replace(model, num_layers=count) for count in (num_layers, 1))
    control = Launch("", "draft_control", limits.draft_control(model, 1), is_before_linear=True)
    # Of the exit keys and values first, for they are wanted of every token.
    kept = [one for one in layer_launches(exit_layer, 1, prefix, 0) if one.count]
    others = {one.kernel: one.count for one in kept}
    rest = [
        replace(one, count=max(0, one.count - others.get(one.kernel, 0)))
        for one in layer_launches(exit_layer, 1, prefix, 1)
    ]
    first = [
        Launch("", "embed", limits.embed(model, 1), is_before_linear=True),
        *layer_launches(lower, 1, prefix, num_layers),
        *kept,
        control,
    ]
    exits = [
        *rest,
        final_norm(model, 1),
        head(model, 1),
        Launch("", "calibration", limits.linear(2, model.hidden_size, 1), is_linear=True),
        expand("", 1, model.vocab_size, is_before_linear=True),
    ]
    for launch in (*first, *exits):
        yield replace(launch, stage=TOKEN, count=CHAIN * launch.count)
    for launch in first:
        yield replace(launch, stage=LAST)
    yield Launch(OBSERVE, "draft_control_update", limits.draft_control_update(model, 1))
