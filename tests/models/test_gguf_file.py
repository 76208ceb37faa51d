"""A GGUF file as tensors, against the checkpoint it was written from; and files that are none."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from specrt.builtin import target_path
from specrt.config import ModelConfig
from specrt.config.gguf_header import read_gguf_header
from specrt.models.gguf_file import GgufFile
from specrt.models.layouts import expected_shapes
from specrt.models.loader import load_weights
from specrt.models.tokenizer import load_tokenizer
from specrt.types import CheckpointError
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.gguf_files import write_gguf
from tools.export_checkpoint import state_dict
from tools.make_gguf import make_gguf

Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def made(path: Path, family: str = "llama", **options: Any) -> GgufFile:
    make_checkpoint(family, path, intermediate_size=128)
    write_gguf(path, path / "model.gguf", **options)
    return GgufFile(path / "model.gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    file = made(tmp_path, family)
    original = load_file(tmp_path / "model.safetensors")
    assert file.tensors.keys() == expected_shapes(file.config).keys() == original.keys()
    for key, tensor in file.tensors.items():
        assert tensor.shape == original[key].shape
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.values(0, tensor.shape[0]), original[key]), key
        assert torch.equal(tensor.values(3, 9), original[key][3:9]), key


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_narrow_values(kind: str, tmp_path: Path) -> None:
    file = made(tmp_path, kind=kind)
    original = load_file(tmp_path / "model.safetensors")[Q_PROJ]
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    assert torch.equal(file.tensors[Q_PROJ].values(0, 64), original.to(dtype))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_rows_of_blocks(kind: str, tmp_path: Path) -> None:
    file = made(tmp_path, kind=kind)
    stored = GGMLQuantizationType[kind]
    for key, original in load_file(tmp_path / "model.safetensors").items():
        tensor = file.tensors[key]
        if len(tensor.shape) == 1:
            assert tensor.kind == "F32"
            continue
        assert (tensor.kind, tensor.dtype) == (kind, None)
        rows = tensor.rows(0, tensor.shape[0])
        assert rows.shape == (tensor.shape[0], tensor.row_bytes)
        expected = quantize(original.numpy(), stored)
        assert np.array_equal(rows.numpy(), expected), key
        assert dequantize(rows.numpy(), stored).shape == tensor.shape
        assert torch.equal(tensor.rows(5, 8), rows[5:8])
    with pytest.raises(ValueError, match="blk.1.attn_q.weight: expected .* single values, got Q"):
        file.tensors[Q_PROJ].values(0, 1)


def test_rows_stay_after_pages_are_given_back(tmp_path: Path) -> None:
    file = made(tmp_path)
    rows = file.tensors["model.norm.weight"].rows(0, 64)
    before = rows.clone()
    file.release()
    assert torch.equal(rows, before)


def test_the_bundled_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    make_gguf("builtin", file, "bfloat16")
    config, ours = ModelConfig.from_directory(target_path()), GgufFile(file)
    apart = {"dtype": torch.bfloat16, "float8_scale_suffix": None, "generation": ANY}
    assert ours.config == replace(config, **apart)
    weights = load_weights(target_path(), config, torch.bfloat16)
    for key, tensor in state_dict(config, weights).items():
        values = ours.tensors[key].values(0, tensor.shape[0])
        assert torch.equal(values.float(), tensor.float()), key
    theirs, tokenizer = load_tokenizer(target_path()), load_tokenizer(file)
    for text in ("Question: How many legs have 16 cats?\nAnswer:", "", "é…€😀 </s> x", " a  b"):
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer.special_tokens == theirs.special_tokens
    chat = [{"role": "user", "content": "How many?"}]
    assert tokenizer.apply_chat_template(chat) == theirs.apply_chat_template(chat)


# --- What is refused ------------------------------------------------------------------------------


def test_bytes_of_every_kind(tmp_path: Path) -> None:
    """A row's bytes are the reference library's, of kinds that it cannot write too."""
    from gguf.constants import GGML_QUANT_SIZES

    from specrt.config.gguf_header import BLOCK_SIZES

    for kind, size in BLOCK_SIZES.items():
        assert tuple(size) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]], kind


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("blk.2.ffn_up.weight"), r"missing tensor blk.2.ffn_up.weight \[128, 64\]"),
        (lambda t: t.pop("output_norm.weight"), r"missing tensor output_norm.weight \[64\]"),
        (lambda t: t.pop("token_embd.weight"), "missing tensor token_embd.weight"),
        (
            lambda t: t.update({"blk.0.attn_k.weight": torch.ones(64, 64)}),
            r"blk.0.attn_k.weight: expected \[32, 64\], got \[64, 64\]",
        ),
        (
            lambda t: t.update({"blk.0.ffn_gate_inp.weight": torch.ones(8, 64)}),
            r"unknown tensor blk.0.ffn_gate_inp.weight \[8, 64\]",
        ),
        (
            lambda t: t.update({"blk.7.ffn_up.weight": torch.ones(128, 64)}),
            r"blk.7.ffn_up.weight \[128, 64\] is not of a model of 3 layers",
        ),
        (
            lambda t: t.update({"blk.1.attn_q_norm.weight": torch.ones(16)}),
            r"blk.1.attn_q_norm.weight \[16\] is not of a model of 3 layers of llama",
        ),
    ],
)
def test_other_tensors(edit: Any, message: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, intermediate_size=128)
    write_gguf(tmp_path, tmp_path / "model.gguf", edit_tensors=edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(tmp_path / "model.gguf")
    assert str(caught.value).startswith(str(tmp_path / "model.gguf"))


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, file, edit=lambda metadata: metadata.update({"llama.block_count": 2**30}))
    with pytest.raises(CheckpointError, match=r"block_count: expected no more layers than there"):
        GgufFile(file)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf")
    make_checkpoint("llama", path, num_hidden_layers=1)
    write_gguf(path, path / "model.gguf")
    return (path / "model.gguf").read_bytes()


def refusal(path: Path, data: bytes) -> str:
    file = path / "broken.gguf"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        GgufFile(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    return message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a GGUF file, got an empty one"),
        (b"PK\3\4 and more", "not a GGUF file: begins with b'PK"),
        (b"GGUF", "truncated in the header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported (expected 2 or"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "GGUF version 4 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture None is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "truncated in the metadata (key 1 of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1), "truncated in the metadata (key 1"),
        (
            b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 13),
            "k: a value of unknown type 13",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**60),
            "truncated in the metadata (k)",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIQ1s", 3, 0, 1, 1, b"k", 8, 1, b"\xff"),
            "the metadata (k): has text that is not UTF-8",
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
    ],
)
def test_headers_that_are_none(data: bytes, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, data)


def test_truncated_anywhere(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "whole.gguf"
    file.write_bytes(content)
    values = min(place.start for place in read_gguf_header(file).tensors.values())
    names = content.index(b"token_embd.weight")
    told = set()
    for size in [*range(4, values, 97), names + 3, values, len(content) - 1]:
        message = refusal(tmp_path, content[:size])
        assert "truncated" in message
        told.add(message.split(": ", 1)[1].split(" (")[0].split(" ends")[0])
    assert {"truncated in the header", "truncated in the metadata"} < told
    assert "truncated in the list of tensors" in told
    assert any(message.startswith("truncated: ") for message in told)


@pytest.mark.parametrize(("number", "name"), [(13, "Q5_K"), (99, "number 99")])
def test_a_tensor_of_another_kind(number: int, name: str, content: bytes, tmp_path: Path) -> None:
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    assert content[place : place + 4] == bytes(4)  # F32
    data = content[:place] + struct.pack("<I", number) + content[place + 4 :]
    message = refusal(tmp_path, data)
    assert (
        f"token_embd.weight: tensors of type {name} are not supported (supported: F32," in message
    )


def test_rows_that_are_no_whole_blocks(content: bytes, tmp_path: Path) -> None:
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    data = content[:place] + struct.pack("<I", 12) + content[place + 4 :]  # Q4_K
    assert "token_embd.weight: [97, 64] is no shape of Q4_K" in refusal(tmp_path, data)


def test_a_norm_in_blocks(content: bytes, tmp_path: Path) -> None:
    place = content.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data = content[:place] + struct.pack("<I", 8) + content[place + 4 :]
    message = refusal(tmp_path, data)
    assert "output_norm.weight: expected single values, got blocks (Q8_0)" in message


def test_what_is_there_twice(content: bytes, tmp_path: Path) -> None:
    data = content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight")
    assert "blk.0.attn_k.weight: is there twice" in refusal(tmp_path, data)
    data = content.replace(b"tokenizer.ggml.bos", b"tokenizer.ggml.eos")
    assert "tokenizer.ggml.eos_token_id: is there twice" in refusal(tmp_path, data)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x.gguf: no such file$"):
        ModelConfig.from_directory(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x.gguf: cannot be read: No such file"):
        GgufFile(tmp_path / "x.gguf")
