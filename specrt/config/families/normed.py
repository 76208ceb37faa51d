"""Families whose norms lie elsewhere than a Llama's, or weigh otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specrt.config.families.windows import by_pattern, by_types, every_other, window_of
from specrt.config.family import Family, Keys
from specrt.config.form import Form, LayerKind

_OLMO: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
}
_OLMO_FORM = Form(is_pre_normed=False, is_post_normed=True, is_qk_norm_full=True)
_GLM: dict[str, Any] = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}
_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA_WINDOWS: dict[str, Any] = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_CAUSAL = {"use_bidirectional_attention": (None, False)}


def _scaled_embedding(keys: Keys) -> dict[str, Any]:
    return {"embed_scale": float(keys.size("hidden_size") ** 0.5)}


def _gemma2(keys: Keys) -> Mapping[str, Any]:
    return {
        **_scaled_embedding(keys),
        "attention_scale": keys.positive("query_pre_attn_scalar") ** -0.5,
        "attention_cap": keys.optional("attn_logit_softcapping"),
        "logit_cap": keys.optional("final_logit_softcapping"),
    }


def _exaone4(keys: Keys) -> tuple[LayerKind, ...]:
    """Where some layers have a window, those without go without rotary embedding too."""
    if window_of(keys) is None:
        return by_types(lambda index, keys: False)(keys)
    return by_types(by_pattern, full="none")(keys)


NORMED: Mapping[str, Family] = {
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _OLMO,
        form=_OLMO_FORM,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_qk_norm=True,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {**_OLMO, "rope_theta": 5e5, "rope_local_base_freq": 5e5, "sliding_window": 4096},
        form=_OLMO_FORM,
        layers=by_types(every_other(4), sliding="local"),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_qk_norm=True,
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        form=Form(is_pre_normed=False, is_post_normed=True),
        layers=_exaone4,
        has_qk_norm=True,
        judged="sliding_window_pattern",
    ),
    "glm": Family(
        "GlmForCausalLM",
        _GLM,
        form=Form(is_rotary_interleaved=True),
        qkv_bias="attention_bias",
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        _GLM,
        form=Form(is_rotary_interleaved=True, is_post_normed=True),
        qkv_bias="attention_bias",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {**_GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192},
        form=Form(norm_offset=1.0),
        settle=_scaled_embedding,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        activations={"gelu": "gelu_tanh"},
        wanted=_CAUSAL,
        judged="hidden_activation",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA_WINDOWS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        names={"hidden_act": "hidden_activation"},
        form=Form(norm_offset=1.0, is_post_normed=True),
        settle=_gemma2,
        layers=by_types(every_other(2)),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        wanted=_CAUSAL,
        judged=(
            "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
            "sliding_window_size cache_implementation"
        ),
    ),
    "vaultgemma": Family(
        "VaultGemmaForCausalLM",
        {
            **_GEMMA_WINDOWS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        names={"hidden_act": "hidden_activation"},
        # A Gemma 2 without the norms behind attention and MLP.
        form=Form(norm_offset=1.0),
        settle=_gemma2,
        layers=by_types(every_other(2)),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        judged=(
            "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
            "cache_implementation"
        ),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        others=("Gemma3TextModel",),
        defaults={
            **_GEMMA_WINDOWS,
            # What configurations of the multimodal models leave out.
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        names={"hidden_act": "hidden_activation"},
        form=Form(norm_offset=1.0, is_post_normed=True),
        settle=_gemma2,
        layers=by_types(by_pattern, sliding="local"),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_qk_norm=True,
        # transformers reads the key and does not cap by it.
        wanted={**_CAUSAL, "attn_logit_softcapping": (None,)},
        judged=(
            "query_pre_attn_scalar final_logit_softcapping sliding_window_pattern "
            "rope_local_base_freq cache_implementation"
        ),
    ),
}
