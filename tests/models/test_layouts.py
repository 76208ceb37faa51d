"""Layouts that transformers loads: the same tokens here. Others: named for what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from specrt import SamplingParams
from specrt.config import ModelConfig
from specrt.models.loader import Weights, load_tables, load_weights
from specrt.types import CheckpointError
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint
from tests.engine.support import make_engine, make_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], Any]


def load(path: Path) -> Weights:
    return load_weights(path, ModelConfig.from_directory(path), torch.float32)


def assert_same_tokens(path: Path) -> None:
    """Greedy tokens are transformers' own from the same directory."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = [3, 1, 4, 1, 5]
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    result = make_engine(make_model(path)).generate(prompt, SamplingParams(max_new_tokens=24))
    assert result.token_ids == expected


def without_prefix(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("model.")] = tensors.pop(key)


def head_alone(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


def with_buffers(tensors: Tensors) -> None:
    attention = "model.layers.1.self_attn."
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        tensors[f"{attention}rotary_emb.{name}"] = torch.ones(8)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(8)
    for name in ("k_scale", "v_scale", "attn.k_scale", "k_proj.k_scale", "v_proj.output_scale"):
        tensors[f"{attention}{name}"] = torch.tensor(0.5)


def rounded_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBED].to(torch.bfloat16)


def widened_head(tensors: Tensors) -> None:
    tensors[EMBED] = tensors[EMBED].to(torch.bfloat16)
    tensors[HEAD] = tensors[EMBED].to(torch.float32)


@pytest.mark.parametrize(
    ("family", "is_tied", "edit", "num_tables"),
    [
        ("llama", True, head_alone, 1),
        ("qwen2", True, lambda t: (head_alone(t), without_prefix(t)), 1),
        ("llama", True, widened_head, 1),
        ("llama", True, rounded_head, 2),
        ("qwen3", True, with_buffers, 1),
        ("qwen3", True, without_prefix, 1),
        ("llama_biased", False, without_prefix, 2),
    ],
)
def test_tokens_equal_transformers(
    family: str, is_tied: bool, edit: Edit, num_tables: int, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path, tie_word_embeddings=is_tied, eos_token_id=None)
    edit_tensors(tmp_path, edit)
    weights = load(tmp_path)
    assert (weights.lm_head is weights.embed) == (num_tables == 1)
    assert_same_tokens(tmp_path)
    tables = load_tables(tmp_path, ModelConfig.from_directory(tmp_path), torch.float32)
    embed, head = tables.embed, tables.lm_head
    assert torch.equal(embed, weights.embed) and torch.equal(head, weights.lm_head)


def test_the_base_class_alone_has_a_tied_head(tmp_path: Path) -> None:
    model: PreTrainedModel = make_checkpoint(
        "llama", tmp_path, tie_word_embeddings=True, eos_token_id=None
    )
    model.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert_same_tokens(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="missing tensor lm_head.weight"):
        load(tmp_path)


def test_the_index_decides_where_a_key_is_in_two_shards(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path, eos_token_id=None)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first, last = min(places.values()), max(places.values())
    key = next(key for key, place in places.items() if place == last)
    stale = {**load_file(tmp_path / first), key: torch.zeros(3)}
    save_file(stale, tmp_path / first, metadata={"format": "pt"})
    assert_same_tokens(tmp_path)


# --- what is not loadable ------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "is GPTQ"),
        (("qweight", "qzeros", "scales"), "is AWQ or GPTQ"),
        (("weight_packed", "weight_scale", "weight_shape"), "is compressed-tensors"),
        (("weight", "weight.absmax", "weight.quant_map"), "is bitsandbytes"),
        (("weight", "SCB"), "is bitsandbytes"),
        (("weight", "weight_scale_inv"), "is float8 with scales"),
        (("weight", "weight_scale"), "is int8 or float8 with scales"),
        (("weight", "scales", "biases"), "stored for MLX"),
        (("base_layer.weight", "lora_A.weight", "lora_B.weight"), "is a LoRA adapter"),
    ],
)
def test_tensors_of_another_kind(names: tuple[str, ...], part: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)

    def quantise(tensors: Tensors) -> None:
        del tensors[f"{PROJ}.weight"]
        tensors |= {f"{PROJ}.{name}": torch.ones(4, dtype=torch.uint8) for name in names}

    edit_tensors(tmp_path, quantise)
    message = refusal(tmp_path)
    assert part in message
    assert PROJ in message


@pytest.mark.parametrize(
    ("prefix", "part"),
    [
        ("module.", "wrapped module"),
        ("_orig_mod.", "wrapped module"),
        ("base_model.model.", "LoRA adapter"),
        ("language_model.", "multimodal"),
    ],
)
def test_names_of_another_kind(prefix: str, part: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)

    def rename(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)

    edit_tensors(tmp_path, rename)
    message = refusal(tmp_path)
    assert "missing tensor" in message
    assert part in message


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("adapter_model.safetensors", "is a LoRA adapter (lora= takes it"),
        ("weights.00.npz", "MLX"),
        ("consolidated.00.pth", "the authors' own format"),
        ("params.json", "the authors' own format"),
        ("tekken.json", "the authors' own format"),
        ("model-00001-of-00002.safetensors", "without their model.safetensors.index.json"),
        ("pytorch_model-00001-of-00002.bin", "without their pytorch_model.bin.index.json"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("weights.safetensors", "a name of their own (expected model.safetensors)"),
    ],
)
def test_files_of_another_kind(file: str, part: str, has_config: bool, tmp_path: Path) -> None:
    if has_config:
        make_checkpoint("llama", tmp_path)
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(b"x")
    message = refusal(tmp_path)
    assert file in message
    assert part in message


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_git_lfs_pointers(name: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476\n"
    (tmp_path / name).write_text(text)
    assert f"{name}: a Git-LFS pointer" in refusal(tmp_path)
