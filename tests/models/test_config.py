"""Configurations against transformers' own classes, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specrt.config import ModelConfig, config_fingerprint
from specrt.types import CheckpointError
from tests.checkpoints import FAMILIES as CHECKPOINTS
from tests.checkpoints import edit_config, make_checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
# As checkpoints of transformers 2 to 4 have them, and what tools and authors have added.
OLD_KEYS: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "_commit_hash": "0c",
    "torchscript": False,
    "return_dict": True,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "finetuning_task": None,
    "num_labels": 2,
    "prefix": None,
    "tokenizer_class": "LlamaTokenizer",
    "sep_token_id": None,
    "decoder_start_token_id": 3,
    "task_specific_params": {"x": 1},
    "max_length": 4096,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "bad_words_ids": None,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "pretraining_tp": 2,
    "max_sequence_length": 2048,
    "attention_dropout": 0.1,
    "use_cache": False,
    "auto_map": {"AutoModelForCausalLM": "a--modeling.X"},
    "rope_interleaved": False,
    "_flash_attn_2_enabled": True,
    "_attn_implementation_autoset": True,
    "use_mrope": False,
}
UNSLOTH: dict[str, Any] = {
    "unsloth_fixed": True,
    "unsloth_version": "2025.1",
    "is_llama_config": True,
    "transformers.js_config": {"dtype": {"fp16": 1}},
    "pad_token_id": 7,
    "model_name": "x",
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def changed(**changes: Any) -> dict[str, Any]:
    """LLAMA with keys set, or removed by ``...``."""
    merged = {**LLAMA, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def saved(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(changed(**changes)))
    return path


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(data)
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert "\n" not in message
    return message


def assert_agrees(config: ModelConfig, theirs: Any) -> None:
    """Every number specrt computes with is the one transformers computes with."""
    head_dim = getattr(theirs, "head_dim", None)
    rope = dict(theirs.rope_parameters)
    assert config.architecture == theirs.model_type
    assert config.vocab_size == theirs.vocab_size
    assert config.hidden_size == theirs.hidden_size
    assert config.intermediate_size == theirs.intermediate_size
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_heads == theirs.num_attention_heads
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.max_positions == theirs.max_position_embeddings
    assert config.is_head_tied == theirs.tie_word_embeddings
    assert config.rope_theta == rope.pop("rope_theta")
    rope.pop("type", None)
    assert (config.rope_scaling or {"rope_type": "default"}) == rope
    assert config.bos_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert config.eos_ids == (() if eos is None else tuple(eos if isinstance(eos, list) else [eos]))


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_families_agree_with_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    assert_agrees(config, AutoConfig.from_pretrained(tmp_path))
    keys = set(model.state_dict())
    attention = "model.layers.0.self_attn."
    assert config.has_attention_bias == (f"{attention}q_proj.bias" in keys)
    assert config.has_output_bias == (f"{attention}o_proj.bias" in keys)
    assert config.has_mlp_bias == ("model.layers.0.mlp.up_proj.bias" in keys)
    assert config.has_qk_norm == (f"{attention}q_norm.weight" in keys)
    assert config.dtype == torch.float32


@pytest.mark.parametrize(
    "data",
    [
        changed(),
        changed(num_key_value_heads=None, head_dim=None, rope_scaling=None),
        changed(num_key_value_heads=2, head_dim=32, rope_theta=5e5, rms_norm_eps=1e-5),
        changed(rope_scaling={"type": "linear", "factor": 2.0}),
        changed(rope_scaling=LLAMA3_SCALING, rope_theta=5e5, max_position_embeddings=131072),
        changed(
            rope_scaling={
                key: value for key, value in LLAMA3_SCALING.items() if key[:8] != "original"
            }
        ),
        changed(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        changed(rope_parameters={"rope_theta": 1e6}),
        changed(tie_word_embeddings=True, eos_token_id=[5, 6], bos_token_id=None),
        changed(sliding_window=128),  # transformers' Llama has no window
        changed(model_type="mistral", num_attention_heads=8, max_position_embeddings=4096),
        changed(model_type="mistral", sliding_window=None, num_attention_heads=8),
        changed(model_type="qwen2", num_attention_heads=32, hidden_size=64),
        changed(model_type="qwen2", num_key_value_heads=2, sliding_window=128, rope_theta=1e6),
        changed(model_type="qwen2", num_key_value_heads=2, use_sliding_window=True),
        changed(model_type="qwen3", num_key_value_heads=4),
        changed(model_type="qwen3", num_key_value_heads=4, head_dim=16, attention_bias=True),
    ],
)
def test_defaults_and_styles_agree_with_transformers(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert_agrees(ModelConfig.from_directory(tmp_path), theirs)


@pytest.mark.parametrize(
    ("rope", "said", "context"),
    [
        ({"type": "linear", "factor": 4.0}, 8192, 8192),  # Vicuna 16k, LongChat
        ({"type": "linear", "factor": 4.0}, 4096, 4096),
        ({"type": "linear", "factor": 4.0}, 1 << 20, 8192),
        ({"type": "linear", "factor": 4.0}, 512, 2048),
        ({"type": "linear", "factor": 1e30}, 8192, 8192),
        ({"type": "linear", "factor": 4.0}, None, 2048),
        (None, 8192, 2048),
        (LLAMA3_SCALING, 8192, 2048),
    ],
)
def test_context(rope: dict[str, Any] | None, said: int | None, context: int) -> None:
    """Of linear rope it is stretched where the checkpoint says so, and nowhere else."""
    sizes = {"max_position_embeddings": 2048, "max_sequence_length": said}
    assert ModelConfig.from_dict(changed(rope_scaling=rope, **sizes)).max_positions == context


def test_token_ids_of_the_generation_config_go_first() -> None:
    data = changed(bos_token_id=1, eos_token_id=2)
    generation = {"eos_token_id": [7, 8]}
    config = ModelConfig.from_dict(data, generation)
    assert (config.bos_id, config.eos_ids) == (1, (7, 8))
    assert ModelConfig.from_dict(data, {"eos_token_id": 9}).eos_ids == (9,)
    assert ModelConfig.from_dict(changed(bos_token_id=-1)).bos_id is None


@pytest.mark.parametrize(
    ("key", "name", "dtype"),
    [
        ("dtype", "bfloat16", torch.bfloat16),
        ("torch_dtype", "float16", torch.float16),
        ("dtype", None, torch.float32),
        ("dtype", "torch.float16", torch.float16),
    ],
)
def test_dtype(key: str, name: str | None, dtype: torch.dtype) -> None:
    assert ModelConfig.from_dict(changed(**{key: name})).dtype == dtype


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (changed(model_type="gpt3"), ["model_type 'gpt3' is not supported (supported: llama, "]),
        (
            changed(model_type="mixtral"),
            ["'mixtral' is not supported: it has a mixture of experts"],
        ),
        (changed(model_type="x", kv_lora_rank=512), ["it has multi-head latent attention"]),
        (changed(model_type="x", alibi=True), ["it has ALiBi positions"]),
        (changed(model_type="x", is_encoder_decoder=True), ["an encoder and a decoder"]),
        (changed(model_type=...), ["model_type None"]),
        (changed(architectures=["LlamaForTokens"]), ["LlamaForTokens", "LlamaForCausalLM"]),
        (
            changed(model_type="llava", text_config=changed(model_type="qwen2_moe")),
            ["'qwen2_moe' (in the text_config of 'llava')", "a mixture of experts"],
        ),
        (
            changed(model_type="paligemma", text_config=changed(model_type="gemma")),
            ["'paligemma' is not supported: it has attention in both directions"],
        ),
        (changed(quantization={"bits": 4}), ["quantization: weights stored as MLX do not load"]),
        (changed(num_hidden_layers=2147483647), ["num_hidden_layers", "2147483647"]),
        (changed(max_position_embeddings=2**31), ["max_position_embeddings", "2147483648"]),
        (changed(rms_norm_eps=10**400), ["rms_norm_eps"]),
        (changed(rope_theta=1e308), ["rope_theta", "1e+308"]),
        (changed(architectures=7), ["architecture 7"]),
        (changed(rope_scaling={"type": ["linear"]}), ["rope type ['linear']"]),
        (changed(hidden_act="quick_gelu"), ["hidden_act", "got quick_gelu", "silu, swish, gelu"]),
        (changed(rope_scaling={"type": "su"}), ["'su'", "llama3, yarn, longrope"]),
        (changed(rope_scaling={"type": "dynamic"}), ["rope_scaling.factor"]),
        (changed(rope_parameters={"rope_type": "yarn"}), ["rope_scaling.factor"]),
        (changed(rope_scaling={"type": "longrope"}), ["rope_scaling.short_factor", "8 numbers"]),
        (
            changed(rope_scaling={"type": "longrope", "short_factor": [1] * 7}),
            ["rope_scaling.short_factor: expected 8 numbers, got 7 of them"],
        ),
        (
            changed(rope_parameters={"full_attention": {"rope_type": "default"}}),
            ["rope_parameters", "one rotary embedding for all layers"],
        ),
        (changed(quantization_config={"quant_method": "hqq"}), ["quantization_config", "HQQ"]),
        (
            changed(rope_scaling={"type": "linear", "factor": 2.0}, max_sequence_length="x"),
            ["max_sequence_length", "'x'"],
        ),
        (changed(rope_scaling={"rope_type": "linear"}), ["rope_scaling.factor"]),
        (changed(rope_scaling={"type": "linear", "factor": "2"}), ["rope_scaling.factor", "'2'"]),
        (changed(rope_scaling=[1]), ["rope_scaling", "[1]"]),
        (changed(partial_rotary_factor=0.5), ["partial_rotary_factor", "0.5"]),
        (changed(rope_theta=0), ["rope_theta"]),
        (changed(rms_norm_eps=float("nan")), ["rms_norm_eps"]),
        (changed(hidden_size=...), ["missing key hidden_size"]),
        (changed(num_hidden_layers=...), ["missing key num_hidden_layers"]),
        (changed(vocab_size="97"), ["vocab_size", "an integer in 1..", "'97'"]),
        (changed(num_hidden_layers=0), ["num_hidden_layers", "0"]),
        (changed(hidden_size=66), ["hidden_size 66", "num_attention_heads 4"]),
        (changed(num_key_value_heads=3), ["num_attention_heads 4", "num_key_value_heads 3"]),
        (changed(head_dim=15), ["head_dim", "15"]),
        (changed(attention_bias="yes"), ["attention_bias", "'yes'"]),
        (changed(eos_token_id="</s>"), ["eos_token_id"]),
        (changed(dtype="int8"), ["dtype", "int8"]),
        (
            changed(model_type="mistral", num_attention_heads=8, sliding_window="x"),
            ["sliding_window", "'x'"],
        ),
        (
            changed(model_type="mistral", num_attention_heads=8, layer_types=["full_attention"]),
            ["layer_types: expected sliding_attention alone", "4096"],
        ),
        (
            changed(model_type="mistral", num_attention_heads=8, layer_types=["sliding_attention"]),
            ["layer_types: expected sliding_attention alone, of 3 layers"],
        ),
        (
            changed(model_type="qwen3", num_key_value_heads=4, layer_types=MIXED),
            ["layer_types has sliding_attention, and use_sliding_window is false"],
        ),
        (
            changed(model_type="gemma2", num_key_value_heads=4, layer_types=MIXED[:2]),
            ["layer_types: expected 3 of full_attention and sliding_attention"],
        ),
        (changed(layer_types=MIXED), ["layer_types has sliding_attention", "no sliding attention"]),
        (
            changed(model_type="phi", partial_rotary_factor=0.2),
            ["partial_rotary_factor: 0.2 of head_dim 16 turns 3 elements"],
        ),
        (changed(model_type="gptj", rotary_dim=None), ["rotary_dim", "got None"]),
        (changed(model_type="gpt2", head_dim=32), ["head_dim: expected 16, which follows"]),
        (changed(model_type="olmo", clip_qkv=8.0), ["clip_qkv: expected None, got 8.0"]),
        (changed(model_type="cohere", use_qk_norm=True), ["use_qk_norm: expected False"]),
        (changed(model_type="opt", ffn_dim=112, word_embed_proj_dim=32), ["word_embed_proj_dim"]),
        (
            changed(model_type="opt", ffn_dim=112, do_layer_norm_before=False),
            ["do_layer_norm_before: expected True, got False"],
        ),
        (
            changed(model_type="gpt2", scale_attn_by_inverse_layer_idx=True),
            ["scale_attn_by_inverse_layer_idx"],
        ),
        (
            changed(model_type="gemma3_text", num_key_value_heads=4, attn_logit_softcapping=50.0),
            ["attn_logit_softcapping: expected None, got 50.0"],
        ),
        (
            changed(
                model_type="gemma3_text",
                num_key_value_heads=4,
                rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            ),
            ["rope_parameters.sliding_attention: expected rope type 'default', got 'linear'"],
        ),
        (changed(model_type="smollm3", no_rope_layers=[1, 0]), ["no_rope_layers: expected 3 of"]),
        (changed(specrt_storage={"format": "int4"}), ["specrt_storage", "int4"]),
        (changed(specrt_storage={"format": "float8_e4m3fn"}), ["scale_suffix"]),
    ],
)
def test_refusals(data: dict[str, Any], parts: list[str]) -> None:
    message = refusal(data)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("key", "values", "neutral"),
    [
        ("no_rope_layers", ([1, 1, 0], [0, 0, 0], 4), (None, [], [1, 1, 1])),
        ("no_rope_layer_interval", (4, 1), (None, 0)),
        ("final_logit_softcapping", (30.0,), (None,)),
        ("logit_scale", (0.0625, "0.5"), (1, 1.0, None)),
        ("attention_chunk_size", (8192,), (None, 0)),
        ("rope_interleaved", (True,), (False,)),
        ("norm_type", ("layernorm",), ("rmsnorm", "")),
        ("activation", ("geglu",), ("swiglu", None)),
        ("a_key_of_tomorrow", (2, -1, True, "on", {"by": 2}, ["x"]), (0, False, {}, [], None)),
    ],
)
def test_keys_that_may_change_the_function(
    key: str, values: tuple[Any, ...], neutral: tuple[Any, ...], tmp_path: Path
) -> None:
    for value in neutral:
        ModelConfig.from_directory(saved(tmp_path, **{key: value}))
    for value in values:
        with pytest.raises(CheckpointError) as caught:
            ModelConfig.from_directory(saved(tmp_path, **{key: value}))
        assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {key}: unknown, and ")
        assert "remove the key" in str(caught.value)


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="adapter_config.json: a LoRA adapter beside a model"):
        ModelConfig.from_directory(tmp_path)


def test_directory_refusals(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            ModelConfig.from_directory(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message(tmp_path / "absent").endswith("absent: no such directory")
    assert message(Path("org/a-7b-hf")) == "org/a-7b-hf: no such directory"
    assert "no config.json" in message(tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert message(tmp_path) == f"{tmp_path}: no config.json"
    file = tmp_path / "config.json"
    for text in ("{", "", "\x00", "[" * 100000):
        file.write_text(text)
        assert str(file) in message(tmp_path)
    file.write_bytes(b"\xff\xfe\xff")
    assert "JSON" in message(tmp_path)
    file.write_text("[1]")
    assert "list" in message(tmp_path)
    assert "got a file" in message(file)
    file.write_text(json.dumps(changed(hidden_act="tanh")))
    assert str(file) in message(tmp_path)


def test_fingerprint_follows_the_architecture_alone(tmp_path: Path) -> None:
    make_checkpoint("llama3", tmp_path)
    before = config_fingerprint(ModelConfig.from_directory(tmp_path))
    assert len(before) == 16
    edit_config(tmp_path, dtype="bfloat16", eos_token_id=[3], max_position_embeddings=1024)
    assert config_fingerprint(ModelConfig.from_directory(tmp_path)) == before
    edit_config(tmp_path, rms_norm_eps=1e-4)
    assert config_fingerprint(ModelConfig.from_directory(tmp_path)) != before
    # Drafters keep it on disk: it may never change for the same model.
    fixed = config_fingerprint(ModelConfig.from_dict(changed()))
    assert fixed == "488d75a5fc615754"


def test_importing_the_models_leaves_transformers_alone() -> None:
    code = "import sys, specrt.models.loader, specrt.models.tokenizer\n"
    code += "assert not {'transformers', 'rich', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
