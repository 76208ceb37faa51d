"""Configurations of targets that are asked for: small, with what is special switched on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""By transformers' usual names; a configuration class takes those it has."""
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_WINDOW = {"sliding_window": 8}
_BIASED = {"attention_bias": True, "mlp_bias": True}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
_SCALES = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}


@dataclass(frozen=True)
class Case:
    """One configuration, and what should come of it."""

    label: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_run: bool = True
    """False: it is refused, and its class is asked for its defaults alone."""


def _run(label: str, model_type: str, **changes: Any) -> Case:
    return Case(label, model_type, changes)


def _refused(label: str, model_type: str) -> Case:
    return Case(label, model_type, is_run=False)


CASES: tuple[Case, ...] = (
    _run("Llama 2 / Vicuna / CodeLlama", "llama"),
    _run("Llama 3 (no scaling)", "llama", rope_parameters={"rope_theta": 5e5}),
    _run("Llama 3.1/3.3", "llama", rope_parameters=_LLAMA3),
    _run("Llama 3.2 1B/3B (tied)", "llama", rope_parameters=_LLAMA3, tie_word_embeddings=True),
    _run("Yi / InternLM-llamafied / Falcon3 / SmolLM2 (llama)", "llama", **_BIASED),
    _run("Llama + rope yarn (long Yarn-Llama)", "llama", rope_parameters=_YARN),
    _run(
        "Llama + rope dynamic",
        "llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
    _refused("Llama 4 text", "llama4_text"),
    _run("Mistral 7B v0.1 (window)", "mistral", **_WINDOW),
    _run("Mistral 7B v0.2/v0.3", "mistral", sliding_window=None),
    _run("Mistral Nemo (head_dim)", "mistral", sliding_window=None, head_dim=32),
    _run("Ministral 8B (ministral)", "ministral", layer_types=MIXED, **_WINDOW),
    _run(
        "Ministral 3 (ministral3)",
        "ministral3",
        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 1},
    ),
    _refused("Mixtral", "mixtral"),
    _run("Qwen2 / Qwen2.5", "qwen2", use_sliding_window=True, max_window_layers=2, **_WINDOW),
    _run("Qwen2.5 tied", "qwen2", tie_word_embeddings=True),
    _run("Qwen2.5 + yarn", "qwen2", rope_parameters={**_YARN, "beta_fast": 4.0, "truncate": False}),
    _refused("Qwen2-MoE", "qwen2_moe"),
    _run("Qwen3", "qwen3", head_dim=32, attention_bias=True),
    _refused("Qwen3-MoE", "qwen3_moe"),
    _refused("Qwen3-Next", "qwen3_next"),
    _refused("Qwen3.5 text", "qwen3_5_text"),
    _run("Gemma 1", "gemma", head_dim=32, attention_bias=True),
    _run(
        "Gemma 2",
        "gemma2",
        head_dim=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        **_WINDOW,
    ),
    _run(
        "Gemma 3 text",
        "gemma3_text",
        head_dim=32,
        query_pre_attn_scalar=24,
        layer_types=MIXED,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        **_WINDOW,
    ),
    _refused("Gemma 3n text", "gemma3n_text"),
    _refused("Gemma 4 text", "gemma4_text"),
    _run("Phi-1/2", "phi"),
    _run(
        "Phi-3 / Phi-4 / Phi-4-mini",
        "phi3",
        rope_parameters=_LONG,
        original_max_position_embeddings=128,
        **_WINDOW,
    ),
    _refused("Phi-3.5-MoE", "phimoe"),
    _run("Granite 3.x", "granite", **_SCALES, **_BIASED),
    _refused("Granite MoE", "granitemoe"),
    _refused("Granite 4 hybrid", "granitemoehybrid"),
    _run("OLMo 1", "olmo"),
    _run("OLMo 2", "olmo2", attention_bias=True),
    _run(
        "OLMo 3",
        "olmo3",
        layer_types=MIXED,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": _YARN,
        },
        **_WINDOW,
    ),
    _refused("OLMoE", "olmoe"),
    _run("SmolLM3 (NoPE)", "smollm3", no_rope_layers=[1, 0, 1, 0]),
    _run("StableLM", "stablelm", use_qkv_bias=True),
    _run("InternLM3", "internlm3", **_BIASED),
    _refused("DeepSeek-V2", "deepseek_v2"),
    _refused("DeepSeek-V3 / R1", "deepseek_v3"),
    _refused("DeepSeek-V3.2", "deepseek_v32"),
    _run("GLM-4-9B-hf (glm)", "glm"),
    _run("GLM-4-0414 (glm4)", "glm4"),
    _refused("GLM-4.5 (glm4_moe)", "glm4_moe"),
    _run("Cohere Command-R", "cohere", logit_scale=0.25),
    _run("Cohere2 Command-A", "cohere2", logit_scale=0.25, layer_types=MIXED, **_WINDOW),
    _run("EXAONE 4", "exaone4", layer_types=MIXED, **_WINDOW),
    _run("Starcoder2", "starcoder2", **_WINDOW),
    _run("GPT-2 / distilgpt2", "gpt2"),
    _run("GPT-NeoX / Pythia", "gpt_neox"),
    _run("GPT-J", "gptj", rotary_dim=8),
    _run(
        "GPT-Neo / TinyStories",
        "gpt_neo",
        attention_types=[[["global", "local"], 2]],
        window_size=8,
    ),
    _run("OPT", "opt", ffn_dim=112, word_embed_proj_dim=64),
    _refused("BLOOM", "bloom"),
    _refused("Falcon 7B/40B", "falcon"),
    _refused("MPT", "mpt"),
    _refused("gpt-oss", "gpt_oss"),
    _run("Nemotron (Minitron)", "nemotron", **_BIASED),
    _refused("Nemotron-H", "nemotron_h"),
    _refused("Hunyuan dense", "hunyuan_v1_dense"),
    _run("Ernie 4.5", "ernie4_5", use_bias=True),
    _refused("Ernie 4.5 MoE", "ernie4_5_moe"),
    _run("Seed-OSS", "seed_oss", attention_out_bias=True, **_BIASED),
    _refused("Apertus", "apertus"),
    _run("Arcee AFM", "arcee", **_BIASED),
    _run("CWM", "cwm", rope_parameters=_LLAMA3, mlp_bias=True, **_WINDOW),
    _run("Helium", "helium", **_BIASED),
    _refused("LFM2", "lfm2"),
    _refused("BitNet", "bitnet"),
    _run("Jais2", "jais2"),
    _run("HyperCLOVA X", "hyperclovax", **_SCALES, **_BIASED),
    _run("IQuestCoder", "iquestcoder", **_BIASED),
    _refused("Mellum", "mellum"),
    _refused("Youtu", "youtu"),
    _refused("NanoChat", "nanochat"),
    _refused("Dots1", "dots1"),
    _refused("MiniMax-M2", "minimax_m2"),
    _refused("Solar Open", "solar_open"),
    _refused("Mamba", "mamba"),
    _run(
        "VaultGemma",
        "vaultgemma",
        head_dim=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        attention_bias=True,
        **_WINDOW,
    ),
)
VARIANTS: tuple[Case, ...] = (
    _run("GPT-NeoX, one after the other", "gpt_neox", use_parallel_residual=False),
    _run("StableLM, side by side", "stablelm", use_parallel_residual=True),
    _run("Starcoder2 without biases", "starcoder2", use_bias=False, sliding_window=None),
    _run("EXAONE 4 without windows", "exaone4", layer_types=["full_attention"] * 4),
    _run("HyperCLOVA X, normed before alone", "hyperclovax", use_post_norm=False),
    _run("SmolLM3 with windows", "smollm3", use_sliding_window=True, **_WINDOW),
    _run("OPT without weights of norms", "opt", layer_norm_elementwise_affine=False, ffn_dim=112,
         word_embed_proj_dim=64, enable_bias=False),
    _run("GPT-Neo, local layers first", "gpt_neo", intermediate_size=96, window_size=4,
         attention_types=[[["local"], 2], [["global", "local"], 1]]),
    _run("GPT-2, unscaled, tanh's other name", "gpt2", scale_attn_weights=False, n_inner=96,
         activation_function="gelu_pytorch_tanh"),
)  # fmt: skip
"""Other settings of keys that families have."""


def sizes_of(fields: set[str], names: dict[str, str]) -> dict[str, Any]:
    """The usual sizes under the names of a configuration class.

    Args:
        fields: the keys that it has.
        names: what it calls some of transformers' usual ones.
    """
    named = {names.get(key, key): value for key, value in _SIZES.items()}
    return {key: value for key, value in named.items() if key in fields}
