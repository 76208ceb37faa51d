"""Bytes and FLOP of the CUDA kernels, and the time a GPU needs for them at the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BF16 = 2
FLOAT = INT = 4
WORD = DOUBLE = 8
TREE_TOP_K, TREE_DEPTH = 10, 6
"""Of the pool that a tree is chosen from: children of a node, levels below the root's children."""
LOOKUP_HISTORY = 8192
"""Tokens that are looked through."""


@dataclass(frozen=True)
class Model:
    """The shape of a model that the kernels see."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 1000


MODELS = {
    "Llama-3-8B": Model(4096, 14336, 32, 32, 8, 128, 128_256),
    "Vicuna-7B": Model(4096, 11008, 32, 32, 32, 128, 32_000),
}
"""Whose kernels are measured one by one."""
TARGETS = {**MODELS, "Llama-3-70B/4": Model(8192, 7168, 80, 16, 2, 128, 32_064)}
"""Whose rounds are measured; ``/4``: a quarter of the model, as each of four GPUs has it, without
what they tell one another."""


@dataclass(frozen=True)
class Work:
    """What must be done however it is done: each input read once, each output written once."""

    num_bytes: int
    flop: int = 0


@dataclass(frozen=True)
class Ceilings:
    """What a device moves and multiplies in a second, at the most."""

    bytes_per_s: float
    flop_per_s: float

    def seconds(self, work: Work) -> float:
        """The least time for ``work``."""
        return max(work.num_bytes / self.bytes_per_s, work.flop / self.flop_per_s)

    def bound_by(self, work: Work) -> str:
        """``memory`` or ``compute``, whichever takes longer."""
        is_memory = work.num_bytes / self.bytes_per_s >= work.flop / self.flop_per_s
        return "memory" if is_memory else "compute"


H100 = Ceilings(3.0e12, 790e12)
H200 = Ceilings(4.3e12, 790e12)
"""A device-to-device copy and a large bf16 product on random data, on these GPUs."""


def rms_norm(model: Model, rows: int) -> Work:
    """With the residual: x and residual read, residual and out written; float32 weights."""
    return Work(4 * rows * model.hidden_size * BF16 + model.hidden_size * FLOAT)


def layer_norm(model: Model, rows: int) -> Work:
    """As ``rms_norm``, and a bias."""
    return Work(rms_norm(model, rows).num_bytes + model.hidden_size * FLOAT)


def activate(model: Model, rows: int) -> Work:
    """Gate and up read, out written."""
    return Work(3 * rows * model.intermediate_size * BF16)


def scale_add(model: Model, rows: int) -> Work:
    """Rows and residual read, out written."""
    return Work(3 * rows * model.hidden_size * BF16)


def rope_append(model: Model, rows: int) -> Work:
    """q, k and v read and written, and a row of the rotary table each."""
    heads = 2 * model.num_heads + 4 * model.num_kv_heads
    return Work(rows * model.head_dim * (heads * BF16 + FLOAT))


def kv_commit(model: Model, rows: int) -> Work:
    """``rows`` slots moved, in keys and values of all layers."""
    return Work(2 * rows * slot_bytes(model) * model.num_layers)


def tree_settle(model: Model, rows: int) -> Work:
    """Tokens and parents read and written, depth and ancestors written; one tree, of any model."""
    return Work(rows * (5 * INT + (rows + 63) // 64 * WORD))


def history_append(model: Model, rows: int) -> Work:
    """Depth, path and tokens read; tokens to the history and both to a report; of any model."""
    return Work(rows * 6 * INT)


def embed(model: Model, rows: int) -> Work:
    """Rows of the table read and written."""
    return Work(rows * (2 * model.hidden_size * BF16 + INT))


def prompt_lookup(model: Model, rows: int) -> Work:
    """A history that has to be read whole, tokens and parents of ``rows`` nodes; of any model."""
    return Work((LOOKUP_HISTORY + 2 * rows) * INT)


def feature_sample(model: Model, rows: int) -> Work:
    """Weights read once; of each row embedding and feature in, the result out."""
    hidden, wide = model.hidden_size, model.intermediate_size
    weights = 2 * hidden**2 + 3 * hidden * wide
    return Work((weights + 3 * rows * hidden) * BF16, 2 * rows * weights)


def feature_sample_folded(model: Model, rows: int) -> Work:
    """The embedding's half of ``fc`` and the gate are rows of tables."""
    hidden, wide = model.hidden_size, model.intermediate_size
    weights = hidden**2 + 2 * hidden * wide
    return Work((weights + rows * (3 * hidden + wide)) * BF16, 2 * rows * weights)


def draft_control(model: Model, rows: int) -> Work:
    """A posterior of 26 doubles, ten numbers and eight confidences a sequence; of any model."""
    return Work(rows * (26 * DOUBLE + 10 * INT + 8 * FLOAT))


def draft_control_update(model: Model, rows: int) -> Work:
    """The posterior written too."""
    return Work(rows * (2 * 26 * DOUBLE + 5 * INT + 8 * FLOAT))


def tree_expand(model: Model, rows: int) -> Work:
    """Logits of ``rows`` nodes read once, as many children of each written."""
    return Work(rows * model.vocab_size * FLOAT + rows * rows * (2 * INT + FLOAT))


def tree_expand_by_maxima(model: Model, rows: int) -> Work:
    """Keys and masses of all tiles of 64 logits, and as many tiles a node as it has children."""
    tiles = -(-model.vocab_size // 64)
    read = rows * (tiles * (DOUBLE + FLOAT) + rows * 64 * FLOAT)
    return Work(read + rows * rows * (2 * INT + FLOAT))


def pool_size() -> int:
    """Candidates that a tree is chosen from."""
    return TREE_TOP_K + TREE_DEPTH * TREE_TOP_K**2


def tree_rerank(model: Model, rows: int) -> Work:
    """All scores read, tokens, parents and scores of ``rows`` nodes read and written."""
    return Work(pool_size() * FLOAT + 2 * rows * (2 * INT + FLOAT))


def recycle_propose(model: Model, rows: int) -> Work:
    """Of each node its place in a template and a table's entry read, its token written."""
    return Work(rows * 4 * INT)


def recycle_learn(model: Model, rows: int) -> Work:
    """Logits of ``rows`` nodes read once; eight ids and a mark of each written."""
    return Work(rows * (model.vocab_size * FLOAT + 9 * INT))


def tree_accept(model: Model, rows: int) -> Work:
    """Logits of ``rows`` nodes read once; tokens and parents, path and tokens."""
    return Work(rows * (model.vocab_size * FLOAT + 4 * INT))


def linear(num_outputs: int, num_inputs: int, rows: int, weight_size: int = BF16) -> Work:
    """Weights of ``weight_size`` bytes read once, rows of 16 bits in and out."""
    num_weights = num_outputs * num_inputs
    num_bytes = num_weights * weight_size + rows * (num_outputs + num_inputs) * BF16
    return Work(num_bytes, 2 * rows * num_weights)


def slot_bytes(model: Model) -> int:
    """Key and value of one slot in one layer."""
    return 2 * model.num_kv_heads * model.head_dim * BF16


def tree_attention(model: Model, batch: int, prefix: int, nodes: int, tree_pairs: int) -> Work:
    """Keys and values read once, q and out; two products of d for each visible pair and head.

    Args:
        model: the shape.
        batch: sequences.
        prefix: committed slots of each.
        nodes: rows of each.
        tree_pairs: pairs of a node and one of its ancestors (itself too), in one tree.
    """
    kv = (prefix + nodes) * slot_bytes(model)
    rows = 2 * nodes * model.num_heads * model.head_dim * BF16
    pairs = nodes * prefix + tree_pairs
    return Work(batch * (kv + rows), batch * 4 * model.num_heads * model.head_dim * pairs)


def figures(work: Work, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Columns of a row: what was reached, and what share of the limit that is.

    Args:
        work: what one launch does.
        seconds: what it took.
        ceilings: of this device, measured in the same run.
    """
    limit = ceilings.seconds(work)
    return {
        "us": 1e6 * seconds,
        "GB/s": work.num_bytes / seconds / 1e9,
        "TFLOP/s": work.flop / seconds / 1e12 if work.flop else None,
        "bound by": ceilings.bound_by(work),
        "limit_us": 1e6 * limit,
        "% of limit": 100 * limit / seconds,
        "H200_limit_us": 1e6 * H200.seconds(work),
    }


def input_sets(
    used_bytes: int, held_bytes: int, l2_bytes: int, free_bytes: int, most: int = 64
) -> int:
    """How many sets of inputs to rotate over, so that each launch finds the cache without its own.

    Small sets stop at ``most``: in a model too, the kernel before has left these in the cache.

    Args:
        used_bytes: what one launch reads and writes.
        held_bytes: memory that one set takes, with the copies of all contenders.
        l2_bytes: of the device's cache; launches over all sets use twice that.
        free_bytes: memory that the sets may take.
        most: the largest answer.

    Returns:
        At least 1; 0 if not even one set fits.
    """
    wanted = min(most, -(-2 * l2_bytes // used_bytes))
    return min(max(1, wanted), free_bytes // held_bytes)
