"""Families' tensors under our names: what is stored as one, turned, under other names, or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specrt.config import ModelConfig
from specrt.models.heads import HeadLayout
from specrt.models.layouts import weight_bytes
from specrt.models.loader import LayerWeights, Weights, load_tables, load_weights
from specrt.models.stored import StandardCheckpoint
from specrt.types import CheckpointError
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint, store_as_float8
from tests.families import build
from tests.family_cases import Case

Tensors = dict[str, torch.Tensor]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(path, ModelConfig.from_directory(path), dtype)


def stored(path: Path) -> Tensors:
    return {key: tensor.float() for key, tensor in load_file(path / "model.safetensors").items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's random model, which is written once and not to be changed."""
    paths: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in paths:
            paths[family] = tmp_path_factory.mktemp(family)
            build(Case(family, family), paths[family])
        return paths[family]

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same, to be changed."""

    def make(family: str) -> Path:
        for file in made(family).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return make


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_that_are_stored_as_one(
    made: Callable[[str], Path], dtype: torch.dtype
) -> None:
    path = made("phi3")
    tensors = stored(path)
    for index, layer in enumerate(load(path, dtype).layers):
        prefix = f"model.layers.{index}."
        assert torch.equal(layer.qkv, tensors[f"{prefix}self_attn.qkv_proj.weight"].to(dtype))
        assert torch.equal(layer.gate_up, tensors[f"{prefix}mlp.gate_up_proj.weight"].to(dtype))


def test_q_k_and_v_head_by_head(made: Callable[[str], Path]) -> None:
    """The first quarter of a head is turned; in the half that it lies in it stays in front."""
    path = made("gpt_neox")
    tensors, order = stored(path), HeadLayout(16, 16, rotary_dim=4).order()
    assert order[:8].tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    for index, layer in enumerate(load(path).layers):
        prefix = f"gpt_neox.layers.{index}.attention.query_key_value."
        for name, got in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            heads = tensors[prefix + name].unflatten(0, (4, 3, 16))
            q, k, v = heads[:, 0][:, order], heads[:, 1][:, order], heads[:, 2]
            assert torch.equal(got, torch.cat([q, k, v]).flatten(0, 1)), name


@pytest.mark.parametrize("piece", [None, 1000])
def test_matrices_that_lie_turned(
    made: Callable[[str], Path], piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece is not None:  # some rows at a time, not all of them as many
        monkeypatch.setattr("specrt.models.filling._PIECE", piece)
    path = made("gpt2")
    tensors, weights = stored(path), load(path)
    for index, layer in enumerate(weights.layers):
        prefix = f"transformer.h.{index}."
        for name, ours in (
            ("attn.c_attn", "qkv"),
            ("attn.c_proj", "o"),
            ("mlp.c_fc", "gate_up"),
            ("mlp.c_proj", "down"),
        ):
            assert torch.equal(getattr(layer, ours), tensors[f"{prefix}{name}.weight"].T), ours
            assert torch.equal(getattr(layer, f"{ours}_bias"), tensors[f"{prefix}{name}.bias"])
    assert weights.lm_head is weights.embed
    assert torch.equal(weights.embed, tensors["transformer.wte.weight"])
    assert weights.positions is not None and weights.final_norm_bias is not None
    assert torch.equal(weights.positions, tensors["transformer.wpe.weight"])
    assert torch.equal(weights.final_norm_bias, tensors["transformer.ln_f.bias"])


NORMS = {
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "glm4": (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    "olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "exaone4": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "cohere": ("input_layernorm", None, None, None),
    "hyperclovax": ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
}
"""Of each family: before attention, behind it, before the MLP, behind it."""


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_where_their_names_mean(made: Callable[[str], Path], family: str) -> None:
    path = made(family)
    tensors, offset = stored(path), 1.0 if family == "gemma2" else 0.0
    for index, layer in enumerate(load(path).layers):
        ours = (layer.input_norm, layer.attended_norm, layer.post_norm, layer.mlp_norm)
        for got, name in zip(ours, NORMS[family], strict=True):
            if name is None:
                assert got is None
            else:
                expected = offset + tensors[f"model.layers.{index}.{name}.weight"]
                assert torch.equal(got, expected), name


def test_an_offset_is_added_in_float32(copied: Callable[[str], Path]) -> None:
    path = copied("gemma3_text")
    edit_tensors(path, lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    tensors = stored(path)
    layer = load(path, torch.bfloat16).layers[1]
    assert layer.q_norm is not None
    expected = 1 + tensors["model.layers.1.self_attn.q_norm.weight"]
    assert layer.q_norm.dtype == torch.float32
    assert torch.equal(layer.q_norm, expected)
    assert not torch.equal(expected, expected.to(torch.bfloat16).float())


def test_norms_without_weights_are_ones(made: Callable[[str], Path]) -> None:
    weights = load(made("olmo"))
    for norm in (weights.final_norm, weights.layers[0].input_norm, weights.layers[0].post_norm):
        assert torch.equal(norm, torch.ones(64))


def test_a_plain_mlp_and_a_biased_head(made: Callable[[str], Path]) -> None:
    path = made("phi")
    tensors, weights = stored(path), load(path)
    assert torch.equal(weights.head_bias, tensors["lm_head.bias"])
    assert torch.equal(weights.final_norm, tensors["model.final_layernorm.weight"])
    for index, layer in enumerate(weights.layers):
        assert torch.equal(layer.gate_up, tensors[f"model.layers.{index}.mlp.fc1.weight"])
        assert torch.equal(layer.o, tensors[f"model.layers.{index}.self_attn.dense.weight"])


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "olmo2"])
def test_bytes_are_told_before(made: Callable[[str], Path], family: str) -> None:
    config = ModelConfig.from_directory(made(family))
    weights = load(made(family), torch.bfloat16)
    is_tied = weights.lm_head is weights.embed
    held: list[Any] = [weights.lm_head, None if is_tied else weights.embed, weights.final_norm]
    held += [weights.final_norm_bias, weights.head_bias, weights.positions]
    held += [getattr(one, f.name) for one in weights.layers for f in fields(LayerWeights)]
    num_bytes = sum(tensor.nbytes for tensor in held if tensor is not None)
    assert num_bytes == weight_bytes(config, torch.bfloat16)


# --- names and files ------------------------------------------------------------------------------


def without_base(tensors: Tensors) -> None:
    """As OpenAI's own file has them, with the masks that it has."""
    for key in list(tensors):
        tensors[key.removeprefix("transformer.")] = tensors.pop(key)
    for index in range(4):
        tensors[f"h.{index}.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.uint8)
        tensors[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)


def same_weights(one: Weights, other: Weights) -> bool:
    layers = zip(one.layers, other.layers, strict=True)
    return torch.equal(one.arena, other.arena) and all(
        torch.equal(a.qkv, b.qkv) and torch.equal(a.down, b.down) for a, b in layers
    )


def test_the_base_class_of_another_family(
    made: Callable[[str], Path], copied: Callable[[str], Path]
) -> None:
    path = copied("gpt2")
    edit_tensors(path, without_base)
    assert same_weights(load(path), load(made("gpt2")))
    tables = load_tables(path, ModelConfig.from_directory(path), torch.float32)
    embed, head = tables.embed, tables.lm_head
    assert head is embed


def test_both_names_of_a_head(made: Callable[[str], Path], copied: Callable[[str], Path]) -> None:
    path = copied("gpt_neox")
    assert "embed_out.weight" in stored(path)
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert same_weights(load(path), load(made("gpt_neox")))


@pytest.mark.parametrize("style", ["whole", "base"])
def test_the_text_model_of_a_multimodal_one(style: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path)
    alone = load(tmp_path)

    def wrap(tensors: Tensors) -> None:
        for key in list(tensors):
            inner = key.replace("model.", "model.language_model.", 1)
            tensors[f"language_model.{key}" if style == "whole" else inner] = tensors.pop(key)
        tensors["vision_tower.patch.weight"] = torch.ones(3, 3)
        tensors["model.visual.norm.weight"] = torch.ones(3)

    edit_tensors(tmp_path, wrap)
    text = json.loads((tmp_path / "config.json").read_text())
    given = {"model_type": "some_vl", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert same_weights(load(tmp_path), alone)


def test_projections_under_our_own_names(
    made: Callable[[str], Path], copied: Callable[[str], Path]
) -> None:
    """As those who take a Phi-3 apart store them."""
    path = copied("phi3")

    def split(tensors: Tensors) -> None:
        for index in range(4):
            prefix = f"model.layers.{index}."
            qkv = tensors.pop(f"{prefix}self_attn.qkv_proj.weight").split([64, 32, 32])
            gate_up = tensors.pop(f"{prefix}mlp.gate_up_proj.weight").chunk(2)
            names = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
            for name, part in zip(names, (*qkv, *gate_up), strict=True):
                tensors[f"{prefix}{name}.weight"] = part.clone()

    edit_tensors(path, split)
    assert same_weights(load(path), load(made("phi3")))


def test_float8_of_projections_that_are_stored_as_one(copied: Callable[[str], Path]) -> None:
    path = copied("phi3")
    exact = store_as_float8(path)
    layer = load(path).layers[2]
    assert torch.equal(layer.qkv, exact["model.layers.2.self_attn.qkv_proj.weight"])
    assert torch.equal(layer.gate_up, exact["model.layers.2.mlp.gate_up_proj.weight"])


# --- how much is read -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "most"), [("phi3", 15), ("gpt_neox", 16), ("glm", 16)])
def test_only_what_is_asked_for_is_read(
    made: Callable[[str], Path], family: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many rows of 64 numbers at most: a head of 16 whose order changes is never parted."""
    monkeypatch.setattr("specrt.models.filling._PIECE", 4000)
    sizes: list[int] = []
    rows = StandardCheckpoint.rows

    def spy(self: Any, key: str, start: int, stop: int) -> torch.Tensor:
        found = rows(self, key, start, stop)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(StandardCheckpoint, "rows", spy)
    pieces = load(made(family))
    assert max(sizes) == most * 64 * 4
    monkeypatch.undo()
    assert same_weights(pieces, load(made(family)))


# --- refusals -------------------------------------------------------------------------------------

QKV = "model.layers.0.self_attn.qkv_proj.weight"
C_ATTN = "transformer.h.1.attn.c_attn.weight"


def refusal(path: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, dtype)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "edit", "said"),
    [
        ("phi3", lambda t: t.pop(QKV), f"missing tensor {QKV} [128, 64]"),
        ("phi3", lambda t: t.update({QKV: torch.ones(127, 64)}), f"{QKV}: expected [128, 64], got"),
        ("phi3", lambda t: t[QKV].fill_(torch.nan), f"{QKV}: has NaN or infinite values"),
        (
            "phi3",
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64)}),
            "unknown tensor model.layers.0.self_attn.q_proj.weight [64, 64]",
        ),
        ("gpt2", lambda t: t.pop(C_ATTN), f"missing tensor {C_ATTN} [64, 192]"),
        (
            "gpt2",
            lambda t: t.update({C_ATTN: t[C_ATTN].T.contiguous()}),
            f"{C_ATTN}: expected [64, 192], got [192, 64]",
        ),
        (
            "gpt2",
            lambda t: t.update({"transformer.h.0.crossattention.bias": torch.ones(2)}),
            "unknown tensor transformer.h.0.crossattention.bias [2]",
        ),
        (
            "opt",
            lambda t: t.pop("model.decoder.layers.3.fc2.bias"),
            "missing tensor model.decoder.layers.3.fc2.bias [64]",
        ),
        (
            "gemma2",
            lambda t: t.pop("model.layers.1.pre_feedforward_layernorm.weight"),
            "missing tensor model.layers.1.pre_feedforward_layernorm.weight [64]",
        ),
        (
            "cohere",
            lambda t: t.update({"model.layers.0.post_attention_layernorm.weight": torch.ones(64)}),
            "unknown tensor model.layers.0.post_attention_layernorm.weight [64]",
        ),
        (
            "cohere",
            lambda t: t.update({"model.layers.0.attn.bias": torch.ones(1)}),
            "unknown tensor model.layers.0.attn.bias [1]",
        ),
    ],
)
def test_refusals_name_what_is_stored(
    family: str, edit: Callable[[Tensors], Any], said: str, copied: Callable[[str], Path]
) -> None:
    path = copied(family)
    edit_tensors(path, edit)
    message = refusal(path)
    assert said in message
    assert message.startswith(str(path))


def test_float8_of_turned_matrices_has_one_scale(copied: Callable[[str], Path]) -> None:
    path = copied("gpt2")
    edit_tensors(
        path,
        lambda t: t.update(
            {C_ATTN: t[C_ATTN].to(torch.float8_e4m3fn), f"{C_ATTN}_scale": torch.ones(64)}
        ),
    )
    storage = {"format": "float8_e4m3fn", "scale_suffix": "_scale"}
    edit_config(path, specrt_storage=storage)
    assert f"{C_ATTN}_scale: expected [1]" in refusal(path)
