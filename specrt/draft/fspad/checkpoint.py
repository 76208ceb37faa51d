"""Checkpoints of one-layer drafters: FSPAD, EAGLE-1/2 and the two ablations between them.

One class of model, two switches (arXiv 2408.15562, section 3): feature sampling, and an output
split in a half for the logits and a half for the next feature. Read are our own format (a
``config.json`` with ``"drafter"`` and the fingerprint of its target) and the official layouts of
FSPAD and EAGLE-1/2 (:mod:`specrt.draft.fspad.official`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from specrt.config import Form, ModelConfig, config_file, config_fingerprint, read_json
from specrt.draft.files import (
    FORMAT_VERSION,
    QUANTIZATION_KEYS,
    check_bytes,
    is_stored_as_bytes,
    write_files,
)
from specrt.draft.fspad.official import HEAD, LAYER, official_flags, open_drafter
from specrt.draft.made_for import target_entry
from specrt.models.checkpoint import Checkpoint
from specrt.types import CheckpointError

ARCHS: Mapping[str, tuple[bool, bool]] = {
    "fspad": (True, True),
    "eagle2": (False, False),
    "no-feature-sampling": (False, True),
    "no-split": (True, False),
}
"""What ``specrt train fspad --arch`` may say: has_feature_sampling, has_split_output."""

EMBED = "embed_tokens.weight"
TOKEN_IDS = "draft_token_ids"
_SAID_OTHERWISE = (
    "architectures", "rope_theta", "rope_scaling", "torch_dtype", *QUANTIZATION_KEYS,
)  # fmt: skip
_BIASES = tuple(f"{LAYER}self_attn.{name}_proj.bias" for name in "qkv")
_IGNORED = ".rotary_emb.inv_freq"
_ROPES = ("default", "linear", "llama3")
"""Rope types that a drafter takes over from its target; else it has plain rotary embedding."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class DraftConfig:
    """The architecture of a one-layer drafter and the target it belongs to."""

    layer: ModelConfig
    """Its decoder layer, as a Llama model of one layer; ``layer.dtype`` is the checkpoint's."""
    has_feature_sampling: bool
    has_split_output: bool
    draft_vocab_size: int | None = None
    """R, where the head covers only the most frequent tokens (``draft_token_ids``)."""
    target_name: str | None = None
    target_fingerprint: str | None = None
    """``config_fingerprint`` of the target; None in official checkpoints."""
    target_adapter: str | None = None
    """``adapter_hash`` of what was merged into it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``config.json`` that mean nothing to us; kept when saving."""
    is_int8: bool = False
    """Whether its file holds matrices as bytes (:func:`specrt.draft.files.in_bytes`)."""

    @classmethod
    def for_target(
        cls, target: ModelConfig, arch: str, *, name: str, intermediate_size: int | None = None
    ) -> DraftConfig:
        """A drafter of the target's own proportions, a Llama's layer whatever the target's are.

        Args:
            target: the model it will draft for.
            arch: a key of :data:`ARCHS`.
            name: what to call the target in the checkpoint.
            intermediate_size: I; the target's by default.

        Raises:
            ValueError: ``arch`` is unknown.
        """
        if arch not in ARCHS:
            raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch!r}")
        rope = target.rope_scaling
        layer = replace(
            target,
            architecture="llama",
            form=Form(),
            rope_scaling=rope if rope and rope.get("rope_type") in _ROPES else None,
            num_layers=1,
            intermediate_size=intermediate_size or target.intermediate_size,
            has_attention_bias=False,
            has_output_bias=False,
            has_mlp_bias=False,
            has_qk_norm=False,
            is_head_tied=False,
            dtype=torch.bfloat16,
            float8_scale_suffix=None,
        )
        return cls(layer, *ARCHS[arch], None, name, config_fingerprint(target))

    @property
    def arch(self) -> str:
        """The key of :data:`ARCHS` that names the two switches."""
        flags = (self.has_feature_sampling, self.has_split_output)
        return next(name for name, those in ARCHS.items() if those == flags)


def tensor_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the drafter needs, by its official name (``fc``'s bias may be missing)."""
    layer = config.layer
    hidden, wide = layer.hidden_size, layer.intermediate_size
    q_rows, kv_rows = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.has_feature_sampling:
        shapes |= {
            "fc.fc.weight": (hidden, 2 * hidden),
            "fc.fc.bias": (hidden,),
            "fc.mlp.gate_proj.weight": (wide, hidden),
            "fc.mlp.up_proj.weight": (wide, hidden),
            "fc.mlp.down_proj.weight": (hidden, wide),
            "fc.post_attention_layernorm.weight": (hidden,),
        }
    else:
        shapes |= {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)}
    num_halves = 2 if config.has_split_output else 1
    attention, mlp = f"{LAYER}self_attn.", f"{LAYER}mlp."
    shapes |= {
        f"{attention}q_proj.weight": (q_rows, hidden),
        f"{attention}k_proj.weight": (kv_rows, hidden),
        f"{attention}v_proj.weight": (kv_rows, hidden),
        f"{attention}o_proj.weight": (hidden, q_rows),
        f"{LAYER}post_attention_layernorm.weight": (hidden,),
        f"{mlp}gate_proj.weight": (wide, hidden),
        f"{mlp}up_proj.weight": (wide, hidden),
        f"{mlp}down_proj.weight": (num_halves * hidden, wide),
    }
    if layer.has_attention_bias:
        shapes |= zip(_BIASES, ((q_rows,), (kv_rows,), (kv_rows,)), strict=True)
    return shapes


def matrix_keys(config: DraftConfig) -> list[str]:
    """The tensors that may be stored as bytes."""
    return [key for key, shape in tensor_shapes(config).items() if len(shape) == 2]


def is_draft_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a drafter of this kind, rather than a small model.

    Raises:
        CheckpointError: the directory has no readable weights.
    """
    file = Path(path) / "config.json"
    if file.is_file() and "drafter" in read_json(file):
        return True
    keys = open_drafter(path).infos
    return "fc.weight" in keys or "fc.fc.weight" in keys


def read_checkpoint(
    path: str | os.PathLike[str], target: ModelConfig | None = None
) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Read a drafter, ours or an official FSPAD or EAGLE-1/2 one.

    Args:
        path: its directory.
        target: the model it shall draft for; a drafter that does not fit is refused.

    Returns:
        The configuration, and the tensors of :func:`tensor_shapes` as stored, with
        :data:`TOKEN_IDS`, :data:`EMBED` and ``HEAD`` where the checkpoint has them. Matrices that
        are stored quantised are the values they stand for.

    Raises:
        CheckpointError: files missing or broken, another kind or version, tensors missing, unknown,
            misshaped or not finite, or made for another target.
    """
    file = config_file(path)
    data = read_json(file)
    if "drafter" in data:  # ours
        check_bytes(file.parent, data)
    checkpoint = open_drafter(file.parent)
    config = _read_config(file, data, checkpoint)
    if target is not None:
        _check_target(file, config, target)
    _check_tensors(checkpoint, config)
    tensors = {
        key: _finite(checkpoint, key) for key in checkpoint.infos if not key.endswith(_IGNORED)
    }
    if TOKEN_IDS in tensors:
        _check_token_ids(checkpoint, tensors[TOKEN_IDS], config.layer.vocab_size)
    return config, tensors


def check_fit(path: str | os.PathLike[str], target: ModelConfig) -> None:
    """Refuse a drafter that was made for another target; no tensor is read.

    Raises:
        CheckpointError: so, or its configuration is missing or broken.
    """
    file = config_file(path)
    data = read_json(file)
    _check_target(file, _read_config(file, data, open_drafter(file.parent)), target)


def reduce_vocabulary(
    config: DraftConfig, tensors: Mapping[str, torch.Tensor], counts: torch.Tensor, size: int
) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Let a drafter propose the most frequent tokens only; its text stays the target's own.

    The head is the target's, so a drafter that was reduced before may be reduced anew.

    Args:
        config: the drafter's.
        tensors: its tensors; they are shared with the result.
        counts: ``[V]``, how often each token occurs; ties go to the lower id.
        size: R, the tokens to keep, 1..V.

    Returns:
        The configuration, and the tensors with :data:`TOKEN_IDS` ``[R]`` int32, increasing.

    Raises:
        ValueError: ``counts`` or ``size`` does not fit the vocabulary.
    """
    vocab_size = config.layer.vocab_size
    if tuple(counts.shape) != (vocab_size,) or bool(counts.isnan().any()):
        raise ValueError(
            f"counts: expected [{vocab_size}] numbers, got {list(counts.shape)} of {counts.dtype}"
        )
    if not 1 <= size <= vocab_size:
        raise ValueError(f"size: expected 1..{vocab_size}, got {size}")
    order = counts.sort(descending=True, stable=True).indices
    ids = order[:size].sort().values.to("cpu", torch.int32)
    return replace(config, draft_vocab_size=size), {**tensors, TOKEN_IDS: ids}


def write_checkpoint(
    path: str | os.PathLike[str], config: DraftConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a drafter in our own format; both files are whole before either takes its place.

    Raises:
        ValueError: a tensor is missing or misshaped.
        OSError: the files cannot be written; those of before are left as they were.
    """
    as_bytes = matrix_keys(config) if config.is_int8 else ()
    write_files(path, _as_dict(config), tensors, _required_shapes(config), as_bytes)


# --- config.json ----------------------------------------------------------------------------------


def _as_dict(config: DraftConfig) -> dict[str, Any]:
    layer = config.layer
    rope = {"rope_type": "default", **(layer.rope_scaling or {}), "rope_theta": layer.rope_theta}
    return {
        **config.extra,
        "drafter": "eagle" if config.arch == "eagle2" else "fspad",
        "format_version": FORMAT_VERSION,
        "has_feature_sampling": config.has_feature_sampling,
        "has_split_output": config.has_split_output,
        "target": target_entry(config),
        "draft_vocab_size": config.draft_vocab_size,
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": layer.vocab_size,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": layer.max_positions,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }


def _read_config(file: Path, data: dict[str, Any], checkpoint: Checkpoint) -> DraftConfig:
    is_ours = "drafter" in data
    flags = _own_flags(file, data) if is_ours else official_flags(checkpoint)
    # Official configurations leave out what Llama's defaults say; and their "architectures" may
    # name a class of their authors'.
    llama = {"model_type": "llama", "max_position_embeddings": 2048, **data, "architectures": None}
    layer = ModelConfig.from_dict({**llama, "num_hidden_layers": 1}, source=str(file))
    layer = replace(layer, has_attention_bias=any(key in checkpoint.infos for key in _BIASES))
    target, size = data.get("target") or {}, data.get("draft_vocab_size")
    if not isinstance(target, dict):
        raise CheckpointError(f"{file}: target: expected an object, got {target!r}")
    if size is not None and not (type(size) is int and 1 <= size <= layer.vocab_size):
        raise CheckpointError(
            f"{file}: draft_vocab_size: expected null or 1..{layer.vocab_size}, got {size!r}"
        )
    known = {*_as_dict(DraftConfig(layer, *flags)), *_SAID_OTHERWISE}
    return DraftConfig(
        layer,
        *flags,
        draft_vocab_size=size,
        target_name=target.get("name"),
        target_fingerprint=target.get("fingerprint"),
        target_adapter=target.get("adapter"),
        extra={key: value for key, value in data.items() if key not in known},
        is_int8=is_ours and is_stored_as_bytes(data),
    )


def _own_flags(file: Path, data: Mapping[str, Any]) -> tuple[bool, bool]:
    kind, version = data["drafter"], data.get("format_version")
    if kind not in ("fspad", "eagle"):
        raise CheckpointError(f"{file}: this version has no drafter of kind {kind!r}")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version: this version reads {FORMAT_VERSION}, got {version!r}"
        )
    flags = data.get("has_feature_sampling"), data.get("has_split_output")
    if not all(isinstance(flag, bool) for flag in flags):
        raise CheckpointError(
            f"{file}: has_feature_sampling, has_split_output: expected true or false, got {flags}"
        )
    return bool(flags[0]), bool(flags[1])


def _check_target(file: Path, config: DraftConfig, target: ModelConfig) -> None:
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(config.layer, key), getattr(target, key)
        if ours != theirs:
            raise CheckpointError(f"{file}: {key}: the target has {theirs}, this drafter {ours}")
    fingerprint = config_fingerprint(target)
    if config.target_fingerprint not in (None, fingerprint):
        raise CheckpointError(
            f"{file}: made for another target ({config.target_name}, fingerprint "
            f"{config.target_fingerprint}; this one has {fingerprint})"
        )


# --- tensors --------------------------------------------------------------------------------------


def _required_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of :func:`tensor_shapes`, and the head's tokens where it has not all."""
    if config.draft_vocab_size is None:
        return tensor_shapes(config)
    return {**tensor_shapes(config), TOKEN_IDS: (config.draft_vocab_size,)}


def _check_tensors(checkpoint: Checkpoint, config: DraftConfig) -> None:
    infos, expected = checkpoint.infos, _required_shapes(config)
    optional = dict.fromkeys((EMBED, HEAD), (config.layer.vocab_size, config.layer.hidden_size))
    for key, shape in expected.items():
        if key not in infos and not key.endswith("fc.bias"):
            raise CheckpointError(f"{checkpoint.directory}: missing tensor {key} {list(shape)}")
    for key, info in infos.items():
        if key.endswith(_IGNORED):
            continue
        wanted = expected.get(key, optional.get(key))
        if wanted is None:
            raise CheckpointError(f"{info.file}: unknown tensor {key} {list(info.shape)}")
        if info.shape != wanted:
            raise CheckpointError(
                f"{info.file}: {key}: expected {list(wanted)}, got {list(info.shape)}"
            )
        is_right = info.dtype == torch.int32 if key == TOKEN_IDS else info.dtype in _FLOATS
        if not is_right:
            kind = "int32" if key == TOKEN_IDS else "a floating-point tensor"
            raise CheckpointError(f"{info.file}: {key}: expected {kind}, got {info.dtype}")


def _finite(checkpoint: Checkpoint, key: str) -> torch.Tensor:
    tensor = checkpoint.tensor(key)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{checkpoint.infos[key].file}: {key}: has NaN or infinite values")
    return tensor


def _check_token_ids(checkpoint: Checkpoint, ids: torch.Tensor, vocab_size: int) -> None:
    is_increasing = len(ids) > 0 and not bool((ids[1:] <= ids[:-1]).any())
    if not is_increasing or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        file = checkpoint.infos[TOKEN_IDS].file
        raise CheckpointError(
            f"{file}: {TOKEN_IDS}: expected increasing token ids in 0..{vocab_size - 1}"
        )
