"""How a target's tensors may be named and stored: what is expected, what is let pass, what is not.

What ``transformers`` loads to the same tokens loads here: tensors without the ``model.`` before
their names, a tied head stored alone or twice, and buffers that are computed anyway.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sized
from dataclasses import replace

import torch

from specrt.config import ModelConfig, foreign_tensors
from specrt.models.checkpoint import Checkpoint
from specrt.models.families import EMBED, HEAD, HEAD_BIAS, LLAMA, POSITIONS, naming_of
from specrt.models.stored import (
    StandardCheckpoint,
    StoredTensor,
    stored_tensors,
    use_full_names,
)
from specrt.ops import MatrixKind
from specrt.types import CheckpointError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHUNK = 1 << 22  # elements of two tables compared at a time
# Rotary tables, position ids, and scales of a cache of 8 bits, which ours is not.
_BUFFERS = re.compile(
    r"\brotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$|\.position_ids$"
    r"|\bself_attn\.(attn\.)?([qkv]|kv|prob)_(scale|zero_point)$"
    r"|\b[kv]_proj\.([kv]|output)_(scale|zero_point)$"
)


LAYER_MATRICES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""A layer's matrices as a step reads them, and whose rows they have."""


def matrix_parts(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """:data:`LAYER_MATRICES` of a model: without a gate where its MLP has none."""
    if config.form.is_gated:
        return LAYER_MATRICES
    return {**LAYER_MATRICES, "gate_up": ("mlp.up_proj",)}


def layer_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes of a layer's packed matrices, in the order a decode step reads them."""
    shapes = _linear_shapes(config)
    return {
        name: (sum(shapes[part][0] for part in parts), shapes[parts[0]][1])
        for name, parts in matrix_parts(config).items()
    }


def matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Of all matrices that a model multiplies by: those of a layer, and the head."""
    return [*layer_matrices(config).values(), (config.vocab_size, config.hidden_size)]


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """Rows, columns and whether there is a bias, of a layer's matrices as they are stored."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q_rows, hidden_size, config.has_attention_bias),
        "self_attn.k_proj": (kv_rows, hidden_size, config.has_attention_bias),
        "self_attn.v_proj": (kv_rows, hidden_size, config.has_attention_bias),
        "self_attn.o_proj": (hidden_size, q_rows, config.has_output_bias),
        "mlp.gate_proj": (intermediate_size, hidden_size, config.has_mlp_bias),
        "mlp.up_proj": (intermediate_size, hidden_size, config.has_mlp_bias),
        "mlp.down_proj": (hidden_size, intermediate_size, config.has_mlp_bias),
    }
    if not config.form.is_gated:
        del shapes["mlp.gate_proj"]
    return shapes


def layer_norms(config: ModelConfig) -> dict[str, bool]:
    """The norms of a layer, those of q and k apart, and whether each may have a bias."""
    form, norms = config.form, {}
    if form.is_pre_normed:
        norms["input_layernorm"] = True
        if form.has_mlp_norm:
            norms["post_attention_layernorm"] = True
    if form.is_post_normed:
        norms |= {"attended_layernorm": False, "mlp_layernorm": False}
    return norms


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of one decoder layer without its prefix, under our names
    (:mod:`specrt.models.families`)."""
    form = config.form
    shapes: dict[str, tuple[int, ...]] = {}
    for name, may_have_bias in layer_norms(config).items():
        shapes |= _norm_shapes(name, config, has_bias=form.has_norm_bias and may_have_bias)
    for name, (num_rows, num_columns, has_bias) in _linear_shapes(config).items():
        shapes[f"{name}.weight"] = (num_rows, num_columns)
        if has_bias:
            shapes[f"{name}.bias"] = (num_rows,)
    if config.has_qk_norm:
        for part, num_heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            num_together = num_heads if form.is_qk_norm_full else 1
            shapes[f"self_attn.{part}_norm.weight"] = (num_together * config.head_dim,)
    return shapes


def _norm_shapes(name: str, config: ModelConfig, *, has_bias: bool) -> dict[str, tuple[int, ...]]:
    endings = ["weight"] * config.form.has_norm_weight + ["bias"] * has_bias
    return {f"{name}.{ending}": (config.hidden_size,) for ending in endings}


def expected_shapes(config: ModelConfig, has_tables: bool = True) -> dict[str, tuple[int, ...]]:
    """Every key the architecture has, under our names."""
    form, table = config.form, (config.vocab_size, config.hidden_size)
    shapes = _norm_shapes("model.norm", config, has_bias=form.has_norm_bias)
    if has_tables:
        shapes[EMBED] = table
        if form.position_offset is not None:
            num_positions = config.max_positions + form.position_offset
            shapes[POSITIONS] = (num_positions, config.hidden_size)
        if not config.is_head_tied:
            shapes[HEAD] = table
        if form.has_head_bias:
            shapes[HEAD_BIAS] = (config.vocab_size,)
    layer = layer_shapes(config)
    for index in range(config.num_layers):
        for name, shape in layer.items():
            shapes[f"model.layers.{index}.{name}"] = shape
    return shapes


def matrix_keys(config: ModelConfig, has_tables: bool = True) -> list[tuple[str, ...]]:
    """Of all matrices, in the order a decode step reads them, the keys whose rows they have."""
    found = [
        tuple(f"model.layers.{index}.{name}.weight" for name in names)
        for index in range(config.num_layers)
        for names in matrix_parts(config).values()
    ]
    if has_tables:
        found += [(EMBED,)] if config.is_head_tied else [(HEAD,), (EMBED,)]
    return found


def weight_bytes(config: ModelConfig, dtype: torch.dtype, has_tables: bool = True) -> int:
    """Bytes of a model's weights: matrices of ``dtype``, norms and biases in float32."""
    sizes = {1: torch.float32.itemsize, 2: dtype.itemsize}
    shapes = expected_shapes(config, has_tables).values()
    return sum(math.prod(shape) * sizes[len(shape)] for shape in shapes)


def use_standard_names(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The tensors of a target's checkpoint under our names, whoever saved them; none is checked.

    Args:
        checkpoint: its keys are changed.
        config: the target's.
    """
    stored = _named(checkpoint, config, has_tables=True)
    return StandardCheckpoint(checkpoint, stored, config.float8_scale_suffix)


def fit(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    has_tables: bool = True,
    others: Collection[str] = (),
) -> tuple[Checkpoint, ModelConfig]:
    """Bring a checkpoint's names into order and refuse what is not the model of ``config``.

    Nothing but a head that is stored twice is read. Refusals come before anything of the size that
    ``config`` claims is made.

    Args:
        checkpoint: its keys are changed.
        config: what it should hold.
        dtype: of the matrices to be loaded.
        has_tables: whether embedding and head are expected.
        others: keys that it has beside the model's.

    Returns:
        The checkpoint under our names, and the configuration of what is there: the head is untied
        where it has values of its own.

    Raises:
        CheckpointError: tensors missing, unknown, misshaped or of a wrong dtype; of a checkpoint
            of another kind, its kind.
    """
    try:
        if config.num_layers > len(checkpoint.infos):  # before a name is made for each
            raise CheckpointError(
                f"{checkpoint.directory / 'config.json'}: num_hidden_layers: expected no more "
                f"layers than there are tensors ({len(checkpoint.infos)}), got {config.num_layers}"
            )
        stored = _named(checkpoint, config, has_tables)
        unknown = _check_tensors(checkpoint, config, stored, others)
        found = StandardCheckpoint(checkpoint, stored, config.float8_scale_suffix)
        if HEAD in unknown and config.is_head_tied and EMBED in found.infos:
            unknown.remove(HEAD)
            config = replace(config, is_head_tied=_is_same_table(found, dtype))
        if unknown:
            info = checkpoint.infos[unknown[0]]
            raise CheckpointError(
                f"{info.file}: unknown tensor {unknown[0]} {list(info.shape)}{_and_more(unknown)}"
            )
    except CheckpointError as error:
        foreign = foreign_tensors(checkpoint.infos)
        # Where the configuration tells what scales are for, their names tell nothing more.
        is_told = checkpoint.is_quantized or config.float8_scale_suffix is not None
        if foreign is None or is_told:
            raise
        raise CheckpointError(f"{error}; {foreign}") from error
    return found, config


def _named(checkpoint: Checkpoint, config: ModelConfig, has_tables: bool) -> list[StoredTensor]:
    """What the checkpoint should have, under the names that its keys get."""
    shapes, naming = expected_shapes(config, has_tables), naming_of(config.architecture)
    if shapes.keys() <= checkpoint.infos.keys():  # a drafter's layers, a GGUF file's
        naming = LLAMA
    is_head_tied = config.is_head_tied and has_tables
    use_full_names(checkpoint, naming, is_head_tied=is_head_tied)
    return stored_tensors(naming, config, shapes)


def _check_tensors(
    checkpoint: Checkpoint,
    config: ModelConfig,
    expected: list[StoredTensor],
    others: Collection[str],
) -> list[str]:
    """Compare headers with what is expected; return the keys that have no place."""
    infos, known = checkpoint.infos, set(others)
    missing = [one for one in expected if one.key not in infos]
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: missing tensor {missing[0].key} "
            f"{list(missing[0].shape)}{_and_more(missing)}"
        )
    for one in expected:
        key, info = one.key, infos[one.key]
        if info.shape != one.shape:
            raise CheckpointError(
                f"{info.file}: {key}: expected {list(one.shape)}, got {list(info.shape)}"
            )
        known.add(key)
        suffix = config.float8_scale_suffix
        if suffix and len(one.shape) == 2 and info.dtype == torch.float8_e4m3fn:
            known.add(_check_scale(checkpoint, one, key + suffix))
        elif info.dtype not in _FLOATS and not isinstance(info.dtype, MatrixKind):
            raise CheckpointError(
                f"{info.file}: {key}: expected a floating-point tensor, "
                f"got {dtype_name(info.dtype)}"
            )
    known |= checkpoint.idle
    buffers = naming_of(config.architecture).buffers
    return [
        key
        for key in infos
        if key not in known and not _BUFFERS.search(key) and not key.endswith(buffers)
    ]


def _check_scale(checkpoint: Checkpoint, stored: StoredTensor, scale_key: str) -> str:
    key = stored.key
    matrix, scale = checkpoint.infos[key], checkpoint.infos.get(scale_key)
    if scale is None:
        raise CheckpointError(f"{matrix.file}: missing tensor {scale_key}, the scale of {key}")
    num_rows = matrix.shape[0]
    by_row = () if stored.is_transposed else ((num_rows,), (num_rows, 1))
    if scale.shape not in ((), (1,), *by_row):
        raise CheckpointError(
            f"{scale.file}: {scale_key}: expected [1] or [{num_rows}], got {list(scale.shape)}"
        )
    if scale.dtype not in _FLOATS:
        raise CheckpointError(
            f"{scale.file}: {scale_key}: expected float32, got {dtype_name(scale.dtype)}"
        )
    return scale_key


def _is_same_table(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the head stored beside a tied embedding has its values, as loaded in ``dtype``.

    Raises:
        CheckpointError: it is another table, by more than the rounding of a narrower dtype.
    """
    head, embed = checkpoint.tensor(HEAD), checkpoint.tensor(EMBED)
    try:
        if _is_equal(head, embed, dtype):
            return True
        if is_rounded_copy(head, embed):
            return False
    finally:
        checkpoint.release()
    raise CheckpointError(
        f"{checkpoint.infos[HEAD].file}: {HEAD}: differs from {EMBED}, "
        "though the config says tie_word_embeddings"
    )


def is_rounded_copy(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether one table is the other, up to rounding to the narrower dtype.

    bfloat16 and float16 are as wide as each other, and either may have been the original.
    """
    width = min(one.dtype.itemsize, other.dtype.itemsize)
    narrow = [dtype for dtype in (one.dtype, other.dtype) if dtype.itemsize == width]
    return any(_is_equal(one, other, dtype) for dtype in narrow)


def _is_equal(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    if one.shape != other.shape:
        return False
    num_rows = max(1, _CHUNK // max(1, one.shape[1]))
    pieces = zip(one.split(num_rows), other.split(num_rows), strict=True)
    return all(torch.equal(ours.to(dtype), theirs.to(dtype)) for ours, theirs in pieces)


def _and_more(found: Sized) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def dtype_name(dtype: torch.dtype | MatrixKind | str) -> str:
    """A dtype as messages call it."""
    if isinstance(dtype, MatrixKind):
        return dtype.name
    return str(dtype).removeprefix("torch.")
