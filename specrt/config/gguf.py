"""What a GGUF file's metadata say of its model, in the words of a ``config.json``."""

from __future__ import annotations

from typing import Any, NamedTuple

from specrt.config.gguf_header import GgufHeader
from specrt.config.gguf_rope import LINEAR, read_gguf_rope
from specrt.config.values import decimal, flag, positive, size_of
from specrt.types import CheckpointError

_FAMILIES = ("llama", "qwen2", "qwen3")  # Mistral's models are written as llama
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON, _CAUSAL = "attention.layer_norm_rms_epsilon", "attention.causal"
_ROTATED, _KEY_SIZE, _VALUE_SIZE = (
    "rope.dimension_count", "attention.key_length", "attention.value_length",
)  # fmt: skip
_KV_HEADS = "attention.head_count_kv"
_READ = frozenset({
    *_SIZES, *LINEAR, _EPSILON, _CAUSAL, _ROTATED, _KEY_SIZE, _VALUE_SIZE, _KV_HEADS,
    "rope.freq_base", "rope.scaling.type",
})  # fmt: skip
_MEANINGLESS = frozenset({
    "vocab_size", "attention.layer_norm_epsilon", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "tensor_data_layout",
})  # fmt: skip
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_ENDS = ("eos", "eot", "eom")
# What ends a turn or a text by its name alone, as in llama.cpp, whatever the metadata leave out.
_END_NAMES = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>",
    "<end_of_turn>", "<EOT>", "_<EOT>",
})  # fmt: skip
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EMBED = "token_embd.weight"


class GgufSettings(NamedTuple):
    """What :class:`specrt.config.ModelConfig` is made from."""

    data: dict[str, Any]
    """As the content of a ``config.json``; the dtype is that of the matrices, float16 where they
    lie in blocks."""
    generation: dict[str, Any]
    """As the content of a ``generation_config.json``."""
    has_attention_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool


def read_gguf_settings(header: GgufHeader) -> GgufSettings:
    """Read the metadata of a GGUF file's model.

    Raises:
        CheckpointError: another architecture, a key that is missing, malformed or may change what
            is computed, or a vocabulary that does not fit the embedding.
    """
    return _Reader(header).settings()


class _Reader:
    """Takes metadata apart, naming the file and the key in every refusal."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._metadata = header.metadata
        self._source = str(header.file)
        self._family = self._architecture()

    def settings(self) -> GgufSettings:
        self._refuse_others()
        data: dict[str, Any] = {ours: self._size(key) for key, ours in _SIZES.items()}
        head_dim = self._head_dim(data["hidden_size"], data["num_attention_heads"])
        data |= {
            **read_gguf_rope(self._header, self._family, head_dim),
            "model_type": self._family,
            "num_key_value_heads": self._size(_KV_HEADS, data["num_attention_heads"]),
            "head_dim": head_dim,
            "rms_norm_eps": decimal(positive(self._get(_EPSILON), *self._named(_EPSILON))),
            "vocab_size": self._vocab_size(),
            "tie_word_embeddings": "output.weight" not in self._header.tensors,
            "bos_token_id": self._token("bos"),
            "eos_token_id": self._ends(),
            "torch_dtype": _DTYPES.get(self._matrix_kind(), "float16"),
        }
        return GgufSettings(
            data,
            self._generation(),
            has_attention_bias=self._has("attn_q.bias") or self._family == "qwen2",
            has_output_bias=self._has("attn_output.bias"),
            has_mlp_bias=self._has("ffn_down.bias"),
        )

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {message}")

    def _named(self, key: str) -> tuple[str, str]:
        return f"{self._family}.{key}", self._source

    def _get(self, key: str) -> Any:
        value = self._metadata.get(f"{self._family}.{key}")
        if value is None:
            raise self._fail(f"missing key {self._family}.{key}")
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        if default is not None and f"{self._family}.{key}" not in self._metadata:
            return default
        return size_of(self._get(key), *self._named(key))

    def _has(self, name: str) -> bool:
        return f"blk.0.{name}" in self._header.tensors

    def _architecture(self) -> str:
        kind = self._metadata.get("general.type", "model")
        if kind != "model":
            raise self._fail(f"general.type: expected model, got {kind!r}")
        family = self._metadata.get("general.architecture")
        if not isinstance(family, str) or family not in _FAMILIES:
            supported = ", ".join(_FAMILIES)
            raise self._fail(
                f"general.architecture {family!r} is not supported (supported: {supported})"
            )
        return family

    def _refuse_others(self) -> None:
        """Refuse a key that may change what the model computes, by a value that does not say no."""
        for key, value in self._metadata.items():
            architecture, _, name = key.partition(".")
            if architecture != self._family or name in _READ | _MEANINGLESS:
                continue
            is_off = not value or (isinstance(value, bool | float) and value == 1)
            if not is_off:
                raise self._fail(
                    f"{key}: unknown, and {value!r} may change what the model computes"
                )
        is_causal = self._metadata.get(f"{self._family}.{_CAUSAL}", True)
        if not flag(is_causal, *self._named(_CAUSAL)):
            raise self._fail(f"{self._family}.{_CAUSAL}: expected true, got false")

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        head_dim = self._size(_KEY_SIZE, hidden_size // num_heads)
        for key in (_VALUE_SIZE, _ROTATED):
            if self._size(key, head_dim) != head_dim:
                raise self._fail(
                    f"{self._family}.{key}: expected {head_dim}, the size of a head, "
                    f"got {self._size(key)}"
                )
        return head_dim

    def _vocab_size(self) -> int:
        """Rows of the embedding, of which each needs a token."""
        embed = self._header.tensors.get(_EMBED)
        if embed is None:
            raise self._fail(f"missing tensor {_EMBED}")
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) != embed.shape[0]:
            raise self._fail(
                f"tokenizer.ggml.tokens: expected {embed.shape[0]}, a token for each row of "
                f"{_EMBED}, got {len(tokens)}"
            )
        return embed.shape[0]

    def _matrix_kind(self) -> str:
        matrix = self._header.tensors.get("blk.0.ffn_down.weight")
        return "" if matrix is None else matrix.kind

    def _token(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token = self._metadata.get(key)
        if token is not None and (type(token) is not int or not 0 <= token < self._vocab_size()):
            raise self._fail(
                f"{key}: expected a token id below {self._vocab_size()}, got {token!r}"
            )
        return token

    def _ends(self) -> list[int]:
        """Tokens that end the output; the one that the file names first goes first."""
        ends = [token for token in map(self._token, _ENDS) if token is not None]
        tokens = self._metadata.get("tokenizer.ggml.tokens", [])
        ends += [index for index, token in enumerate(tokens) if token in _END_NAMES]
        return list(dict.fromkeys(ends))

    def _generation(self) -> dict[str, Any]:
        """How the authors would sample, as a ``generation_config.json`` would say it."""
        said = {
            ours: self._metadata.get(f"general.sampling.{name}") for name, ours in _SAMPLING.items()
        }
        given: dict[str, Any] = {
            key: decimal(value) if isinstance(value, float) else value
            for key, value in said.items()
            if value is not None
        }
        return given | ({"do_sample": True} if "temperature" in given else {})
