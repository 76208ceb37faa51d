"""GGUF files of tiny checkpoints, written by the ``gguf`` package under its own names."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH
from gguf.quants import quantize
from safetensors.torch import load_file

from bench.random_blocks import random_rows
from specrt.models.rope import rope_table

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer; as many tokens as the embedding has rows."""

    tokens: Sequence[str]
    kinds: Sequence[TokenType]
    model: str = "gpt2"
    pre: str | None = "llama-bpe"
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """By the ends of keys of ``tokenizer.ggml``."""


def letters(vocab_size: int) -> Vocabulary:
    """A vocabulary of so many tokens, two of which are pairs of letters."""
    specials = ["<unk>", "<s>", "</s>"]
    pairs = ["Ġa", "ab"]
    alphabet = [chr(code) for code in range(ord("!"), ord("~"))]
    words = ["Ġ", *alphabet, *pairs, *(f"word{i}" for i in range(vocab_size))]
    if vocab_size < len(specials) + 1 + len(alphabet) + len(pairs):
        words = ["Ġ", "a", "b", *pairs, *words[4:]]
    tokens = [*specials, *dict.fromkeys(words)][:vocab_size]
    kinds = [TokenType.UNKNOWN] + [TokenType.CONTROL] * 2
    kinds += [TokenType.NORMAL] * (vocab_size - 3)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return Vocabulary(tokens, kinds, merges=["Ġ a", "a b"], settings=ends)


def write_gguf(
    directory: Path,
    out: Path,
    *,
    kind: str = "F32",
    kinds: Mapping[str, str] = MappingProxyType({}),
    vocabulary: Vocabulary | None = None,
    template: str | None = None,
    edit: Callable[[dict[str, Any]], object] = lambda metadata: None,
    edit_tensors: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
) -> None:
    """Write a Hugging Face directory's model, as llama.cpp's converter would.

    Args:
        directory: of :func:`tests.checkpoints.make_checkpoint`.
        out: the file.
        kind: of the matrices: ``F32``, ``F16``, ``BF16``, ``Q8_0``, ``Q4_0`` or ``Q4_1``; of
            ``Q4_K`` and ``Q6_K`` blocks are drawn at random.
        kinds: of matrices with these words in their names, another kind.
        vocabulary: None: :func:`letters`.
        template: a chat template.
        edit: may change the keys of the architecture and all others, by their whole names; ``...``
            leaves one out.
        edit_tensors: may change the tensors, by the file's names.
    """
    config = json.loads((directory / "config.json").read_text())
    family = "llama" if config["model_type"] == "mistral" else config["model_type"]
    writer = GGUFWriter(out, family)
    metadata = _model_keys(config, family) | _tokenizer_keys(
        vocabulary or letters(config["vocab_size"]), template
    )
    edit(metadata)
    for key, value in metadata.items():
        if value is not ...:
            _add(writer, key, value)
    tensors = _tensors(directory, config)
    edit_tensors(tensors)
    for name, tensor in tensors.items():
        own = next((other for part, other in kinds.items() if part in name), kind)
        stored = GGMLQuantizationType[own if tensor.dim() == 2 else "F32"]
        writer.add_tensor(name, _stored(name, tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    if kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
        # The package does not quantise to these.
        return random_rows(kind.name.lower(), *tensor.shape, seed=zlib.crc32(name.encode()))
    return quantize(tensor.float().numpy(), kind)


def _model_keys(config: dict[str, Any], family: str) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config["vocab_size"],
    }
    if rope.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{family}.{key}": value for key, value in keys.items()}


def _tokenizer_keys(vocabulary: Vocabulary, template: str | None) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "model": vocabulary.model,
        "tokens": list(vocabulary.tokens),
        "token_type": [int(kind) for kind in vocabulary.kinds],
        **vocabulary.settings,
    }
    optional = {"pre": vocabulary.pre, "merges": vocabulary.merges, "scores": vocabulary.scores}
    keys |= {name: value for name, value in optional.items() if value}
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return named | ({"tokenizer.chat_template": template} if template else {})


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    if isinstance(value, Sequence) and not isinstance(value, str):
        writer.add_array(key, value)
    else:
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _tensors(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    family = config["model_type"]
    names = get_tensor_name_map(_ARCHITECTURES[family], config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        turned = heads.get(key.split(".")[-2]) if family in ("llama", "mistral") else None
        if turned is not None:
            halves = tensor.reshape(turned, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        assert name is not None, key
        found[name] = tensor
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _rotary_factors(config, rope)
    return found


def _rotary_factors(config: dict[str, Any], rope: dict[str, Any]) -> torch.Tensor:
    """What plain frequencies are divided by, as the angles of position 1 tell."""
    half = config["head_dim"] // 2
    plain, scaled = (
        torch.atan2(table[1, half:].double(), table[1, :half].double())
        for table in (
            rope_table(config["head_dim"], rope["rope_theta"], 2, scaling)
            for scaling in (None, rope)
        )
    )
    return (plain / scaled).float()
