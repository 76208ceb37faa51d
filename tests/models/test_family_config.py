"""Families: what their keys come to, against transformers' own configuration classes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specrt.config import Form, LayerKind, ModelConfig
from specrt.config.families import FAMILIES
from specrt.models.families import naming_of
from specrt.models.layouts import expected_shapes
from specrt.models.stored import stored_tensors
from specrt.types import CheckpointError
from tests.models.test_config import LLAMA, OLD_KEYS, UNSLOTH, changed, saved

CONFIGURED = [name for name in FAMILIES if not name.endswith("_vl_text")]
"""Families whose configuration class can be made by itself."""


def own_keys(family: str) -> dict[str, Any]:
    """The configuration class of a family as it is, written and read once."""
    data = CONFIG_MAPPING[family]().to_dict()
    return dict[str, Any](json.loads(json.dumps(data)))


@pytest.mark.parametrize("family", CONFIGURED)
def test_no_key_of_transformers_own_is_unknown(family: str, tmp_path: Path) -> None:
    """Nor any that it has had: old checkpoints were written with all of them."""
    data = {**PreTrainedConfig().to_dict(), **OLD_KEYS, **GenerationConfig().to_dict(), **UNSLOTH}
    data |= own_keys(family) | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(data))
    ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("family", CONFIGURED)
def test_missing_keys_are_what_transformers_takes(family: str) -> None:
    data = own_keys(family)
    names = FAMILIES[family].names
    sizes = {names.get(key, key) for key in (*LLAMA, "intermediate_size")} & {*data}
    assert ModelConfig.from_dict({key: data[key] for key in sizes}) == replace(
        ModelConfig.from_dict(data), dtype=torch.float32
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def test_yarn() -> None:
    """What is left out is worked out; a context that was not stretched by hand is."""
    read = ModelConfig.from_dict(changed(max_position_embeddings=32, rope_scaling=YARN))
    numbers = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    attention = {"attention_factor": 0.1 * math.log(4.0) + 1.0}
    assert read.rope_scaling == {**YARN, **numbers, **attention}
    assert read.max_positions == 128
    given = {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": False}
    read = ModelConfig.from_dict(changed(rope_scaling={**YARN, **given}))
    ratio = (0.1 * math.log(4.0) + 1.0) / (0.05 * math.log(4.0) + 1.0)
    assert read.rope_scaling is not None
    assert read.rope_scaling["attention_factor"] == pytest.approx(ratio)
    assert (read.rope_scaling["beta_fast"], read.rope_scaling["truncate"]) == (16.0, False)
    assert (read.max_positions, read.notices) == (2048, ())


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope_ends_where_other_factors_begin(name: str) -> None:
    sizes = {"original_max_position_embeddings": 512, "max_position_embeddings": 2048}
    data = changed(model_type="phi3", rope_scaling={**LONG, "type": name}, **sizes)
    read = ModelConfig.from_dict(data)
    attention = math.sqrt(1 + math.log(4.0) / math.log(512.0))
    assert read.rope_scaling == {
        "rope_type": "longrope",
        "factors": [1.0] * 8,
        "attention_factor": pytest.approx(attention),
    }
    assert read.max_positions == 512
    assert "the context ends at 512 of 2048 tokens" in read.notices[0]


def test_dynamic_rope_is_plain_within_its_context() -> None:
    read = ModelConfig.from_dict(changed(rope_scaling={"type": "dynamic", "factor": 4.0}))
    assert (read.rope_scaling, read.max_positions) == (None, 2048)
    assert "dynamic rope" in read.notices[0]


def test_scaled_queries_end_the_context() -> None:
    rope = {**YARN, "llama_4_scaling_beta": 0.1}
    data = changed(model_type="ministral3", num_key_value_heads=2, rope_parameters=rope)
    read = ModelConfig.from_dict(data)
    assert read.max_positions == 32
    assert "queries are scaled" in read.notices[0]


def kinds(**changes: Any) -> list[str]:
    """The layers of a configuration as words: a window's size or 0, and the rotary embedding."""
    read = ModelConfig.from_dict(changed(num_hidden_layers=4, num_key_value_heads=4, **changes))
    return [f"{kind.window or 0} {kind.rope}" for kind in read.form.layers]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, ["8 main"] * 4),
        ({"model_type": "mistral", "sliding_window": 8, "max_position_embeddings": 8}, []),
        ({"model_type": "qwen2", "sliding_window": 8}, []),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            ["0 main"] * 3 + ["8 main"],
        ),
        ({"model_type": "gemma2", "sliding_window": 8}, ["8 main", "0 main"] * 2),
        (
            {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2},
            ["8 local", "0 main"] * 2,
        ),
        ({"model_type": "olmo3", "sliding_window": 8}, ["8 main"] * 3 + ["0 main"]),
        (
            {
                "model_type": "olmo3",
                "sliding_window": 8,
                "rope_scaling": YARN,
                "max_position_embeddings": 128,
            },
            ["8 local"] * 3 + ["0 main"],
        ),
        ({"model_type": "cohere2", "sliding_window": 8}, ["8 main"] * 3 + ["0 none"]),
        ({"model_type": "exaone4", "sliding_window": 8}, ["8 main"] * 3 + ["0 none"]),
        ({"model_type": "exaone4", "sliding_window": None}, []),
        ({"model_type": "cwm", "sliding_window": 8}, ["0 main"] + ["8 main"] * 3),
        ({"model_type": "smollm3"}, ["0 main"] * 3 + ["0 none"]),
        (
            {
                "model_type": "smollm3",
                "no_rope_layers": [1, 0, 1, 1],
                "use_sliding_window": True,
                "sliding_window": 8,
            },
            ["0 main", "8 none", "0 main", "0 main"],
        ),
        ({"model_type": "gpt2"}, ["0 none"] * 4),
        ({"model_type": "vaultgemma", "sliding_window": 8}, ["8 main", "0 main"] * 2),
        (
            {
                "model_type": "gpt_neo",
                "attention_types": [[["local"], 1], [["global", "local", "local"], 1]],
                "attention_layers": ["global"] * 4,  # which transformers does not read
            },
            ["256 none", "0 none", "256 none", "256 none"],
        ),
    ],
)
def test_kinds_of_layers(data: dict[str, Any], expected: list[str]) -> None:
    assert kinds(**data) == expected


@pytest.mark.parametrize(
    "said",
    [
        None, 3, [], ["global"], [[["global"], 3]], [[["global"], 5]], [[["global"], "4"]],
        [[["global", "sliding"], 2]], [[["global"], 4, 1]],
        [[["global"], 1 << 60]], [[["global"], 4], 5], [[["global"], 4], [["local"], None]],
    ],
)  # fmt: skip
def test_gpt_neo_says_what_each_layer_sees(said: Any) -> None:
    data = changed(model_type="gpt_neo", num_hidden_layers=4, attention_types=said)
    with pytest.raises(CheckpointError, match="attention_types: expected 4 of global and local"):
        ModelConfig.from_dict(data)
    data |= {"attention_types": [[["global", "local"], 2]], "window_size": 0}
    with pytest.raises(CheckpointError, match="window_size"):
        ModelConfig.from_dict(data)


def test_gpt_neo_is_a_gpt2_but_for_these() -> None:
    """Products of q and k are not scaled; q, k and v have no biases, what comes after them has."""
    data = changed(num_hidden_layers=4, attention_types=[[["global"], 4]])
    neo = ModelConfig.from_dict({**data, "model_type": "gpt_neo"})
    del data["attention_types"]
    gpt2 = ModelConfig.from_dict({**data, "model_type": "gpt2"})
    assert neo.form == replace(gpt2.form, attention_scale=1.0)
    assert (neo.has_attention_bias, neo.has_output_bias, neo.has_mlp_bias) == (False, True, True)


def test_vaultgemma_is_a_gemma2_with_half_of_the_norms() -> None:
    data = changed(query_pre_attn_scalar=24, num_key_value_heads=4)
    vault, gemma = (
        ModelConfig.from_dict({**data, "model_type": name}) for name in ("vaultgemma", "gemma2")
    )
    assert vault.form == replace(gemma.form, is_post_normed=False)
    names = stored_tensors(naming_of("vaultgemma"), vault, expected_shapes(vault))
    keys = {one.key for one in names if one.key.startswith("model.layers.0.") and "norm" in one.key}
    ends = ("input_layernorm", "pre_feedforward_layernorm")
    assert keys == {f"model.layers.0.{name}.weight" for name in ends}


def test_a_text_model_inside_of_a_multimodal_one(tmp_path: Path) -> None:
    text = changed(model_type="qwen2_5_vl_text", num_key_value_heads=2)
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1e6}
    wrapper = {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "vision_config": {"depth": 2},
        "text_config": text,
    }
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    read = ModelConfig.from_directory(tmp_path)
    assert (read.architecture, read.form, read.rope_scaling) == ("qwen2", Form(), None)
    assert (read.is_head_tied, read.hidden_size, read.num_kv_heads) == (True, 64, 2)
    assert read.notices == ("the text model of qwen2_5_vl alone (qwen2_5_vl_text)",)
    text["a_key_of_tomorrow"] = 3
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    with pytest.raises(CheckpointError, match="a_key_of_tomorrow: unknown"):
        ModelConfig.from_directory(tmp_path)


def test_a_familys_own_keys_are_its_own(tmp_path: Path) -> None:
    granite = {"model_type": "granite", "logits_scaling": 8.0}
    read = ModelConfig.from_directory(saved(tmp_path, **granite))
    assert read.form == Form(attention_scale=1.0, logit_scale=0.125)
    with pytest.raises(CheckpointError, match="logits_scaling: unknown"):
        ModelConfig.from_directory(saved(tmp_path, logits_scaling=8.0))
    assert ModelConfig.from_dict(changed(hidden_act="gelu")).form.activation == "gelu"
    gemma = changed(model_type="gemma", num_key_value_heads=4, hidden_act="gelu")
    assert ModelConfig.from_dict(gemma).form.activation == "gelu_tanh"
    gpt = changed(model_type="gpt2", n_inner=None, intermediate_size=...)
    assert ModelConfig.from_dict(gpt).intermediate_size == 256
    assert ModelConfig.from_dict(gpt).form.layer(2) == LayerKind(rope="none")


def test_a_nemotrons_head_is_its_share_of_the_hidden_size() -> None:
    data = own_keys("nemotron") | {"hidden_size": 64, "num_attention_heads": 4}
    del data["head_dim"]
    assert ModelConfig.from_dict(data).head_dim == 16


@pytest.mark.parametrize(
    ("family", "key"), [("mistral", "layer_types"), ("smollm3", "no_rope_layers")]
)
@pytest.mark.parametrize("value", [[["a"]] * 64, [{}] * 64])
def test_lists_in_lists_are_refused_by_name(family: str, key: str, value: list[Any]) -> None:
    data = own_keys(family) | {key: value}
    with pytest.raises(CheckpointError, match=f"config.json: {key}: expected "):
        ModelConfig.from_dict(data)
