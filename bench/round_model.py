"""What a round and a prompt should take on a GPU, from bytes, FLOP and launches: predicted.

A launch streams its bytes at a share of the copy rate, or multiplies at what ``mma.sync`` reaches,
whichever takes longer; before that a kernel that cannot read ahead has its latency, and between two
nodes of a graph there is a gap. With dependent launches a gap is shorter, and ``linear`` fills its
stages with weights while the one before it still runs, so that what is small beside it is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench import limits
from bench.harness import Row
from bench.limits import BF16, Ceilings, Model, Work

CARDS: Mapping[str, Ceilings] = {"H100": limits.H100, "H200": limits.H200}
STREAMING = 0.92
"""Of the copy rate, by weights."""
MMA_SYNC = 0.62
"""Of the rate of a large product, which ``wgmma`` reaches."""
LIBRARY = 0.8
"""Of the same, by cuBLAS in the layers of a prompt."""
PROMPT = 0.46
"""Of the same, by ours there: a block of 128 rows by 128 outputs reads both from L2, 64 FLOP a byte
at 5.5 to 7 TB/s, and sums of slices take a tenth more."""
CHAIN_ROWS = 128
"""Of a pass whose keys and values attention appends; more rows are appended before."""
SLICED_ROWS = 256
"""Of a launch of ``linear`` at most, where K is in slices."""
NODE, OVERLAPPED_NODE = 1.3e-6, 0.4e-6
"""Seconds between two nodes of a graph, without and with dependent launches."""
RAMP, OVERLAPPED_RAMP = 2.5e-6, 0.3e-6
"""Until ``linear`` streams at its full rate, and for its last blocks."""
LATENCY, HIDDEN_LATENCY = 2.0e-6, 0.5e-6
"""Of a small kernel's chain of read, sum and write; of one before ``linear``, with dependent
launches."""
ATTENTION_LATENCY = 3.0e-6
ACCEPT_LATENCY = 0.7e-6
"""Of each of acceptance's three launches, of which few rows concern more than one."""
KEYS_TOKENS, KEY = 64, 8
"""What acceptance reads of a row where the head has left its keys: 8 bytes for 64 tokens."""
TREE_NODES = 60
PIECE = 512
"""Tokens of a prompt in one pass."""
NAME_OF_GOALS = "Llama-3-8B"
GOALS = {"H100": 5.7, "H200": 4.0}
"""Milliseconds of a token of plain decoding."""
PROMPT_GOAL = 2.5
"""Of a prompt, times what transformers takes."""


@dataclass(frozen=True)
class Launch:
    """Some equal launches of a stage."""

    stage: str
    kernel: str
    work: Work
    count: int = 1
    latency: float = LATENCY
    is_linear: bool = False
    is_before_linear: bool = False

    def seconds(self, card: Ceilings, *, overlaps: bool, product_rate: float = MMA_SYNC) -> float:
        """Of all of them in a graph.

        Args:
            card: copy and product rates.
            overlaps: with dependent launches.
            product_rate: share of the latter that is reached.
        """
        rate = Ceilings(STREAMING * card.bytes_per_s, product_rate * card.flop_per_s)
        node = OVERLAPPED_NODE if overlaps else NODE
        if self.is_linear:
            start = OVERLAPPED_RAMP if overlaps else RAMP
        else:
            start = HIDDEN_LATENCY if overlaps and self.is_before_linear else self.latency
        return self.count * (node + start + rate.seconds(self.work))


def pass_launches(
    model: Model, rows: int, prefix: int, head_rows: int, *, is_ours: bool = True
) -> Iterator[Launch]:
    """Of a forward pass of a sequence: a layer of a tree is 7, with gate and up in one.

    Args:
        model: the target's shape.
        rows: of a tree, or of a piece of a prompt.
        prefix: tokens before them; before a prompt's half, on the average.
        head_rows: those with logits; without any the last layer leaves keys and values alone.
        is_ours: whether further rows make further launches, as they do in ours.
    """
    yield Launch("verify", "embed", limits.embed(model, rows), is_before_linear=True)
    num_whole = model.num_layers if head_rows else model.num_layers - 1
    yield from layer_launches(model, rows, prefix, num_whole, is_ours=is_ours)
    if head_rows > 0:
        yield final_norm(model, rows)
        yield head(model, head_rows)


def layer_launches(
    model: Model, rows: int, prefix: int, num_whole: int, *, is_ours: bool = True
) -> Iterator[Launch]:
    """Of the layers of a pass.

    Args:
        model: their shape and number.
        rows: of each.
        prefix: tokens before them.
        num_whole: layers; those behind them leave keys and values alone.
        is_ours: as of :func:`pass_launches`.
    """
    hidden, wide, layers = model.hidden_size, model.intermediate_size, model.num_layers
    q_size = model.num_heads * model.head_dim
    kv_size = 2 * model.num_kv_heads * model.head_dim
    norm = limits.rms_norm(model, rows)
    attention = limits.tree_attention(model, 1, prefix, rows, rows * min(rows, 6))

    def linear(kernel: str, num_outputs: int, num_inputs: int, count: int) -> Launch:
        is_cut = is_ours and has_slices(num_outputs, num_inputs)
        num_parts = -(-rows // SLICED_ROWS) if is_cut else 1
        work = limits.linear(num_outputs, num_inputs, -(-rows // num_parts))
        return Launch("verify", kernel, work, num_parts * count, is_linear=True)

    yield Launch("verify", "rms_norm", norm, layers + num_whole, is_before_linear=True)
    yield linear("qkv", q_size + kv_size, hidden, layers)
    num_appends = layers if is_ours and rows > CHAIN_ROWS else layers - num_whole
    yield Launch("verify", "rope_append", limits.rope_append(model, rows), num_appends)
    yield Launch("verify", "tree_attention", attention, num_whole, ATTENTION_LATENCY)
    yield linear("o", hidden, q_size, num_whole)
    yield linear("gate_up", 2 * wide, hidden, num_whole)
    yield linear("down", hidden, wide, num_whole)


def final_norm(model: Model, rows: int) -> Launch:
    """Before the head."""
    return Launch("verify", "rms_norm", limits.rms_norm(model, rows), is_before_linear=True)


def head(model: Model, rows: int) -> Launch:
    """Whose output is float32."""
    work = limits.linear(model.vocab_size, model.hidden_size, rows)
    work = replace(work, num_bytes=work.num_bytes + rows * model.vocab_size * BF16)
    return Launch("verify", "head", work, is_linear=True)


def has_slices(num_outputs: int, num_inputs: int) -> bool:
    """Whether ``linear`` cuts K (``csrc/linear/slices.h``)."""
    return -(-num_outputs // 64) < 256 and num_inputs >= 1024


def round_launches(model: Model, nodes: int, prefix: int, tau: float) -> Iterator[Launch]:
    """Of a whole round, but for what a drafter launches.

    Args:
        model: the target's shape.
        nodes: of the tree; 1 in plain decoding.
        prefix: tokens before it.
        tau: rows that are moved.
    """
    yield Launch("settle", "tree_settle", limits.tree_settle(model, nodes))
    yield from pass_launches(model, nodes, prefix, nodes)
    keys = Work(nodes * -(-model.vocab_size // KEYS_TOKENS) * KEY)
    yield Launch("accept", "tree_accept: scan_rows", keys, latency=ACCEPT_LATENCY)
    yield Launch("accept", "tree_accept: weigh, pick", Work(0), 2, ACCEPT_LATENCY)
    yield Launch("accept", "history_append", limits.history_append(model, nodes))
    yield Launch("commit", "kv_commit", limits.kv_commit(model, round(tau)))


def stage_rows(name: str, model: Model, nodes: int, prefix: int, tau: float) -> list[Row]:
    """A line a stage, the whole, and what of it is the least that a copy of its bytes takes."""
    launches = list(round_launches(model, nodes, prefix, tau))
    stages = list(dict.fromkeys(launch.stage for launch in launches))
    rows = [
        stage_row(name, nodes, stage, [launch for launch in launches if launch.stage == stage])
        for stage in stages
    ]
    return [*rows, stage_row(name, nodes, "round", launches)]


def stage_row(
    name: str, nodes: int, stage: str, launches: Sequence[Launch], product_rate: float = MMA_SYNC
) -> Row:
    """What these launches take on each card, with and without overlap.

    Args:
        name: of the model.
        nodes: of the tree, or rows.
        stage: what the launches are.
        launches: of it.
        product_rate: as of :meth:`Launch.seconds`.
    """
    num_bytes = sum(launch.count * launch.work.num_bytes for launch in launches)
    row: Row = {
        "model": name,
        "nodes": nodes,
        "stage": stage,
        "launches": sum(launch.count for launch in launches),
        "GB": num_bytes / 1e9,
    }
    for card, ceilings in CARDS.items():
        apart, together = (
            sum(
                launch.seconds(ceilings, overlaps=overlaps, product_rate=product_rate)
                for launch in launches
            )
            for overlaps in (False, True)
        )
        row |= {
            f"{card} ms, predicted": 1e3 * together,
            f"{card} ms without overlap, predicted": 1e3 * apart,
            f"{card} % of limit, predicted": 100 * num_bytes / ceilings.bytes_per_s / together,
        }
    return row


# --- a prompt ---------------------------------------------------------------------------------


def prompt_row(name: str, model: Model, num_tokens: int, piece: int) -> Row:
    """A prompt in pieces, without logits, against transformers' pass on the same card.

    Args:
        name: of the model.
        model: its shape.
        num_tokens: of the prompt.
        piece: tokens of a pass: weights are read anew for each.
    """
    num_pieces, before = -(-num_tokens // piece), num_tokens // 2
    one = [
        *pass_launches(model, piece, before, 0),
        Launch("commit", "kv_commit", limits.kv_commit(model, 0)),
    ]
    launches = [replace(launch, count=num_pieces * launch.count) for launch in one]
    row = stage_row(name, piece, f"prompt of {num_tokens}", launches, PROMPT)
    theirs = list(pass_launches(model, num_tokens, before, 1, is_ours=False))
    for card, ceilings in CARDS.items():
        seconds = sum(
            launch.seconds(ceilings, overlaps=False, product_rate=LIBRARY) for launch in theirs
        )
        ours = 1e-3 * row[f"{card} ms, predicted"]
        row[f"{card} x transformers, predicted"] = ours / seconds
    return row


# --- all of it --------------------------------------------------------------------------------


def prediction(models: Mapping[str, Model], prefix: int, tau: float) -> list[Row]:
    """Stages of plain decoding and of trees of 60 nodes, and a prompt, of each model.

    Args:
        models: by name.
        prefix: tokens before a round, and of the prompt.
        tau: of the trees.
    """
    rows: list[Row] = []
    for name, model in models.items():
        for nodes, moved in ((1, 1.0), (TREE_NODES, tau)):
            rows += stage_rows(name, model, nodes, prefix, moved)
        rows.append(prompt_row(name, model, prefix, min(prefix, PIECE)))
    columns = {column: None for row in rows for column in row}
    return [{**columns, **row} for row in rows]


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    """Of the goals that a prediction says something about."""
    said = {}
    for row in rows:
        for card in CARDS:
            ms, ratio = row[f"{card} ms, predicted"], row[f"{card} x transformers, predicted"]
            if row["model"] != NAME_OF_GOALS:
                continue
            if (row["nodes"], row["stage"]) == (1, "round"):
                said[f"plain decoding, {card}"] = verdict(ms, "ms a token", GOALS[card])
            if ratio is not None:
                said[f"{row['stage']}, {card}"] = verdict(ratio, "x transformers", PROMPT_GOAL)
    return said


def verdict(value: float, unit: str, most: float) -> str:
    """Whether a predicted figure keeps below its goal."""
    word = "reached" if value <= most else "missed"
    return f"predicted {value:.3g} {unit}, goal <= {most:g}: {word} as predicted"
