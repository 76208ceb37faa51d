"""What families of targets do differently, as data; the defaults are Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
RopeChoice = Literal["main", "local", "none"]

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
ACTIVATION_NAMES: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""What configurations call them; ``gelu`` alone is by the error function."""


@dataclass(frozen=True)
class LayerKind:
    """What sets some layers apart from others of their model."""

    window: int | None = None
    """A row attends to the last so many positions, its own among them; None: to all of them."""
    rope: RopeChoice = "main"
    """Its rotary embedding: ``rope_theta`` and ``rope_scaling`` of the model, plain rotary
    embedding with :attr:`Form.local_rope_theta`, or none."""


@dataclass(frozen=True)
class Form:
    """The form of a target's embedding, layers and head.

    With ``n`` for a norm, A for attention, M for the MLP and s for ``residual_scale`` a layer is

    ========================================  ====================================================
    ``is_pre_normed``                         ``h = x + s A(n(x))``, ``out = h + s M(n(h))``
    ``is_post_normed``                        ``h = x + s n(A(x))``, ``out = h + s n(M(h))``
    both                                      ``h = x + s n(A(n(x)))``, ``out = h + s n(M(n(h)))``
    ``is_parallel`` (and ``is_pre_normed``)   ``out = x + s A(n(x)) + s M(n(x))``
    ========================================  ====================================================
    """

    # norms
    norm: Norm = "rms"
    """Of a layer's input, outputs and the final state; ``"layer"`` subtracts the mean first."""
    has_norm_weight: bool = True
    """False: the checkpoint has no weights of norms, which are 1."""
    has_norm_bias: bool = False
    norm_offset: float = 0.0
    """Added to norms' weights as they are loaded, those of q and k too."""
    is_pre_normed: bool = True
    is_post_normed: bool = False
    is_parallel: bool = False
    has_mlp_norm: bool = True
    """False (parallel layers alone): the MLP reads what attention reads."""

    # attention
    is_qk_norm_full: bool = False
    """Whether a norm of q or k takes all heads together, rather than each by itself."""
    attention_scale: float | None = None
    """That products of q and k are multiplied by; None: ``head_dim ** -0.5``."""
    attention_cap: float | None = None
    """c: scaled products s become ``c tanh(s / c)``."""
    rotary_dim: int | None = None
    """Elements of a head that are turned, its first ones; None: all."""
    is_rotary_interleaved: bool = False
    """Whether neighbours make a pair in the checkpoint, rather than elements half a turn apart."""
    local_rope_theta: float | None = None
    layers: tuple[LayerKind, ...] = ()
    """One a layer; empty: all are ``LayerKind()``."""

    # MLP
    activation: Activation = "silu"
    is_gated: bool = True
    """False: ``down(activation(up(x)))``."""

    # embedding and head
    embed_scale: float = 1.0
    """Rounded to the weights' dtype before embeddings are multiplied by it."""
    position_offset: int | None = None
    """Position p adds row ``p + position_offset`` of a learned table; None: there is none."""
    has_head_bias: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """c: scaled logits l become ``c tanh(l / c)``."""

    @property
    def is_gated_by_silu(self) -> bool:
        """Whether one launch of a GPU's gives what ``down`` multiplies."""
        return self.is_gated and self.activation == "silu"

    def layer(self, index: int) -> LayerKind:
        """What is special about a layer."""
        return self.layers[index] if self.layers else LayerKind()
