"""The one decoder layer of FSPAD, EAGLE-2 and the ablations, as kernels run it.

A row is a pair: the target's feature f_t and the token behind it, e_{t+1}; it takes position t and
gives a predicted logit row for token t+2 and a regressed feature for f_{t+1} (arXiv 2408.15562,
section 3). H hidden size, I intermediate size, V vocabulary, R rows of the draft head, M rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from specrt import ops
from specrt.cache import KVCache
from specrt.config import ModelConfig
from specrt.device import CPU, Device
from specrt.draft.fspad.checkpoint import EMBED, TOKEN_IDS, DraftConfig
from specrt.models.heads import pad_heads
from specrt.models.placement import choose_head_dim
from specrt.models.rope import RotaryTable, rotary_table

# Folding replaces streamed weights by rows looked up; worth it where it spares this share of a
# step's bytes and its tables stay within this share of the target's weights.
_MIN_SPARED = 0.1
_MAX_TABLES = 0.25


@dataclass(frozen=True)
class DraftWeights:
    """What a step reads; matrices in the drafter's dtype, vectors float32."""

    embed: torch.Tensor
    """``[V, H]``: the target's, or the checkpoint's own."""
    head: torch.Tensor
    """``[R, H]``: the target's LM head, or the rows of the reduced vocabulary."""
    token_ids: torch.Tensor | None
    """``[R]`` int32: the tokens of the head's rows; None where R = V."""
    fc: torch.Tensor
    """``[H, 2H]``, folded ``[H, H]``: the feature's half."""
    fc_bias: torch.Tensor | None
    """``[H]``; None where folded."""
    sample_norm: torch.Tensor | None
    """``[H]``; this and the next three are feature sampling's."""
    sample_gate: torch.Tensor | None
    """``[I, H]``; None where folded."""
    sample_up: torch.Tensor | None
    """``[I, H]``"""
    sample_down: torch.Tensor | None
    """``[H, I]``"""
    token_fc: torch.Tensor | None
    """``[V, H]``, where folded: W_fc's embedding half and bias, of each token."""
    token_gate: torch.Tensor | None
    """``[V, I]``, where folded: W_gate of each token."""
    qkv: torch.Tensor
    """``[(Q + 2K) * d, H]``, d the head size that kernels run."""
    qkv_bias: torch.Tensor | None
    """``[(Q + 2K) * d]``; None where the checkpoint has none."""
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down_predict: torch.Tensor
    """``[H, I]``: gives p, what the head multiplies."""
    down_regress: torch.Tensor | None
    """``[H, I]``: gives r, the next feature; None where one output serves both."""

    @property
    def table_bytes(self) -> int:
        """Memory of the folded tables."""
        return sum(t.nbytes for t in (self.token_fc, self.token_gate) if t is not None)

    @property
    def step_bytes(self) -> int:
        """Weights one step streams, the head included."""
        sampling = (self.fc, self.sample_gate, self.sample_up, self.sample_down)
        layer = (self.qkv, self.o, self.gate_up, self.down_predict, self.down_regress, self.head)
        return sum(t.nbytes for t in (*sampling, *layer) if t is not None)


def pack_weights(
    config: DraftConfig,
    tensors: Mapping[str, torch.Tensor],
    embed: torch.Tensor,
    head: torch.Tensor,
    dtype: torch.dtype,
) -> DraftWeights:
    """Arrange a checkpoint's tensors for streaming.

    Args:
        config: the architecture.
        tensors: as :func:`specrt.draft.fspad.checkpoint.read_checkpoint` gives them.
        embed: ``[V, H]``, the target's embedding.
        head: ``[V, H]``, the target's LM head.
        dtype: of the matrices.

    Raises:
        ValueError: heads larger than kernels take.
    """
    head_dim, padded = config.layer.head_dim, choose_head_dim(config.layer, CPU)

    def joined(keys: Iterable[str]) -> torch.Tensor:
        return torch.cat([pad_heads(key, tensors[key], head_dim, padded) for key in keys])

    def matrix(*keys: str) -> torch.Tensor:
        return joined(keys).to(dtype).contiguous()

    def vector(*keys: str) -> torch.Tensor:
        return joined(keys).float().contiguous()

    is_sampled, hidden = config.has_feature_sampling, config.layer.hidden_size
    fc = "fc.fc" if is_sampled else "fc"
    bias = tensors.get(f"{fc}.bias", torch.zeros(hidden))
    attention, mlp = "layers.0.self_attn.", "layers.0.mlp."
    biases = [f"{attention}{name}_proj.bias" for name in "qkv"]
    down = matrix(f"{mlp}down_proj.weight")
    ids = tensors.get(TOKEN_IDS)
    if ids is not None and len(ids) == len(head):
        ids = None  # all tokens in their own order
    return DraftWeights(
        embed=tensors[EMBED].to(embed.dtype).contiguous() if EMBED in tensors else embed,
        # A copy only where it differs: a narrower head is read faster and moves no token.
        head=(head if ids is None else head[ids.long()]).to(dtype).contiguous(),
        token_ids=None if ids is None else ids.clone(),
        fc=matrix(f"{fc}.weight"),
        fc_bias=bias.float().contiguous(),
        sample_norm=vector("fc.post_attention_layernorm.weight") if is_sampled else None,
        sample_gate=matrix("fc.mlp.gate_proj.weight") if is_sampled else None,
        sample_up=matrix("fc.mlp.up_proj.weight") if is_sampled else None,
        sample_down=matrix("fc.mlp.down_proj.weight") if is_sampled else None,
        token_fc=None,
        token_gate=None,
        qkv=matrix(*(f"{attention}{name}_proj.weight" for name in "qkv")),
        qkv_bias=vector(*biases) if config.layer.has_attention_bias else None,
        o=matrix(f"{attention}o_proj.weight"),
        post_norm=vector("layers.0.post_attention_layernorm.weight"),
        gate_up=matrix(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        down_predict=down[:hidden],
        down_regress=down[hidden:] if config.has_split_output else None,
    )


def fold(weights: DraftWeights) -> DraftWeights:
    """Replace W_gate and the embedding's half of W_fc by tables over the vocabulary.

    Exact up to the rounding of the tables, so drafts may differ in a last bit; outputs cannot.
    """
    embed = weights.embed.float()
    hidden = embed.shape[1]
    dtype = weights.fc.dtype
    token_half = weights.fc[:, :hidden].contiguous()
    token_fc = ops.linear(embed, token_half, weights.fc_bias).to(dtype)
    token_gate = None
    if weights.sample_gate is not None:
        token_gate = ops.linear(embed, weights.sample_gate).to(dtype)
    changed = vars(weights) | {
        "fc": weights.fc[:, hidden:].contiguous(),
        "fc_bias": None,
        "sample_gate": None,
        "token_fc": token_fc,
        "token_gate": token_gate,
    }
    return DraftWeights(**changed)


def folding_pays(weights: DraftWeights, target_bytes: int) -> bool:
    """Whether folding spares enough streaming for the memory its tables take."""
    vocab, hidden = weights.embed.shape
    gate_rows = 0 if weights.sample_gate is None else weights.sample_gate.shape[0]
    size = weights.fc.element_size()
    spared = (hidden + gate_rows) * hidden * size
    tables = (hidden + gate_rows) * vocab * size
    return spared >= _MIN_SPARED * weights.step_bytes and tables <= _MAX_TABLES * target_bytes


@dataclass(frozen=True)
class Rows:
    """Where a step's rows go: B sequences of N rows each (the tables the kernels read)."""

    depth: torch.Tensor
    """``[B, N]`` int32: position less ``kv_len``."""
    kv_len: torch.Tensor
    first_node: torch.Tensor
    num_nodes: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class Activations:
    """Scratch and results of a step of at most M rows."""

    pair: torch.Tensor
    """``[M, H]``: x, what feature sampling made of the pairs."""
    sampling: torch.Tensor
    """Workspace of ``feature_sample``."""
    qkv: torch.Tensor
    attended: torch.Tensor
    hidden: torch.Tensor
    normed: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor
    predicted: torch.Tensor
    """``[M, H]``: p"""
    logits: torch.Tensor
    """``[M, R]``"""

    @classmethod
    def make(cls, layer: ModelConfig, rows: int, head_rows: int) -> Activations:
        """Buffers for ``rows`` rows of a :attr:`DraftLayer.padded`."""
        hidden, wide = layer.hidden_size, layer.intermediate_size
        heads = layer.num_heads + 2 * layer.num_kv_heads
        return cls(
            pair=torch.empty(rows, hidden),
            sampling=torch.empty(rows, ops.feature_sample_workspace(hidden, wide)),
            qkv=torch.empty(rows, heads * layer.head_dim),
            attended=torch.empty(rows, layer.num_heads * layer.head_dim),
            hidden=torch.empty(rows, hidden),
            normed=torch.empty(rows, hidden),
            gate_up=torch.empty(rows, 2 * wide),
            activated=torch.empty(rows, wide),
            predicted=torch.empty(rows, hidden),
            logits=torch.empty(rows, head_rows),
        )


class DraftLayer:
    """The layer's steps; each writes into static buffers, so that a graph can run it again.

    Args:
        config: the architecture.
        weights: as :func:`pack_weights` or :func:`fold` gives them.
        device: where the weights are, and how its steps run; None: the CPU.
        rope: the rotary table of the target, used where the layer's would be the same.
    """

    def __init__(
        self,
        config: DraftConfig,
        weights: DraftWeights,
        device: Device | None = None,
        rope: RotaryTable | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.device = device or Device()
        head_dim = weights.o.shape[1] // config.layer.num_heads
        self.padded = replace(config.layer, head_dim=head_dim)
        """The layer as the kernels run it: heads may be padded."""
        self._rope = rotary_table(config.layer, head_dim, self.device, rope)
        self._cos_sin = self._rope.reaching(0)

    def reserve(self, num_positions: int) -> bool:
        """Make the rotary table long enough; whether it moved.

        Args:
            num_positions: that it is to have.
        """
        if min(num_positions, self._rope.limit) <= len(self._cos_sin):
            return False
        longer = self._rope.reaching(num_positions)
        self.device.forget()  # first: an interrupt must not leave launches over what is gone
        self._cos_sin = longer
        return True

    def sample_features(
        self,
        tokens: torch.Tensor,
        source: torch.Tensor | None,
        features: torch.Tensor,
        work: Activations,
    ) -> None:
        """``work.pair[:M]`` and ``work.qkv[:M]`` of M pairs.

        Args:
            tokens: ``[M]`` int32.
            source: ``[M]`` int32, each pair's row of ``features``; None: its own.
            features: ``[S, H]`` float32.
            work: where to.
        """
        w, rows = self.weights, tokens.shape[0]
        pair = work.pair[:rows]
        is_looked_up = w.token_fc is not None and (w.token_gate is not None or w.sample_up is None)
        ops.feature_sample(
            tokens,
            source,
            features,
            None if is_looked_up else w.embed,
            w.fc,
            w.fc_bias,
            w.sample_norm,
            w.sample_gate,
            w.sample_up,
            w.sample_down,
            w.token_fc,
            w.token_gate,
            eps=self.config.layer.rms_norm_eps,
            workspace=work.sampling[:rows],
            out=pair,
        )
        ops.linear(pair, w.qkv, w.qkv_bias, out=work.qkv[:rows])

    def append(self, first: int, rows: Rows, cache: KVCache, work: Activations) -> torch.Tensor:
        """Rotate the queries and append keys and values of B·N rows from row ``first`` on.

        Returns:
            The queries ``[B, N, Hq, d]``, a view of ``work.qkv``.
        """
        layer = self.padded
        size, count = rows.depth.shape
        heads = work.qkv[first : first + size * count].view(size, count, -1, layer.head_dim)
        q, k, v = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=2)
        queries: torch.Tensor = q
        ops.rope_append(
            q,
            k,
            v,
            rows.depth,
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            rows.block_table,
            self._cos_sin,
            *cache.layer(0),
        )
        return queries

    def finish(
        self,
        q: torch.Tensor,
        ancestors: torch.Tensor,
        rows: Rows,
        cache: KVCache,
        work: Activations,
        regressed: torch.Tensor,
    ) -> torch.Tensor:
        """Attention, MLP and head of the first B·N rows of ``work.pair``.

        Args:
            q: ``[B, N, Hq, d]``, as :meth:`append` gives them.
            ancestors: ``[B, N, W]`` int64 bits.
            rows: where their keys and values are.
            cache: of the keys and values.
            work: scratch.
            regressed: ``[B·N, H]``, filled with r.

        Returns:
            The draft logits ``[B·N, R]``, a view of ``work.logits``.
        """
        w, layer = self.weights, self.config.layer
        size, count = rows.depth.shape
        num = size * count
        attended, hidden, normed = work.attended[:num], work.hidden[:num], work.normed[:num]
        ops.tree_attention(
            q,
            *cache.layer(0),
            rows.block_table,
            rows.kv_len,
            rows.first_node,
            rows.num_nodes,
            ancestors,
            layer.head_dim**-0.5,
            out=attended.view(size, count, layer.num_heads, -1),
        )
        ops.linear(attended, w.o, residual=work.pair[:num], out=hidden)
        ops.rms_norm(hidden, w.post_norm, layer.rms_norm_eps, out=normed)
        ops.linear(normed, w.gate_up, out=work.gate_up[:num])
        activated = ops.silu_mul(work.gate_up[:num], out=work.activated[:num])
        if w.down_regress is None:
            predicted = regressed
        else:
            predicted = work.predicted[:num]
            ops.linear(activated, w.down_regress, residual=hidden, out=regressed)
        ops.linear(activated, w.down_predict, residual=hidden, out=predicted)
        logits = work.logits[:num]
        ops.linear(predicted, w.head, out=logits)
        return logits
