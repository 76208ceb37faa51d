"""Why a family that somebody knows is not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXPERTS = "a mixture of experts"
_LATENT = "multi-head latent attention"
_RECURRENT = "recurrent layers"
_ALIBI = "ALiBi positions"

_GROUPS: Mapping[str, str] = {
    _EXPERTS: """
        dbrx dots1 ernie4_5_moe glm4_moe gpt_oss granitemoe granitemoeshared hunyuan_v1_moe llama4
        llama4_text mellum minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open
    """,
    f"{_EXPERTS} and {_LATENT}": """
        deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite kimi_k2 longcat_flash
    """,
    _LATENT: "minicpm3 youtu",
    _RECURRENT: """
        bamba falcon_h1 falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h qwen3_next
        qwen3_5_text qwen3_5_moe_text recurrent_gemma rwkv zamba zamba2
    """,
    _ALIBI: "bloom mpt",
    "norms of q and k behind the rotary embedding": "hunyuan_v1_dense nanochat",
    "an activation with weights of its own (xIELU)": "apertus",
    "norms inside of attention and MLP": "bitnet",
    "projections of q, k and v in one, in an order that is not read": "falcon",
    "embeddings of each layer's own, and keys that layers share": "gemma3n_text gemma4_text",
    "convolutions in place of attention": "lfm2",
    "an encoder and a decoder": "t5",
}
_TYPES = {name: reason for reason, names in _GROUPS.items() for name in names.split()}
NOT_THEIR_TEXT: Mapping[str, str] = {
    "paligemma": "attention in both directions over a prompt",
    "mllama": "layers of cross-attention",
}
"""Multimodal models that do not run as their text model where there is text alone."""
# Of a model_type that nobody knows; where the key's value says yes.
_KEYS: Mapping[str, str] = {
    "is_encoder_decoder": "an encoder and a decoder",
    "kv_lora_rank": _LATENT,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "moe_intermediate_size": _EXPERTS,
    "alibi": _ALIBI,
    "use_alibi": _ALIBI,
    "ssm_cfg": _RECURRENT,
    "state_size": _RECURRENT,
    "mamba_d_state": _RECURRENT,
    "linear_conv_kernel_dim": _RECURRENT,
}


def why_refused(family: object, data: Mapping[str, Any]) -> str | None:
    """What a configuration's model has that specrt does not run, where that is known."""
    if isinstance(family, str) and family in _TYPES:
        return _TYPES[family]
    return next((reason for key, reason in _KEYS.items() if data.get(key)), None)
