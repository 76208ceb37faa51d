"""How a target's tensors may be named and stored: what is expected, what is let pass, what is not.

What ``transformers`` loads to the same tokens loads here: tensors without the ``model.`` before
their names, a tied head stored alone or twice, and buffers that are computed anyway.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from specrt.config import ModelConfig, foreign_tensors
from specrt.models.checkpoint import Checkpoint
from specrt.ops import MatrixKind
from specrt.types import CheckpointError

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

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


def layer_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes of a layer's packed matrices, in the order a decode step reads them."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    return {
        "qkv": (q_rows + 2 * kv_rows, hidden_size),
        "o": (hidden_size, q_rows),
        "gate_up": (2 * intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
    }


def matrix_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Of all matrices that a model multiplies by: those of a layer, and the head."""
    return [*layer_matrices(config).values(), (config.vocab_size, config.hidden_size)]


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of one decoder layer, under Hugging Face's names without its prefix."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_rows, hidden_size, config.has_attention_bias),
        "self_attn.k_proj": (kv_rows, hidden_size, config.has_attention_bias),
        "self_attn.v_proj": (kv_rows, hidden_size, config.has_attention_bias),
        "self_attn.o_proj": (hidden_size, q_rows, config.has_output_bias),
        "mlp.gate_proj": (intermediate_size, hidden_size, config.has_mlp_bias),
        "mlp.up_proj": (intermediate_size, hidden_size, config.has_mlp_bias),
        "mlp.down_proj": (hidden_size, intermediate_size, config.has_mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden_size,),
        "post_attention_layernorm.weight": (hidden_size,),
    }
    for name, (num_rows, num_columns, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (num_rows, num_columns)
        if has_bias:
            shapes[f"{name}.bias"] = (num_rows,)
    if config.has_qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def expected_shapes(config: ModelConfig, has_tables: bool = True) -> dict[str, tuple[int, ...]]:
    """Every key the architecture has, under Hugging Face's names."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (config.hidden_size,)}
    if has_tables:
        shapes[EMBED] = table
        if not config.is_head_tied:
            shapes[HEAD] = table
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
        for names in LAYER_MATRICES.values()
    ]
    if has_tables:
        found += [(EMBED,)] if config.is_head_tied else [(HEAD,), (EMBED,)]
    return found


def weight_bytes(config: ModelConfig, dtype: torch.dtype, has_tables: bool = True) -> int:
    """Bytes of a model's weights: matrices of ``dtype``, norms and biases in float32."""
    sizes = {1: torch.float32.itemsize, 2: dtype.itemsize}
    shapes = expected_shapes(config, has_tables).values()
    return sum(math.prod(shape) * sizes[len(shape)] for shape in shapes)


def use_standard_names(checkpoint: Checkpoint, *, is_head_tied: bool) -> None:
    """Give the tensors of a target's checkpoint Hugging Face's names, whoever saved them.

    Args:
        checkpoint: its keys are changed.
        is_head_tied: a head that is stored alone is the embedding too.
    """
    infos = checkpoint.infos
    if "norm.weight" in infos and not any(key.startswith("model.") for key in infos):
        # The base class saved it, which has no such attribute.
        for key in [key for key in infos if key != HEAD]:
            infos[f"model.{key}"] = infos.pop(key)
    if is_head_tied and HEAD in infos and EMBED not in infos:
        infos[EMBED] = infos.pop(HEAD)


def fit(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    has_tables: bool = True,
    others: Collection[str] = (),
) -> ModelConfig:
    """Bring a checkpoint's names into order and refuse what is not the model of ``config``.

    Nothing but a head that is stored twice is read. Refusals come before anything of the size that
    ``config`` claims is made.

    Args:
        checkpoint: its keys become Hugging Face's.
        config: what it should hold.
        dtype: of the matrices to be loaded.
        has_tables: whether embedding and head are expected.
        others: keys that it has beside the model's.

    Returns:
        The configuration of what is there: the head is untied where it has values of its own.

    Raises:
        CheckpointError: tensors missing, unknown, misshaped or of a wrong dtype; of a checkpoint
            of another kind, its kind.
    """
    use_standard_names(checkpoint, is_head_tied=config.is_head_tied and has_tables)
    try:
        unknown = _check_tensors(checkpoint, config, has_tables, others)
        if HEAD in unknown and config.is_head_tied and EMBED in checkpoint.infos:
            unknown.remove(HEAD)
            config = replace(config, is_head_tied=_is_same_table(checkpoint, dtype))
        if unknown:
            info = checkpoint.infos[unknown[0]]
            raise CheckpointError(
                f"{info.file}: unknown tensor {unknown[0]} {list(info.shape)}{_and_more(unknown)}"
            )
    except CheckpointError as error:
        foreign = foreign_tensors(checkpoint.infos)
        if foreign is None or config.float8_scale_suffix is not None:
            raise
        raise CheckpointError(f"{error}; {foreign}") from error
    return config


def _check_tensors(
    checkpoint: Checkpoint, config: ModelConfig, has_tables: bool, others: Collection[str]
) -> list[str]:
    """Compare headers with what is expected; return the keys that have no place."""
    infos, known = checkpoint.infos, set(others)
    if config.num_layers > len(infos):  # before a name is made for each
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: num_hidden_layers: expected no more layers "
            f"than there are tensors ({len(infos)}), got {config.num_layers}"
        )
    expected = expected_shapes(config, has_tables)
    missing = [key for key in expected if key not in infos]
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: missing tensor {missing[0]} "
            f"{list(expected[missing[0]])}{_and_more(missing)}"
        )
    for key, shape in expected.items():
        info = infos[key]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {key}: expected {list(shape)}, got {list(info.shape)}"
            )
        known.add(key)
        suffix = config.float8_scale_suffix
        if suffix and len(shape) == 2 and info.dtype == torch.float8_e4m3fn:
            known.add(_check_scale(checkpoint, key, key + suffix))
        elif info.dtype not in _FLOATS and not isinstance(info.dtype, MatrixKind):
            raise CheckpointError(
                f"{info.file}: {key}: expected a floating-point tensor, "
                f"got {dtype_name(info.dtype)}"
            )
    known |= checkpoint.idle
    return [key for key in infos if key not in known and not _BUFFERS.search(key)]


def _check_scale(checkpoint: Checkpoint, key: str, scale_key: str) -> str:
    matrix, scale = checkpoint.infos[key], checkpoint.infos.get(scale_key)
    if scale is None:
        raise CheckpointError(f"{matrix.file}: missing tensor {scale_key}, the scale of {key}")
    num_rows = matrix.shape[0]
    if scale.shape not in ((), (1,), (num_rows,), (num_rows, 1)):
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


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def dtype_name(dtype: torch.dtype | MatrixKind | str) -> str:
    """A dtype as messages call it."""
    if isinstance(dtype, MatrixKind):
        return dtype.name
    return str(dtype).removeprefix("torch.")
