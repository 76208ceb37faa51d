"""What families call the tensors of a target, and how they store them: data.

Our own names are Llama's in ``transformers``. Beside those, a layer's ``attended_layernorm`` is of
what attention gives and its ``mlp_layernorm`` of what the MLP gives, each before it is added;
``post_attention_layernorm`` is what Llama calls so: the norm before the MLP. A plain MLP has
``up_proj`` and ``down_proj``. ``model.embed_positions`` is the table of learned positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EMBED = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"

_LAYERS, _BASE = "model.layers.", "model."
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Naming:
    """The names of one family.

    Several of our modules that are stored as one lie there behind one another, rows of q, k and v,
    or of gate and up.
    """

    base: str = _BASE
    """What names of all but the head begin with; the base class saves them without it."""
    layers: str = "layers."
    """What comes between that and a layer's number."""
    outer: Mapping[str, str] = field(default_factory=dict)
    """Modules outside of layers: ours, without ``model.``, to theirs; others keep their name."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """Modules of a layer: ours to theirs."""
    by_head: frozenset[str] = frozenset()
    """Theirs that hold q, k and v of one head (of keys), then of the next."""
    transposed: frozenset[str] = frozenset()
    """Theirs whose matrices lie as ``[inputs, outputs]``."""
    buffers: tuple[str, ...] = ()
    """Endings of tensors that are computed anyway."""

    def stored(self, key: str) -> str:
        """What the family calls the tensor of one of our names."""
        module, ending = key.rsplit(".", 1)
        if module.startswith(_LAYERS):
            index, inner = module.removeprefix(_LAYERS).split(".", 1)
            module = f"{self.base}{self.layers}{index}.{self.inner.get(inner, inner)}"
        elif module.startswith(_BASE):
            outer = module.removeprefix(_BASE)
            module = f"{self.base}{self.outer.get(outer, outer)}"
        return f"{module}.{ending}"


def _fused(modules: tuple[str, ...], name: str) -> dict[str, str]:
    return dict.fromkeys(modules, name)


_GATE_UP_FUSED = _fused(_GATE_UP, "mlp.gate_up_proj")
_POST_NORMED = {
    "attended_layernorm": "post_attention_layernorm",
    "mlp_layernorm": "post_feedforward_layernorm",
}
_NORMED_ALL_ROUND = {**_POST_NORMED, "post_attention_layernorm": "pre_feedforward_layernorm"}
_GPT_OUTER = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
_GPT_BUFFERS = (".attn.bias", ".attn.masked_bias")

LLAMA = Naming()
"""Also of all families that are not named below."""

NAMINGS: Mapping[str, Naming] = {
    "phi3": Naming(inner={**_fused(_QKV, "self_attn.qkv_proj"), **_GATE_UP_FUSED}),
    "glm": Naming(inner=_GATE_UP_FUSED),
    "glm4": Naming(
        inner={
            **_GATE_UP_FUSED,
            "attended_layernorm": "post_self_attn_layernorm",
            "mlp_layernorm": "post_mlp_layernorm",
        }
    ),
    "gemma2": Naming(inner=_NORMED_ALL_ROUND),
    "vaultgemma": Naming(inner={"post_attention_layernorm": "pre_feedforward_layernorm"}),
    "gemma3_text": Naming(inner=_NORMED_ALL_ROUND),
    "olmo2": Naming(inner=_POST_NORMED),
    "olmo3": Naming(inner=_POST_NORMED),
    "exaone4": Naming(inner=_POST_NORMED),
    "hyperclovax": Naming(
        inner={"attended_layernorm": "post_norm1", "mlp_layernorm": "post_norm2"}
    ),
    "starcoder2": Naming(inner={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    "phi": Naming(
        outer={"norm": "final_layernorm"},
        inner={
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
    ),
    "gpt2": Naming(
        base="transformer.",
        layers="h.",
        outer=_GPT_OUTER,
        inner={
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            **_fused(_QKV, "attn.c_attn"),
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        buffers=_GPT_BUFFERS,
    ),
    "gpt_neo": Naming(
        base="transformer.",
        layers="h.",
        outer=_GPT_OUTER,
        inner={
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            **{module: module.replace("self_attn", "attn.attention") for module in _QKV},
            "self_attn.o_proj": "attn.attention.out_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        buffers=(".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    "gptj": Naming(
        base="transformer.",
        layers="h.",
        outer=_GPT_OUTER,
        inner={
            "input_layernorm": "ln_1",
            **{module: module.replace("self_attn", "attn") for module in _QKV},
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
        buffers=_GPT_BUFFERS,
    ),
    "gpt_neox": Naming(
        base="gpt_neox.",
        outer={"embed_tokens": "embed_in", "norm": "final_layer_norm"},
        inner={
            **_fused(_QKV, "attention.query_key_value"),
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        by_head=frozenset({"attention.query_key_value"}),
        buffers=(".attention.bias", ".attention.masked_bias"),
    ),
    "opt": Naming(
        layers="decoder.layers.",
        outer={
            "embed_tokens": "decoder.embed_tokens",
            "embed_positions": "decoder.embed_positions",
            "norm": "decoder.final_layer_norm",
        },
        inner={
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
}
"""By ``model_type``."""

WRAPPERS = {"language_model.": "", "model.language_model.": "model."}
"""What names of the text model of a multimodal one begin with, and what they begin with else."""
HEADS = {"embed_out.": "lm_head."}
"""Other names of the head."""


def naming_of(architecture: str) -> Naming:
    """The names of a family, by its ``model_type``."""
    return NAMINGS.get(architecture, LLAMA)
