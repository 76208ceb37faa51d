"""Families that are a Llama but for a few keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specrt.config.families.windows import by_types, everywhere, sliding_layers, window_of
from specrt.config.family import Family, Keys
from specrt.config.form import Form, LayerKind

_ONE_AND_TWO = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_qwen_layers = by_types(
    lambda index, keys: index >= keys.size("max_window_layers"), switch="use_sliding_window"
)
# Three positions a token, which are one for text: the order of angles between them is no matter.
_MROPE = {"mrope": "default"}
_QWEN_VL = Family(
    "Qwen2VLForConditionalGeneration",
    {
        **_QWEN,
        "num_key_value_heads": 8,
        "max_window_layers": 80,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    runs_as="qwen2",
    layers=_qwen_layers,
    qkv_bias=True,
    rope_types=_MROPE,
)
_MISTRAL: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    **_ONE_AND_TWO,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _granite(keys: Keys) -> Mapping[str, Any]:
    return {
        "embed_scale": keys.positive("embedding_multiplier"),
        "attention_scale": keys.positive("attention_multiplier"),
        "residual_scale": keys.positive("residual_multiplier"),
        "logit_scale": 1.0 / keys.positive("logits_scaling"),
    }


def _hyperclovax(keys: Keys) -> Mapping[str, Any]:
    return {
        "embed_scale": keys.positive("embedding_multiplier"),
        "attention_scale": keys.optional("attention_multiplier"),
        "residual_scale": keys.positive("residual_multiplier"),
        "logit_scale": keys.positive("logits_scaling"),
        "is_post_normed": keys.flag("use_post_norm"),
    }


def _smollm3(keys: Keys) -> tuple[LayerKind, ...]:
    count = keys.size("num_hidden_layers")
    has_rope = keys.get("no_rope_layers")
    if has_rope is None:
        period = keys.size("no_rope_layer_interval")
        has_rope = [(index + 1) % period != 0 for index in range(count)]
    if (
        not isinstance(has_rope, list)
        or len(has_rope) < count
        or any(value not in (0, 1) for value in has_rope)
    ):
        raise keys.fail(f"no_rope_layers: expected {count} of 0 and 1, got {has_rope!r}")
    window = window_of(keys) if keys.flag("use_sliding_window") else None
    slides = sliding_layers(keys, lambda i: window is not None and not has_rope[i])
    if any(slides) and window is None:
        raise keys.fail("layer_types has sliding_attention, and use_sliding_window is false")
    return tuple(
        LayerKind(window if windowed else None, "main" if turned else "none")
        for windowed, turned in zip(slides, has_rope[:count], strict=True)
    )


_SCALES = "embedding_multiplier attention_multiplier residual_multiplier logits_scaling"
_INTERLEAVED = Form(is_rotary_interleaved=True)

LLAMAS: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"num_key_value_heads": None, "max_position_embeddings": 2048, **_ONE_AND_TWO},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _MISTRAL,
        layers=everywhere,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        _MISTRAL,
        layers=by_types(lambda index, keys: True),
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _YARN,
            **_ONE_AND_TWO,
        },
        layers=everywhere,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, layers=_qwen_layers, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        layers=_qwen_layers,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_qk_norm=True,
    ),
    **dict.fromkeys(["qwen2_vl_text", "qwen2_5_vl_text"], _QWEN_VL),
    "qwen3_vl_text": Family(
        "Qwen3VLForConditionalGeneration",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 128000,
            "head_dim": 128,
            "rope_theta": 5e5,
        },
        runs_as="qwen3",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_qk_norm=True,
        rope_types=_MROPE,
    ),
    "internlm3": Family(
        "InternLM3ForCausalLM",
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            **_ONE_AND_TWO,
        },
        others=("LlamaForCausalLM",),  # which transformers runs them by
        names={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "iquestcoder": Family(
        "IQuestCoderForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            **_ONE_AND_TWO,
        },
        others=("LlamaForCausalLM",),  # which transformers runs them by
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        wanted={"clip_qkv": (None,), "use_sliding_window": (None, False)},
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 524288,
            "head_dim": 128,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        judged="attention_out_bias",
    ),
    "cwm": Family(
        "CwmForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "rope_parameters": _CWM_ROPE,
            "sliding_window": 8192,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
        },
        layers=by_types(lambda index, keys: index % 4 != 0),
        mlp_bias="mlp_bias",
    ),
    "arcee": Family(
        "ArceeForCausalLM",
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "relu2",
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        form=Form(is_gated=False),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        layers=everywhere,
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        layers=_smollm3,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        judged="no_rope_layers no_rope_layer_interval",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "max_position_embeddings": 2048,
            **dict.fromkeys(_SCALES.split(), 1.0),
            **_ONE_AND_TWO,
        },
        settle=_granite,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        judged=_SCALES,
    ),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM",
        {
            "max_position_embeddings": 2048,
            **dict.fromkeys(_SCALES.split(), 1.0),
            "attention_multiplier": None,
            "use_post_norm": True,
            **_ONE_AND_TWO,
        },
        settle=_hyperclovax,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        judged=f"{_SCALES} use_post_norm",
    ),
    "helium": Family(
        "HeliumForCausalLM",
        {
            "num_key_value_heads": 20,
            "max_position_embeddings": 4096,
            "head_dim": 128,
            "rms_norm_eps": 1e-8,
            "rope_theta": 1e5,
            **_ONE_AND_TWO,
        },
        form=_INTERLEAVED,
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
            **_ONE_AND_TWO,
        },
        form=_INTERLEAVED,
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        judged="use_bias",
    ),
}
