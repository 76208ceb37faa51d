"""What a GGUF file says of its model, against the directory it was written from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specrt.config import ModelConfig, config_fingerprint
from specrt.types import CheckpointError
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.gguf_files import letters, write_gguf


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_that_of_the_directory(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    original = ModelConfig.from_directory(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    ours = ModelConfig.from_directory(tmp_path / "model.gguf")
    if family == "mistral":  # which llama.cpp does not know: such a model is a Llama
        original = replace(original, architecture="llama")
    assert ours == original
    assert config_fingerprint(ours) == config_fingerprint(original)


def test_a_directory_with_one_file(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "original")
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "original", tmp_path / "files/a.gguf")
    assert ModelConfig.from_directory(tmp_path / "files").num_layers == 3
    (tmp_path / "files/b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"files: expected one GGUF file, got a.gguf, b.gguf"):
        ModelConfig.from_directory(tmp_path / "files")
    # Beside weights of Hugging Face's layout they are nothing to look at.
    (tmp_path / "original/a.gguf").write_bytes(b"x")
    assert ModelConfig.from_directory(tmp_path / "original").dtype.itemsize == 4


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_the_dtype_is_that_of_the_matrices(kind: str, dtype: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", kind=kind)
    assert str(ModelConfig.from_directory(tmp_path / "model.gguf").dtype) == f"torch.{dtype}"


def test_tokens_that_end_the_output(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)

    def edit(metadata: dict[str, Any]) -> None:
        metadata["tokenizer.ggml.eot_token_id"] = 9
        metadata["tokenizer.ggml.tokens"][50] = "<|im_end|>"

    write_gguf(tmp_path, tmp_path / "model.gguf", edit=edit)
    config = ModelConfig.from_directory(tmp_path / "model.gguf")
    assert config.bos_id == 1
    assert config.eos_ids == (2, 9, 50)


def test_how_the_authors_would_sample(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    said = {"temp": 0.7, "top_k": 20, "top_p": 0.8, "penalty_repeat": 1.1}

    def edit(metadata: dict[str, Any]) -> None:
        metadata.update({f"general.sampling.{name}": value for name, value in said.items()})

    write_gguf(tmp_path, tmp_path / "model.gguf", edit=edit)
    generation = ModelConfig.from_directory(tmp_path / "model.gguf").generation
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.7, 20, 0.8)
    assert generation.repetition_penalty == 1.1


def test_factors_of_ones_are_none(tmp_path: Path) -> None:
    make_checkpoint("llama3", tmp_path)
    write_gguf(
        tmp_path, tmp_path / "model.gguf", edit_tensors=lambda t: t["rope_freqs.weight"].fill_(1.0)
    )
    assert ModelConfig.from_directory(tmp_path / "model.gguf").rope_scaling is None


REFUSED = {
    "general.type": ("adapter", "general.type: expected model, got 'adapter'"),
    "llama.block_count": (..., "missing key llama.block_count"),
    "llama.attention.head_count": ([4, 4, 4], "llama.attention.head_count: expected an integer"),
    "llama.attention.value_length": (32, "llama.attention.value_length: expected 16, the size"),
    "llama.rope.dimension_count": (8, "llama.rope.dimension_count: expected 16, the size"),
    "llama.rope.scaling.type": ("yarn", "llama.rope.scaling.type: 'yarn' is not supported"),
    "llama.attention.causal": (False, "llama.attention.causal: expected true, got false"),
    "llama.expert_count": (8, "llama.expert_count: unknown, and 8 may change what the model"),
    "llama.attention.sliding_window": (64, "llama.attention.sliding_window: unknown, and 64"),
    "llama.attention.layer_norm_rms_epsilon": ("x", "layer_norm_rms_epsilon: expected a number"),
    "tokenizer.ggml.eos_token_id": (97, "eos_token_id: expected a token id below 97, got 97"),
    "split.count": (3, "split.count 3: one of 3 files that are one model; join them first"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    value, message = REFUSED[key]
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, file, edit=lambda metadata: metadata.update({key: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_directory(file)
    assert str(caught.value).startswith(str(file))


def test_another_architecture(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, file)
    length = (5).to_bytes(8, "little")
    file.write_bytes(file.read_bytes().replace(length + b"llama", length + b"gemma"))
    with pytest.raises(
        CheckpointError, match=r"'gemma' is not supported \(supported: llama, qwen2"
    ):
        ModelConfig.from_directory(file)


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", vocabulary=letters(96))
    with pytest.raises(CheckpointError, match="tokens: expected 97, a token for each .* got 96"):
        ModelConfig.from_directory(tmp_path / "model.gguf")


def test_rotary_factors_of_another_kind(tmp_path: Path) -> None:
    make_checkpoint("llama3", tmp_path)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, file, edit_tensors=lambda t: t["rope_freqs.weight"][1].fill_(3.0))
    with pytest.raises(CheckpointError, match="rope_freqs.weight: expected the factors of a Llama"):
        ModelConfig.from_directory(file)
