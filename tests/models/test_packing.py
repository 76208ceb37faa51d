"""What matrices are kept as: values stay, wherever they come from and whatever they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from specrt.config import ModelConfig
from specrt.models.dense import dense
from specrt.models.gguf_file import GgufFile
from specrt.models.layouts import LAYER_MATRICES
from specrt.models.loader import Weights, load_tables, load_weights
from specrt.models.packing import ROWS, Packing, choose_packing
from specrt.ops import MatrixKind, PackedMatrix, StackedMatrix, matrix_pack
from specrt.types import CheckpointError
from tests.checkpoints import edit_tensors, make_checkpoint, store_as_float8
from tests.gguf_files import write_gguf

BF16 = torch.bfloat16
PACKED = Packing(MatrixKind.BF16_SPLIT, keeps_blocks=True)
# As llama.cpp's Q4_K_M, and with a table of single values.
MIXED = {"attn_v": "Q6_K", "ffn_up": "Q8_0", "ffn_down": "Q6_K", "token_embd": "BF16"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose rows are whole blocks of any kind."""
    path = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    make_checkpoint("llama", path, **sizes, tie_word_embeddings=True)
    return path


def loaded(path: Path, dtype: torch.dtype, packing: Packing = ROWS) -> Weights:
    return load_weights(path, ModelConfig.from_directory(path), dtype, packing=packing)


def rows_in_file(file: Path) -> dict[str, torch.Tensor]:
    """Float32 values of a file's matrices by Hugging Face's names, by the reference's reading."""
    values = {}
    for key, tensor in GgufFile(file).tensors.items():
        rows = tensor.rows(0, tensor.shape[0]).numpy()
        kind = GGMLQuantizationType[tensor.kind]
        values[key] = torch.from_numpy(dequantize(rows, kind).copy()).reshape(tensor.shape)
    return values


def assert_values(weights: Weights, expected: dict[str, torch.Tensor]) -> None:
    """Whether every matrix has exactly these values."""
    for index, layer in enumerate(weights.layers):
        for name, parts in LAYER_MATRICES.items():
            keys = [f"model.layers.{index}.{part}.weight" for part in parts]
            wanted = torch.cat([expected[key] for key in keys])
            assert torch.equal(dense(getattr(layer, name)).float(), wanted), keys
    assert torch.equal(dense(weights.embed).float(), expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "mixed"])
def test_blocks_have_the_reference_values(kind: str, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    kinds = MIXED if kind == "mixed" else {}
    write_gguf(directory, file, kind="Q4_K" if kinds else kind, kinds=kinds)
    expected = rows_in_file(file)
    weights = loaded(file, torch.float16, PACKED)
    assert_values(weights, expected)
    assert weights.lm_head is weights.embed
    assert weights.dtype == torch.float16
    if not kinds:
        assert weights.form == kind
    else:
        assert set(weights.forms) == {"Q4_K", "Q6_K", "Q8_0", "BF16_SPLIT"}
        qkv = weights.layers[0].qkv
        assert isinstance(qkv, StackedMatrix)
        assert [part.shape[0] for part in qkv.parts] == [256 + 128, 128]  # q with k, and v
    assert_values(loaded(file, torch.float32), expected)  # in rows: who asks for values gets them
    table = load_tables(file, ModelConfig.from_directory(file), torch.float32).embed
    assert torch.equal(table, expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama_biased"])
def test_tiles_have_the_values_of_rows(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    rows, tiles = loaded(tmp_path, BF16), loaded(tmp_path, BF16, PACKED)
    assert tiles.form == "BF16_SPLIT"
    assert tiles.dtype == BF16
    for ours, theirs in zip(tiles.matrices, rows.matrices, strict=True):
        assert torch.equal(dense(ours), dense(theirs).float())
    assert torch.equal(tiles.final_norm, rows.final_norm)
    assert loaded(tmp_path, torch.float32, PACKED).form == "float32"


def test_packed_matrices_lie_in_the_arena_as_they_are_read(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    weights = loaded(tmp_path, BF16, PACKED)
    end = weights.arena.data_ptr()
    for matrix in weights.matrices:
        assert isinstance(matrix, PackedMatrix)
        assert matrix.values.data_ptr() == end
        assert end % 64 == 0
        end += matrix.nbytes
    assert end == weights.arena.data_ptr() + weights.arena.numel()
    assert sum(weights.forms.values()) == weights.arena.numel()


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float8"])
def test_int8_is_rounded_from_any_checkpoint(stored: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, dtype=BF16 if stored == "bfloat16" else torch.float32)
    if stored == "float8":
        store_as_float8(tmp_path)
    dtype = torch.float32 if stored == "float32" else BF16
    rows = loaded(tmp_path, dtype)
    rounded = loaded(tmp_path, dtype, Packing(quantized=MatrixKind.INT8))
    assert rounded.form == "INT8"
    assert rounded.dtype == dtype  # of keys and values
    for ours, theirs in zip(rounded.matrices, rows.matrices, strict=True):
        assert isinstance(ours, PackedMatrix)
        expected = PackedMatrix.empty(MatrixKind.INT8, *theirs.shape)
        matrix_pack(dense(theirs), expected)
        assert torch.equal(ours.values, expected.values)
        assert (dense(ours) - dense(theirs)).abs().max() < dense(theirs).abs().max() / 250


def test_what_is_not_finite_is_named(directory: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, dtype=BF16)
    key = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: tensors[key][3, 5:6].fill_(float("inf")))
    for packing in (PACKED, Packing(quantized=MatrixKind.INT8)):
        with pytest.raises(CheckpointError, match=f"{key}: has NaN or infinite values"):
            loaded(tmp_path, BF16, packing)
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].float()}))
    edit_tensors(tmp_path, lambda tensors: tensors[key][3, 5:6].fill_(3.4e38))
    with pytest.raises(CheckpointError, match=rf"{key}: 3\.4e\+38 is out of bfloat16's range"):
        loaded(tmp_path, BF16, PACKED)

    file = tmp_path / "model.gguf"
    write_gguf(directory, file, kind="Q8_0")
    place = GgufFile(file).header.tensors["blk.1.ffn_up.weight"]
    with file.open("r+b") as content:
        content.seek(place.start)
        content.write(np.float16("inf").tobytes())
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight: has blocks with NaN or"):
        loaded(file, torch.float16, PACKED)


def test_what_cannot_be_packed_is_refused() -> None:
    for name, value in (("quantize", "int8"), ("activations", "float32")):
        given = {"quantize": None, "activations": None, name: value}
        with pytest.raises(ValueError, match=f"{name}: '{value}' is for the CPU's kernels"):
            choose_packing(BF16, torch.device("cuda", 1), **given)
    assert choose_packing(BF16, torch.device("cuda", 1), None, None) == ROWS
    assert choose_packing(BF16, torch.device("cuda", 1), "none", None) == ROWS


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_can_be_kept_as_their_values(directory: Path, tmp_path: Path, kind: str) -> None:
    """As what they are rounded to would be, had it been rows."""
    file, cpu = tmp_path / "model.gguf", torch.device("cpu")
    write_gguf(directory, file, kind=kind)
    values = loaded(file, torch.float32, ROWS)
    exact = loaded(file, torch.float16, choose_packing(torch.float16, cpu, None, None))
    assert all(map(torch.equal, map(dense, exact.matrices), map(dense, values.matrices)))
    assert kind in exact.form

    for dtype, option in ((BF16, "none"), (torch.float32, "none"), (BF16, "int8")):
        weights = loaded(file, dtype, choose_packing(dtype, cpu, option, None))
        form = "INT8" if option == "int8" else "BF16_SPLIT" if dtype == BF16 else "float32"
        assert weights.form == form
        for ours, rows in zip(weights.matrices, values.matrices, strict=True):
            if option == "int8":
                assert isinstance(rows, torch.Tensor)
                expected = PackedMatrix.empty(MatrixKind.INT8, *rows.shape)
                assert matrix_pack(rows, expected, 0)
                assert torch.equal(dense(ours), dense(expected))
            else:
                assert torch.equal(dense(ours), dense(rows).to(dtype).float())


def test_heads_that_are_padded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 128}
    make_checkpoint("llama", tmp_path, **sizes, num_hidden_layers=2)
    config = ModelConfig.from_directory(tmp_path)
    rows = load_weights(tmp_path, config, BF16, head_dim=32)
    tiles = load_weights(tmp_path, config, BF16, head_dim=32, packing=PACKED)
    for ours, theirs in zip(tiles.matrices, rows.matrices, strict=True):
        assert torch.equal(dense(ours), dense(theirs).float())
    write_gguf(tmp_path, tmp_path / "model.gguf", kind="Q8_0")
    with pytest.raises(CheckpointError, match=r"attn_output\.weight: expected heads of a multiple"):
        load_weights(tmp_path / "model.gguf", config, torch.float16, head_dim=32, packing=PACKED)
