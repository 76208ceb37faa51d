"""Shapes of models that people run without a GPU; speed asks for no more of them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.limits import Model


@dataclass(frozen=True)
class CpuModel:
    """A model's shape and what its files say besides. Its head is the embedding."""

    family: str
    """Of Hugging Face's ``model_type`` and GGUF's ``general.architecture`` alike."""
    shape: Model
    rope_theta: float
    max_positions: int
    has_qkv_bias: bool
    norm_eps: float

    def layer_matrices(self) -> list[tuple[int, int]]:
        """``(N, K)`` of qkv, o, gate and up, down."""
        one = self.shape
        q, kv = one.num_heads * one.head_dim, one.num_kv_heads * one.head_dim
        hidden, wide = one.hidden_size, one.intermediate_size
        return [(q + 2 * kv, hidden), (hidden, q), (2 * wide, hidden), (hidden, wide)]

    def matrices(self, share: int = 1) -> list[tuple[int, int]]:
        """``(N, K)`` of all that a step multiplies by, of a ``share``-th of layers and head.

        Args:
            share: divides the layers; a part stands for the whole where every matrix is read from
                memory.
        """
        one = self.shape
        layers = self.layer_matrices() * (one.num_layers // share)
        return [*layers, (one.vocab_size // share, one.hidden_size)]

    def num_weights(self) -> int:
        """Of all matrices, the embedding once."""
        return sum(n * k for n, k in self.matrices())


CPU_MODELS = {
    "llama-1b": CpuModel(
        family="llama",
        shape=Model(2048, 8192, 16, 32, 8, 64, 128_256),
        rope_theta=500000.0,
        max_positions=8192,
        has_qkv_bias=False,
        norm_eps=1e-5,
    ),
    "qwen-0.5b": CpuModel(
        family="qwen2",
        shape=Model(896, 4864, 24, 14, 2, 64, 151_936),
        rope_theta=1000000.0,
        max_positions=32768,
        has_qkv_bias=True,
        norm_eps=1e-6,
    ),
    "smollm2": CpuModel(
        family="llama",
        shape=Model(576, 1536, 30, 9, 3, 64, 49152),
        rope_theta=100000.0,
        max_positions=8192,
        has_qkv_bias=False,
        norm_eps=1e-5,
    ),
}
"""Llama-3.2-1B (without its scaled positions), Qwen2.5-0.5B and SmolLM2-135M."""

TINY = CpuModel("llama", Model(64, 128, 2, 4, 2, 16, 512), 10000.0, 512, False, 1e-5)
"""For smoke runs."""
SHAPES = CPU_MODELS | {"tiny": TINY}
"""By name, for commands."""
