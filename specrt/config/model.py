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
from specrt.config.families import FAMILIES, NOT_THEIR_TEXT, why_refused
from specrt.config.family import Family
from specrt.config.form import Form
from specrt.config.generation import GenerationDefaults, read_generation
from specrt.config.gguf import read_gguf_settings
from specrt.config.gguf_header import GgufHeader, read_gguf_header
from specrt.config.keys import refuse_unknown_keys
from specrt.config.quantization import read_quantization
from specrt.config.rope import Rope, read_rope
from specrt.config.shape import (
    eps_of,
    form_of,
    head_dim_of,
    intermediate_size_of,
    kv_heads_of,
)
from specrt.config.wrappers import text_data, wrapper_of
from specrt.types import CheckpointError

FLOAT8_FORMAT = "float8_e4m3fn"
"""Our own storage of matrices: float8 values beside power-of-two scales."""


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float32,  # no kernel reads float64 weights
}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a target."""

    architecture: str
    """The family, by its ``model_type`` (:data:`specrt.config.families.FAMILIES`)."""
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
    """``None`` for plain rotary embedding, else ``rope_type`` and its numbers under transformers'
    names, with nothing left to work out:

    =========== ==================================================================================
    linear      factor
    llama3      factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    yarn        factor, beta_fast, beta_slow, attention_factor, original_max_position_embeddings,
                truncate
    longrope    factors (one a turned pair, those of short texts), attention_factor
    =========== ==================================================================================
    """
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
    notices: tuple[str, ...] = ()
    """What a user should know of how the model is run."""

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
        text = text_data(data)
        refuse_unknown_keys(text, str(file), FAMILIES[str(text["model_type"])].known)
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
    apart = {
        "bos_id", "eos_ids", "dtype", "float8_scale_suffix", "max_positions", "generation",
        "notices",
    }  # fmt: skip
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
        self.wrapper = wrapper_of(data)
        self.generation = data if generation is None else generation
        data = text_data(data)
        self.data = data
        self.source = source
        is_own = generation is not None
        self.generation_source = (
            str(Path(source).with_name("generation_config.json")) if is_own else source
        )
        self.model_type = str(data.get("model_type"))
        self.family = self._family()
        self.keys = self.family.keys(data, source)

    def config(self) -> ModelConfig:
        self._refuse_unsupported()
        keys, family = self.keys, self.family
        num_heads = keys.size("num_attention_heads")
        head_dim = head_dim_of(family, keys, num_heads)
        rope = self._rope(head_dim)
        return ModelConfig(
            architecture=family.runs_as or self.model_type,
            vocab_size=keys.size("vocab_size"),
            hidden_size=keys.size("hidden_size"),
            intermediate_size=intermediate_size_of(keys),
            num_layers=keys.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=kv_heads_of(family, keys, num_heads),
            head_dim=head_dim,
            rms_norm_eps=eps_of(family, keys),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_positions=rope.context,
            has_attention_bias=self._says(family.qkv_bias),
            has_output_bias=self._says(family.output_bias),
            has_mlp_bias=self._says(family.mlp_bias),
            has_qk_norm=family.has_qk_norm,
            is_head_tied=keys.flag("tie_word_embeddings"),
            bos_id=next(iter(self._token_ids("bos_token_id")), None),
            eos_ids=self._token_ids("eos_token_id"),
            dtype=self._dtype(),
            float8_scale_suffix=self._scale_suffix(),
            form=form_of(family, keys, rope, head_dim),
            notices=self._notices(rope),
            generation=read_generation(
                self.generation, self.generation_source, keys.size("vocab_size")
            ),
        )

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {message}")

    def _family(self) -> Family:
        family = self.data.get("model_type")
        supported = ", ".join(FAMILIES)
        if self.wrapper is not None and self.wrapper in NOT_THEIR_TEXT:
            raise self._fail(
                f"model_type {self.wrapper!r} is not supported: it has "
                f"{NOT_THEIR_TEXT[self.wrapper]}"
            )
        inside = "" if self.wrapper is None else f" (in the text_config of {self.wrapper!r})"
        if not isinstance(family, str) or family not in FAMILIES:
            reason = why_refused(family, self.data)
            because = "" if reason is None else f": it has {reason}"
            raise self._fail(
                f"model_type {family!r}{inside} is not supported{because} (supported: {supported})"
            )
        architectures = self.data.get("architectures")
        names = architectures if isinstance(architectures, list) else [architectures]
        known = FAMILIES[family].class_names
        if architectures and self.wrapper is None and not {*known} & {*map(str, names)}:
            named = ", ".join(map(str, names))
            raise self._fail(
                f"architecture {named} is not supported (of model_type {family}: {known[0]})"
            )
        return FAMILIES[family]

    def _refuse_unsupported(self) -> None:
        read_quantization(self.data, self.source)
        for key, wanted in self.family.wanted.items():
            value = self.data.get(key)
            if key in self.data and value not in wanted:
                raise self._fail(f"{key}: expected {wanted[-1]!r}, got {value!r}")

    def _says(self, bias: str | bool) -> bool:
        return self.keys.flag(bias) if isinstance(bias, str) else bias

    def _rope(self, head_dim: int) -> Rope:
        if not self.family.has_rope:
            return Rope(10000.0, None, self.keys.size("max_position_embeddings"))
        return read_rope(self.keys, self.family, head_dim)

    def _notices(self, rope: Rope) -> tuple[str, ...]:
        wrapped = self.wrapper and f"the text model of {self.wrapper} alone ({self.model_type})"
        return tuple(filter(None, (wrapped, rope.notice)))

    def _token_ids(self, key: str) -> tuple[int, ...]:
        """The generation config's ids where it has some, else the model config's."""
        source, value = self.generation_source, self.generation.get(key)
        if value is None:
            source, value = self.source, self.keys.get(key)
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
