"""The weights of FSPAD, EAGLE-2 and the ablations, arranged as steps stream them; folding.

H hidden size, I intermediate size, V vocabulary, R rows of the draft head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from specrt import ops
from specrt.device import Device
from specrt.draft.fspad.checkpoint import EMBED, TOKEN_IDS, DraftConfig
from specrt.models.dense import dense, rows_of
from specrt.models.float8 import float8_matrix
from specrt.models.gate_up import interleaved
from specrt.models.heads import pad_heads
from specrt.models.packing import Packing
from specrt.models.placement import choose_head_dim
from specrt.ops import Matrix, MatrixKind, PackedMatrix

# Folding replaces streamed weights by rows looked up; worth it where it spares this share of a
# step's bytes and its tables stay within this share of the target's weights.
_MIN_SPARED = 0.1
_MAX_TABLES = 0.3
_STREAMED = (
    "fc",
    "sample_gate",
    "sample_up",
    "sample_down",
    "qkv",
    "o",
    "gate_up",
    "down_predict",
    "down_regress",
    "head",
)


@dataclass(frozen=True)
class DraftWeights:
    """What a step reads; matrices in the drafter's dtype, packed or of one byte a weight (what is
    looked up stays wider), vectors float32."""

    embed: torch.Tensor | PackedMatrix
    """``[V, H]``: the target's, or the checkpoint's own."""
    head: Matrix
    """``[R, H]``: the target's LM head, or the rows of the reduced vocabulary."""
    token_ids: torch.Tensor | None
    """``[R]`` int32: the tokens of the head's rows; None where R = V."""
    fc: Matrix
    """``[H, 2H]``, folded ``[H, H]``: the feature's half."""
    fc_bias: torch.Tensor | None
    """``[H]``; None where folded."""
    sample_norm: torch.Tensor | None
    """``[H]``; this and the next three are feature sampling's."""
    sample_gate: Matrix | None
    """``[I, H]``; None where folded."""
    sample_up: Matrix | None
    """``[I, H]``"""
    sample_down: Matrix | None
    """``[H, I]``"""
    token_fc: torch.Tensor | None
    """``[V, H]``, where folded: W_fc's embedding half and bias, of each token."""
    token_gate: torch.Tensor | None
    """``[V, I]``, where folded: W_gate of each token."""
    qkv: Matrix
    """``[(Q + 2K) * d, H]``, d the head size that kernels run."""
    qkv_bias: torch.Tensor | None
    """``[(Q + 2K) * d]``; None where the checkpoint has none."""
    o: Matrix
    post_norm: torch.Tensor
    gate_up: Matrix
    """``[2I, H]``: the rows of gate, then up; interleaved on a GPU."""
    down_predict: Matrix
    """``[H, I]``: gives p, what the head multiplies."""
    down_regress: Matrix | None
    """``[H, I]``: gives r, the next feature; None where one output serves both."""
    is_interleaved: bool
    """How ``gate_up`` lies (:mod:`specrt.models.gate_up`)."""
    dtype: torch.dtype
    """The drafter's: of matrices that are not narrowed, of keys and values."""
    head_bias: torch.Tensor | None = None
    """``[R]`` float32, where the target's head has one."""

    @property
    def table_bytes(self) -> int:
        """Memory of the folded tables."""
        return sum(t.nbytes for t in (self.token_fc, self.token_gate) if t is not None)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Those that a step streams, by name, the head included."""
        found = {name: getattr(self, name) for name in _STREAMED}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    @property
    def step_bytes(self) -> int:
        """Weights one step streams, the head included."""
        return sum(matrix.nbytes for matrix in self.matrices.values())


def pack_weights(
    config: DraftConfig,
    tensors: Mapping[str, torch.Tensor],
    embed: torch.Tensor | PackedMatrix,
    head: torch.Tensor | PackedMatrix,
    dtype: torch.dtype,
    device: Device | None = None,
    *,
    head_bias: torch.Tensor | None = None,
) -> DraftWeights:
    """Arrange a checkpoint's tensors for streaming.

    The target's own tables are shared where they are packed, or their dtype is what the drafter
    wants, and where it wants all rows. Embeddings are their rows as they are, whatever the target
    multiplies them by or adds to them.

    Args:
        config: the architecture.
        tensors: as :func:`specrt.draft.fspad.checkpoint.read_checkpoint` gives them.
        embed: ``[V, H]``, the target's embedding, on ``device``.
        head: ``[V, H]``, the target's LM head, on ``device``.
        dtype: of the matrices; on a GPU the target's.
        device: where the drafter runs; None: the CPU.
        head_bias: ``[V]`` float32, the target's, on ``device``.

    Raises:
        ValueError: heads larger than kernels take; on a GPU, rows of matrices that are no multiple
            of 16 bytes.
    """
    device = device or Device()
    head_dim, padded = config.layer.head_dim, choose_head_dim(config.layer, device.place)

    def joined(keys: Iterable[str]) -> torch.Tensor:
        return torch.cat([pad_heads(key, tensors[key], head_dim, padded) for key in keys])

    def matrix(*keys: str) -> torch.Tensor:
        return device.moved(joined(keys).to(dtype).contiguous())

    def vector(*keys: str) -> torch.Tensor:
        return device.moved(joined(keys).float().contiguous())

    is_sampled, hidden = config.has_feature_sampling, config.layer.hidden_size
    fc = "fc.fc" if is_sampled else "fc"
    bias = tensors.get(f"{fc}.bias", torch.zeros(hidden))
    attention, mlp = "layers.0.self_attn.", "layers.0.mlp."
    biases = [f"{attention}{name}_proj.bias" for name in "qkv"]
    down = matrix(f"{mlp}down_proj.weight")
    gate_up = matrix(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
    ids = tensors.get(TOKEN_IDS)
    if ids is not None and len(ids) == len(head):
        ids = None  # all tokens in their own order
    if EMBED in tensors:
        own = tensors[EMBED]
        wide = own if isinstance(embed, PackedMatrix) else own.to(embed.dtype)
        embed = device.moved(wide.contiguous())
    token_ids = None if ids is None else device.moved(ids.clone())
    return DraftWeights(
        embed=embed,
        head=_draft_head(head, token_ids, dtype),
        token_ids=token_ids,
        fc=matrix(f"{fc}.weight"),
        fc_bias=device.moved(bias.float().contiguous()),
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
        gate_up=interleaved(gate_up) if device.is_gpu else gate_up,
        down_predict=down[:hidden],
        down_regress=down[hidden:] if config.has_split_output else None,
        is_interleaved=device.is_gpu,
        dtype=dtype,
        head_bias=head_bias if head_bias is None or token_ids is None else head_bias[token_ids],
    )


def _draft_head(
    head: torch.Tensor | PackedMatrix, token_ids: torch.Tensor | None, dtype: torch.dtype
) -> Matrix:
    """A copy only where it differs: a narrower head is read faster and moves no token."""
    if token_ids is not None:
        return rows_of(head, token_ids).to(dtype)
    return head if isinstance(head, PackedMatrix) else head.to(dtype)


def fold(weights: DraftWeights, device: Device | None = None) -> DraftWeights:
    """Replace W_gate and the embedding's half of W_fc by tables over the vocabulary.

    Exact up to the rounding of the tables, so drafts may differ in a last bit; outputs cannot.

    Args:
        weights: as :func:`pack_weights` gives them.
        device: where they lie; None: the CPU.
    """
    fc, device = _wide(weights), device or Device()
    dtype = fc.dtype
    embed = dense(weights.embed).to(device.activation_dtype(dtype))
    hidden = embed.shape[1]
    token_half = fc[:, :hidden].contiguous()
    device.wait()  # on a GPU linear reads ahead of what was launched last: weights are constants
    token_fc = ops.linear(embed, token_half, weights.fc_bias).to(dtype)
    token_gate = None
    if weights.sample_gate is not None:
        token_gate = ops.linear(embed, weights.sample_gate).to(dtype)
    changed = vars(weights) | {
        "fc": fc[:, hidden:].contiguous(),
        "fc_bias": None,
        "sample_gate": None,
        "token_fc": token_fc,
        "token_gate": token_gate,
    }
    return DraftWeights(**changed)


def narrow(weights: DraftWeights, device: Device | None = None) -> DraftWeights:
    """Round what a step streams to one byte a weight, the head to a copy of the drafter's own.

    Drafts differ, as far as the rounding shows; outputs cannot.

    Args:
        weights: as :func:`pack_weights` or :func:`fold` gives them.
        device: where they lie; None: the CPU.

    Raises:
        ValueError: on a GPU, a matrix whose columns are no multiple of 16.
    """
    device, changed = device or Device(), vars(weights).copy()
    for name, matrix in weights.matrices.items():
        changed[name] = float8_matrix(dense(matrix), device)
    return DraftWeights(**changed)


def packed(weights: DraftWeights, packing: Packing) -> DraftWeights:
    """Arrange what a step streams as the CPU's kernels read it; a packed head stays where it is.

    Args:
        weights: as :func:`pack_weights` or :func:`fold` gives them.
        packing: of drafters.
    """
    changed = vars(weights).copy()
    head = weights.head
    if isinstance(head, PackedMatrix) and head.kind == MatrixKind.BF16_SPLIT:
        changed["head"] = replace(head, kind=MatrixKind.BF16_ROUNDED)  # the same bytes
    for name, matrix in weights.matrices.items():
        if not isinstance(matrix, torch.Tensor):
            continue
        form = packing.form_of(matrix.dtype)
        if isinstance(form, MatrixKind):
            changed[name] = ops.pack_matrix(matrix, form)
    return DraftWeights(**changed)


def _wide(weights: DraftWeights) -> torch.Tensor:
    """The matrix ``fc``, before it is narrowed."""
    assert isinstance(weights.fc, torch.Tensor), "folding comes before"
    return weights.fc


def folding_pays(weights: DraftWeights, target_bytes: int) -> bool:
    """Whether folding spares enough streaming for the memory its tables take."""
    vocab, hidden = weights.embed.shape
    gate_rows = 0 if weights.sample_gate is None else weights.sample_gate.shape[0]
    size = _wide(weights).element_size()
    spared = (hidden + gate_rows) * hidden * size
    tables = (hidden + gate_rows) * vocab * size
    return spared >= _MIN_SPARED * weights.step_bytes and tables <= _MAX_TABLES * target_bytes
