"""Quantised checkpoints: values to the bit, whole models, and every refusal.

Reference vectors (``tests/golden/quantized.safetensors``) are of the formats' own dequantisers;
:mod:`tests.quantized_checkpoints` has packers and sums of our own beside them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import specrt
from specrt.config import ModelConfig
from specrt.device import CPU
from specrt.models.layouts import EMBED
from specrt.models.loader import load_tables, load_weights
from specrt.models.opening import open_checkpoint, stored_bytes
from specrt.models.packing import ROWS, choose_packing
from specrt.models.quantized.codes import unpack
from specrt.train.eesd.module import read_last_layer
from specrt.types import CheckpointError
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint
from tests.cli.test_cli import write_tokenizer
from tests.quantized_checkpoints import FORMATS, store_quantized

GOLDEN = Path(__file__).parents[1] / "golden" / "quantized.safetensors"
PROJ = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def golden_cases() -> dict[str, dict[str, Any]]:
    with safe_open(GOLDEN, framework="pt") as file:
        return {name: json.loads(text) for name, text in sorted(file.metadata().items())}


def write(path: Path, tensors: Tensors, quantization: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return path


@pytest.mark.parametrize("name", golden_cases())
def test_values_are_those_of_the_format_s_own_dequantiser(name: str, tmp_path: Path) -> None:
    stored = load_file(GOLDEN)
    start = f"{name}.in."
    parts = {k.replace(start, "m."): v for k, v in stored.items() if k.startswith(start)}
    wanted = stored[f"{name}.out"]
    checkpoint = open_checkpoint(write(tmp_path, parts, golden_cases()[name]))
    info = checkpoint.infos["m.weight"]
    assert list(checkpoint.infos) == ["m.weight"]
    assert (info.shape, info.dtype) == (tuple(wanted.shape), wanted.dtype)
    assert torch.equal(checkpoint.tensor("m.weight"), wanted)
    for start_row, stop_row in ((0, 1), (5, 23), (31, 32)):
        rows = checkpoint.rows("m.weight", start_row, stop_row)
        assert torch.equal(rows, wanted[start_row:stop_row])


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_one_behind_the_other(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 32), generator=generator)
    words = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        words.append([number >> 32 * word & 0xFFFFFFFF for word in range(bits)])
    packed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(unpack(packed, bits).long(), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_has_the_weights_that_it_stands_for(name: str, tmp_path: Path) -> None:
    path, plain = tmp_path / "quantized", tmp_path / "plain"
    make_checkpoint("qwen2", path, intermediate_size=128)
    exact = store_quantized(path, name)
    plain.mkdir()
    save_file(exact, plain / "model.safetensors")
    (plain / "config.json").write_bytes((path / "config.json").read_bytes())
    edit_config(plain, quantization_config=...)
    config, theirs = ModelConfig.from_directory(path), ModelConfig.from_directory(plain)
    assert config == theirs
    for dtype, packing in (
        (torch.float32, ROWS),
        (torch.bfloat16, choose_packing(torch.bfloat16, CPU, None, None)),
        (torch.bfloat16, choose_packing(torch.bfloat16, CPU, "int8", None)),
    ):
        ours = load_weights(path, config, dtype, packing=packing)
        assert torch.equal(ours.arena, load_weights(plain, theirs, dtype, packing=packing).arena)
    assert torch.equal(load_tables(path, config, torch.float32).embed, exact[EMBED])
    wanted = read_last_layer(plain, theirs)
    for key, value in read_last_layer(path, config).items():
        assert torch.equal(value, wanted[key])


def test_its_text_is_that_of_the_dequantised_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint("llama", tmp_path, intermediate_size=128, dtype=torch.float16)
    write_tokenizer(tmp_path)
    exact = store_quantized(tmp_path, "w8a8")
    with caplog.at_level(logging.INFO, "specrt"):
        engine = specrt.load(tmp_path, "prompt-lookup", dtype="float32", progress=False)
    assert "activations are not rounded to 8 bits" in caplog.text
    prompt = [1, 5, 9, 5, 9]
    text = engine.generate(prompt, max_new_tokens=12).token_ids
    assert engine.target.weights.dtype == torch.float32
    edit_config(tmp_path, quantization_config=...)
    (tmp_path / "model.safetensors").unlink()
    save_file(exact, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert text == wanted[0, len(prompt) :].tolist()


def test_bytes_are_told_as_they_are_stored(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    store_quantized(tmp_path, "gptq")
    assert stored_bytes(tmp_path).keys() == {"float32", "int32", "float16"}


# --- what does not load -------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, ModelConfig.from_directory(path), torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settings(path: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return said


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "stored as bitsandbytes do not"),
        ({"load_in_8bit": True}, "stored as unnamed"),
        ({"quant_method": "hqq"}, "stored as HQQ"),
        ({"quant_method": "eetq"}, "stored as EETQ"),
        ({"quant_method": "mxfp4"}, "stored as MXFP4"),
        ({"quant_method": "aqlm"}, "stored as AQLM"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version gemv"),
        ({"quant_method": "awq", "bits": 8, "group_size": 32}, "config.bits: expected 4, got 8"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "AWQ without zero points"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "expected 2 or 3 or 4 or 8, got 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: expected a number"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ of format marlin"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "GPTQ of format marlin"),
        ({"quant_method": "gptq", "dynamic": {"+:.*": {"bits": 8}}}, "settings of its own"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: expected rows"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups: expected"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
            "with sparsity (sparse-24)",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "in format nvfp4-pack-quantized",
        ),
        (["awq"], "quantization_config: expected an object"),
    ],
)
def test_other_formats_are_named(said: Any, words: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, quantization_config=said)
    assert words in refusal(tmp_path)


Edit = Callable[[Tensors], object]


def dropped(end: str) -> Edit:
    return lambda tensors: tensors.pop(f"{PROJ}.{end}")


def changed(
    end: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{PROJ}.{end}"] = change(tensors[f"{PROJ}.{end}"])

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("awq", dropped("scales"), f"missing tensor {PROJ}.scales, which goes with {PROJ}.qweight"),
        ("awq", dropped("qzeros"), f"missing tensor {PROJ}.qzeros"),
        ("awq", changed("qzeros", lambda t: t[:1]), f"{PROJ}.qzeros: expected [2, 8], got [1, 8]"),
        (
            "awq",
            changed("scales", lambda t: t[:, :8].contiguous()),
            f"{PROJ}.scales: expected [2, 64], got [2, 8]",
        ),
        ("awq", changed("scales", lambda t: t.long()), "expected float16 or bfloat16 or float32"),
        ("gptq", changed("g_idx", lambda t: t + 1), f"{PROJ}.g_idx: expected groups 0..1"),
        ("gptq", changed("g_idx", lambda t: t[:32]), f"{PROJ}.g_idx: expected [64] (4 bits), got"),
        ("gptq", dropped("qweight"), "missing tensor model.layers.0.self_attn.q_proj.weight"),
        ("w4a16", dropped("weight_shape"), f"missing tensor {PROJ}.weight_shape"),
        ("w4a16", changed("weight_shape", lambda t: t * 2), "expected 4 bits of [128, 128]"),
        ("w8a8", dropped("weight_scale"), f"missing tensor {PROJ}.weight_scale, which goes with"),
        ("fp8", changed("weight_scale_inv", lambda t: t[:1]), "(blocks of [32, 32]), got [1, 2]"),
    ],
)
def test_broken_parts_are_named(name: str, edit: Edit, words: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    store_quantized(tmp_path, name)
    edit_tensors(tmp_path, edit)
    message = refusal(tmp_path)
    assert words in message
    assert message.startswith(str(tmp_path))


def test_biases_that_add_nothing_are_passed_over(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    store_quantized(tmp_path, "gptq")
    config = ModelConfig.from_directory(tmp_path)
    plain = load_weights(tmp_path, config, torch.float32)
    bias = {f"{PROJ}.bias": torch.zeros(64, dtype=torch.float16)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(bias))
    assert torch.equal(load_weights(tmp_path, config, torch.float32).arena, plain.arena)
    edit_tensors(tmp_path, lambda tensors: tensors[f"{PROJ}.bias"].add_(1))
    assert f"unknown tensor {PROJ}.bias" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_another_group_size_is_noticed(name: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    store_quantized(tmp_path, name)
    edit_config(tmp_path, quantization_config=settings(tmp_path) | {"group_size": 64})
    assert "expected 2 groups of 64 columns (quantization_config, 128 columns of" in refusal(
        tmp_path
    )


def test_other_tensors_than_the_configuration_says(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    edit_config(tmp_path, quantization_config=gptq)
    assert "expected GPTQ tensors (config.json), found none" in refusal(tmp_path)
    store_quantized(tmp_path, "w4a16")
    edit_config(tmp_path, quantization_config=gptq)
    assert "expected GPTQ (config.json), got a tensor of another format" in refusal(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    store_quantized(tmp_path, "awq")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or corrupt" in refusal(tmp_path)
