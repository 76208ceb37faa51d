"""The shape of a target model, read from a Hugging Face ``config.json`` or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from specrt.config.directory import config_file, gguf_path, read_json, refuse_adapter
from specrt.config.families import ARCHITECTURES, DEFAULTS
from specrt.config.form import Form
from specrt.config.generation import GenerationDefaults, read_generation
from specrt.config.gguf import read_gguf_settings
from specrt.config.gguf_header import GgufHeader, read_gguf_header
from specrt.config.keys import refuse_unknown_keys
from specrt.config.quantization import read_quantization
from specrt.config.rope import Rope, read_rope
from specrt.config.values import flag, positive, size_of
from specrt.types import CheckpointError

FLOAT8_FORMAT = "float8_e4m3fn"
"""Our own storage of matrices: float8 values beside power-of-two scales."""

_REQUIRED = object()
_LARGEST_HEAD = 256  # of any device; some take less (models/placement.py)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float32,  # no kernel reads float64 weights
}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a target of the Llama, Mistral, Qwen2 or Qwen3 family."""

    architecture: str
    """The family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = field(hash=False)
    """``None`` for plain rotary embedding, else ``rope_type`` (``linear`` or ``llama3``) and its
    factors under transformers' names."""
    max_positions: int
    has_attention_bias: bool
    """Biases on q, k and v."""
    has_output_bias: bool
    """A bias on o."""
    has_mlp_bias: bool
    has_qk_norm: bool
    is_head_tied: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    """What the checkpoint says its weights are; float32 where it does not say."""
    float8_scale_suffix: str | None = None
    """Set when matrices are stored as float8 beside a scale whose key ends so."""
    form: Form = field(default_factory=Form)
    """What the family does where families differ."""
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What applies where a request says nothing, and how the authors would sample."""

    @classmethod
    def from_directory(
        cls, path: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None
    ) -> ModelConfig:
        """Read ``config.json`` and, where there is one, ``generation_config.json``.

        Args:
            path: a local Hugging Face directory; or a GGUF file, or a directory with one in place
                of other weights, of which its metadata are read.
            adapter: a directory with a LoRA adapter that will be merged, which may be the same.

        Raises:
            CheckpointError: no such directory or file, not JSON, a model specrt cannot run, a key
                that nobody knows and that may change the model, or another LoRA adapter beside it.
        """
        gguf = gguf_path(path)
        if gguf is not None:
            return cls.from_gguf(read_gguf_header(gguf))
        file = config_file(path)
        directory = file.parent
        refuse_adapter(directory, adapter)
        generation_file = directory / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else None
        data = read_json(file)
        config = cls.from_dict(data, generation, source=str(file))
        refuse_unknown_keys(data, str(file))
        return config

    @classmethod
    def from_gguf(cls, header: GgufHeader) -> ModelConfig:
        """Read a GGUF file's metadata.

        Raises:
            CheckpointError: a key is missing, malformed or may change what is computed, or the
                model is not one specrt runs.
        """
        settings = read_gguf_settings(header)
        config = cls.from_dict(settings.data, settings.generation, source=str(header.file))
        return replace(
            config,
            has_attention_bias=settings.has_attention_bias,
            has_output_bias=settings.has_output_bias,
            has_mlp_bias=settings.has_mlp_bias,
        )

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        source: str = "config.json",
    ) -> ModelConfig:
        """Read the parsed content of a ``config.json``, of transformers 4 or 5.

        Args:
            data: the configuration.
            generation: the content of ``generation_config.json``; its token ids go first. Without
                it ``data`` itself may hold such settings, as old checkpoints do.
            source: what errors call the file.

        Raises:
            CheckpointError: a key is missing or malformed, or the model is not one specrt runs.
        """
        return _Reader(data, generation, source).config()


def config_fingerprint(config: ModelConfig) -> str:
    """Sixteen hex digits that change when anything that defines the architecture changes.

    Token ids, the checkpoint's dtype, its storage, the context limit and how its authors would
    sample do not count: a drafter fits a target whatever these are.
    """
    apart = {"bos_id", "eos_ids", "dtype", "float8_scale_suffix", "max_positions", "generation"}
    content = {name: value for name, value in vars(config).items() if name not in apart}
    content["rope_scaling"] = dict(config.rope_scaling) if config.rope_scaling else None
    # Of a Llama it says nothing, so that drafters made before there were others still fit.
    form = content.pop("form")
    if form != Form():
        content["form"] = asdict(form)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _Reader:
    """Takes one ``config.json`` apart, naming the file and the key in every refusal."""

    def __init__(
        self, data: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str
    ) -> None:
        self.data = data
        self.source = source
        self.generation = data if generation is None else generation
        is_own = generation is not None
        self.generation_source = (
            str(Path(source).with_name("generation_config.json")) if is_own else source
        )
        self.family = self._family()

    def config(self) -> ModelConfig:
        self._refuse_unsupported()
        num_heads = self._size("num_attention_heads")
        head_dim = self._head_dim(num_heads)
        rope = self._rope()
        attention_bias = self.family in ("llama", "qwen3") and self._flag("attention_bias")
        return ModelConfig(
            architecture=self.family,
            vocab_size=self._size("vocab_size"),
            hidden_size=self._size("hidden_size"),
            intermediate_size=self._size("intermediate_size"),
            num_layers=self._size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads(num_heads),
            head_dim=head_dim,
            rms_norm_eps=positive(self.data.get("rms_norm_eps", 1e-6), "rms_norm_eps", self.source),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_positions=rope.context,
            has_attention_bias=attention_bias or self.family == "qwen2",
            has_output_bias=attention_bias,
            has_mlp_bias=self.family == "llama" and self._flag("mlp_bias"),
            has_qk_norm=self.family == "qwen3",
            is_head_tied=self._flag("tie_word_embeddings"),
            bos_id=next(iter(self._token_ids("bos_token_id")), None),
            eos_ids=self._token_ids("eos_token_id"),
            dtype=self._dtype(),
            float8_scale_suffix=self._scale_suffix(),
            generation=read_generation(
                self.generation, self.generation_source, self._size("vocab_size")
            ),
        )

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {message}")

    def _get(self, key: str, default: Any = None) -> Any:
        """The key's value, or the family's default; a null stays a null, as in transformers."""
        return self.data.get(key, DEFAULTS[self.family].get(key, default))

    def _family(self) -> str:
        family = self.data.get("model_type")
        supported = ", ".join(DEFAULTS)
        if isinstance(self.data.get("text_config"), dict):
            inner = self.data["text_config"].get("model_type")
            raise self._fail(
                f"model_type {family!r} is a multimodal wrapper, which is not supported; the model "
                f"in its text_config ({inner!r}) would be if stored by itself "
                f"(supported: {supported})"
            )
        if not isinstance(family, str) or family not in DEFAULTS:
            raise self._fail(f"model_type {family!r} is not supported (supported: {supported})")
        architectures = self.data.get("architectures")
        names = architectures if isinstance(architectures, list) else [architectures]
        # The base class alone saves the same tensors, less the head.
        known = (ARCHITECTURES[family], ARCHITECTURES[family].replace("ForCausalLM", "Model"))
        if architectures and not {*known} & {*map(str, names)}:
            named = ", ".join(map(str, names))
            wanted = ", ".join(ARCHITECTURES.values())
            raise self._fail(f"architecture {named} is not supported (supported: {wanted})")
        return family

    def _refuse_unsupported(self) -> None:
        activation = self._get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self._fail(f"hidden_act: expected silu, got {activation}")
        read_quantization(self.data, self.source)
        window = self._active_window()
        if window is not None:
            raise self._fail(f"a sliding attention window ({window}) is not supported")

    def _active_window(self) -> str | None:
        """The window that would change what some layer attends to, or None."""
        layer_types = self.data.get("layer_types")
        if layer_types is not None:
            kinds = layer_types if isinstance(layer_types, list) else [layer_types]
            other = sorted({str(kind) for kind in kinds} - {"full_attention"})
            if other:
                return f"layer_types has {', '.join(other)}"
        if self._get("sliding_window") is None:
            return None
        window = self._size("sliding_window")
        if window >= self._rope().context:
            return None  # it never hides anything
        if self.family == "mistral":
            return f"sliding_window {window}"
        if self.family in ("qwen2", "qwen3") and self._flag("use_sliding_window"):
            is_reached = self._size("num_hidden_layers") > self._size("max_window_layers")
            if layer_types is None and is_reached:
                return f"use_sliding_window with sliding_window {window}"
        return None

    def _size(self, key: str) -> int:
        value = self._get(key, _REQUIRED)
        if value is _REQUIRED:
            raise self._fail(f"missing key {key}")
        return size_of(value, key, self.source)

    def _flag(self, key: str) -> bool:
        return flag(self._get(key, False), key, self.source)

    def _head_dim(self, num_heads: int) -> int:
        if self._get("head_dim") is not None:
            head_dim = self._size("head_dim")
        else:
            hidden_size = self._size("hidden_size")
            if hidden_size % num_heads:
                raise self._fail(
                    f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                    f"{num_heads}"
                )
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise self._fail(f"head_dim: rotary embedding needs an even size, got {head_dim}")
        if head_dim > _LARGEST_HEAD:
            raise self._fail(
                f"head_dim: kernels take at most {_LARGEST_HEAD}, the model has {head_dim}"
            )
        return head_dim

    def _num_kv_heads(self, num_heads: int) -> int:
        if self._get("num_key_value_heads") is None:
            return num_heads
        num_kv_heads = self._size("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise self._fail(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
                f"{num_kv_heads}"
            )
        return num_kv_heads

    def _rope(self) -> Rope:
        return read_rope(self.data, self._size("max_position_embeddings"), self.source)

    def _token_ids(self, key: str) -> tuple[int, ...]:
        """The generation config's ids where it has some, else the model config's."""
        source, value = self.generation_source, self.generation.get(key)
        if value is None:
            source, value = self.source, self._get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, (list, tuple)) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise CheckpointError(f"{source}: {key}: expected token ids, got {value!r}")
        # Some checkpoints write -1 for "none"; an id no token has can never match either.
        return tuple(token for token in ids if token >= 0)

    def _dtype(self) -> torch.dtype:
        name = self.data.get("dtype") or self.data.get("torch_dtype") or "float32"
        dtype = _DTYPES.get(str(name).removeprefix("torch."))
        if dtype is None:
            raise self._fail(f"dtype: expected one of {', '.join(_DTYPES)}, got {name!r}")
        return dtype

    def _scale_suffix(self) -> str | None:
        storage = self.data.get("specrt_storage")
        if storage is None:
            return None
        if not isinstance(storage, Mapping) or storage.get("format") != FLOAT8_FORMAT:
            raise self._fail(f"specrt_storage: expected format {FLOAT8_FORMAT}, got {storage!r}")
        suffix = storage.get("scale_suffix")
        if not isinstance(suffix, str) or not suffix:
            raise self._fail(f"specrt_storage.scale_suffix: expected a string, got {suffix!r}")
        return suffix
