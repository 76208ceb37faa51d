"""Families whose norms subtract the mean, among them those before Llama."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from specrt.config.families.windows import by_pattern, by_types, everywhere
from specrt.config.family import Family, Keys
from specrt.config.form import Form, LayerKind

_BIASED = Form(norm="layer", has_norm_bias=True)
_UNGATED = replace(_BIASED, is_gated=False)
_PARALLEL = replace(_UNGATED, is_parallel=True, has_mlp_norm=False, has_head_bias=True)
_MULTI_HEAD = ("head_dim", "num_key_value_heads")
_COHERE: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}
_COHERE_FORM = Form(norm="layer", is_parallel=True, has_mlp_norm=False, is_rotary_interleaved=True)
_GPT_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_GPT: dict[str, Any] = {
    "intermediate_size": None,
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_SUMMARY = (
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
)


def _unturned(keys: Keys) -> tuple[LayerKind, ...]:
    return (LayerKind(rope="none"),) * keys.size("num_hidden_layers")


def _cohere(keys: Keys) -> Mapping[str, Any]:
    return {"logit_scale": keys.positive("logit_scale")}


def _gpt2(keys: Keys) -> Mapping[str, Any]:
    return {"attention_scale": None if keys.flag("scale_attn_weights") else 1.0}


def _gptj(keys: Keys) -> Mapping[str, Any]:
    return {"rotary_dim": keys.size("rotary_dim")}


def _gpt_neox(keys: Keys) -> Mapping[str, Any]:
    return {"is_parallel": keys.flag("use_parallel_residual")}


def _gpt_neo(keys: Keys) -> tuple[LayerKind, ...]:
    """``attention_types``: kinds and how often they come; ``attention_layers`` follows from it."""
    count, said, kinds = keys.size("num_hidden_layers"), keys.get("attention_types"), list[str]()
    with suppress(TypeError, ValueError):  # refused as what names none
        kinds = [kind for group, times in said for kind in list(group) * min(times, count + 1)]
    if len(kinds) != count or set(map(str, kinds)) - {"global", "local"}:
        raise keys.fail(f"attention_types: expected {count} of global and local, got {said!r}")
    window = keys.size("sliding_window")
    return tuple(LayerKind(window if kind == "local" else None, "none") for kind in kinds)


def _stablelm(keys: Keys) -> Mapping[str, Any]:
    is_parallel = keys.flag("use_parallel_residual")
    return {"is_parallel": is_parallel, "has_mlp_norm": not is_parallel}


def _opt(keys: Keys) -> Mapping[str, Any]:
    projected = keys.get("word_embed_proj_dim")
    if projected not in (None, keys.size("hidden_size")):
        raise keys.fail(
            f"word_embed_proj_dim: expected hidden_size {keys.size('hidden_size')}, "
            f"got {projected!r}"
        )
    has_weights = keys.flag("layer_norm_elementwise_affine")
    return {"has_norm_weight": has_weights, "has_norm_bias": has_weights}


LAYER_NORMED: Mapping[str, Family] = {
    "olmo": Family(
        "OlmoForCausalLM",
        {"max_position_embeddings": 2048, "eos_token_id": 50279},
        form=Form(norm="layer", has_norm_weight=False),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        eps=1e-5,
        wanted={"clip_qkv": (None,)},
    ),
    "cohere": Family(
        "CohereForCausalLM",
        {**_COHERE, "rope_theta": 5e5},
        names={"rms_norm_eps": "layer_norm_eps"},
        form=_COHERE_FORM,
        settle=_cohere,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        wanted={"use_qk_norm": (None, False)},
        judged="logit_scale",
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        {**_COHERE, "sliding_window": 4096, "sliding_window_pattern": 4},
        names={"rms_norm_eps": "layer_norm_eps"},
        form=_COHERE_FORM,
        settle=_cohere,
        layers=by_types(by_pattern, full="none"),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        derived=("head_dim",),
        wanted={
            "layer_switch": (None, 4),
            "order_of_interleaved_layers": (None, "local_attn_first"),
            "position_embedding_type": (None, "rope_gptj"),
            "rotary_pct": (None, 1.0),
        },
        judged=(
            "logit_scale sliding_window_pattern cache_implementation use_embedding_sharing "
            "use_gated_activation use_parallel_block use_parallel_embedding"
        ),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            **_GPT,
            "max_position_embeddings": 1024,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        names=_GPT_NAMES,
        form=replace(_UNGATED, position_offset=0),
        settle=_gpt2,
        layers=_unturned,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        has_rope=False,
        derived=_MULTI_HEAD,
        wanted={
            "scale_attn_by_inverse_layer_idx": (None, False),
            "add_cross_attention": (None, False),
        },
        # Which precision some sums of training had; here all are float32.
        judged=f"scale_attn_weights reorder_and_upcast_attn {_SUMMARY}",
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        {
            **_GPT,
            "max_position_embeddings": 2048,
            "sliding_window": 256,
            "attention_types": [[["global", "local"], 12]],
            "tie_word_embeddings": True,
        },
        names={
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
            "sliding_window": "window_size",
        },
        # Its products of q and k are not scaled.
        form=replace(_UNGATED, position_offset=0, attention_scale=1.0),
        layers=_gpt_neo,
        output_bias=True,
        mlp_bias=True,
        has_rope=False,
        derived=_MULTI_HEAD,
        judged=f"attention_types attention_layers {_SUMMARY}",
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        {**_GPT, "max_position_embeddings": 2048, "rotary_dim": 64},
        names=_GPT_NAMES,
        form=replace(_PARALLEL, is_rotary_interleaved=True),
        settle=_gptj,
        mlp_bias=True,
        derived=_MULTI_HEAD,
        wanted={"rotary": (None, True), "scale_attn_weights": (None, True)},
        judged=f"rotary_dim {_SUMMARY}",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        names={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        form=_UNGATED,
        settle=_gpt_neox,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        derived=_MULTI_HEAD,
        judged="use_parallel_residual",
    ),
    "phi": Family(
        "PhiForCausalLM",
        {
            "max_position_embeddings": 2048,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        names={"rms_norm_eps": "layer_norm_eps"},
        form=_PARALLEL,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        wanted={"qk_layernorm": (None, False)},
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        names={"rms_norm_eps": "norm_epsilon"},
        form=_UNGATED,
        layers=everywhere,
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        wanted={"mlp_type": (None, "default"), "norm_type": (None, "layer_norm")},
        judged=(
            "use_bias activation_function layer_norm_epsilon attention_softmax_in_fp32 "
            "scale_attention_softmax_in_fp32 scale_attn_weights"
        ),
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        names={"rms_norm_eps": "layer_norm_eps"},
        form=_BIASED,
        settle=_stablelm,
        qkv_bias="use_qkv_bias",
        derived=("head_dim",),
        wanted={"qk_layernorm": (None, False)},
        # The second group is what the authors' own code called these things.
        judged="use_qkv_bias use_parallel_residual norm_eps rope_pct rotary_scaling_factor",
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        {
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        names={"rms_norm_eps": "norm_eps"},
        form=replace(_UNGATED, norm_offset=1.0),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "jais2": Family(
        "Jais2ForCausalLM",
        {
            "max_position_embeddings": 8192,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 150024,
        },
        names={"rms_norm_eps": "layer_norm_eps"},
        form=_UNGATED,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "opt": Family(
        "OPTForCausalLM",
        {
            "max_position_embeddings": 2048,
            "hidden_act": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
        names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        form=Form(norm="layer", is_gated=False, position_offset=2),
        settle=_opt,
        layers=_unturned,
        qkv_bias="enable_bias",
        output_bias="enable_bias",
        mlp_bias="enable_bias",
        eps=1e-5,
        has_rope=False,
        derived=_MULTI_HEAD,
        wanted={"do_layer_norm_before": (None, True), "_remove_final_layer_norm": (None, False)},
        judged="word_embed_proj_dim enable_bias layer_norm_elementwise_affine",
    ),
}
