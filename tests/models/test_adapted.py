"""LoRA adapters merged at load: peft's own merged weights, and every refusal.

Reference vectors (``tests/golden/lora.safetensors``) are adapters that peft saved and merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import specrt
from specrt.config import ModelConfig
from specrt.models.checkpoint import Checkpoint
from specrt.models.loader import load_weights
from specrt.models.opening import open_checkpoint
from specrt.types import CheckpointError
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.cli.test_cli import write_tokenizer
from tests.quantized_checkpoints import store_quantized

GOLDEN = Path(__file__).parents[1] / "golden" / "lora.safetensors"
Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
START = "base_model.model."
Tensors = dict[str, torch.Tensor]


def golden_cases() -> dict[str, str]:
    with safe_open(GOLDEN, framework="pt") as file:
        return dict(sorted(file.metadata().items()))


def some_of(start: str) -> Tensors:
    stored = load_file(GOLDEN)
    return {key.removeprefix(start): t for key, t in stored.items() if key.startswith(start)}


def write_adapter(path: Path, tensors: Tensors, **settings: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}
    (path / "adapter_config.json").write_text(json.dumps(said | settings))
    return path


@pytest.mark.parametrize("name", golden_cases())
def test_merged_weights_are_peft_s(name: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(some_of(f"{name}.base."), tmp_path / "base/model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", some_of(f"{name}.adapter."))
    (adapter / "adapter_config.json").write_text(golden_cases()[name])
    merged = open_checkpoint(tmp_path / "base", adapter)
    for key, wanted in some_of(f"{name}.merged.").items():
        assert merged.infos[key].shape == wanted.shape
        ours = torch.cat([merged.rows(key, 0, 5), merged.rows(key, 5, len(wanted))])
        # A product's order of summation is the library's, so a rounding may fall the other way.
        limit = 1e-5 if wanted.dtype == torch.float32 else 0.0
        near = (ours.to(wanted.dtype) - wanted).abs() <= limit
        assert near.float().mean() > (0.99 if limit == 0 else 0.9999)
        torch.testing.assert_close(ours.to(wanted.dtype), wanted)


def random_adapter(
    path: Path, *modules: str, rank: int = 4, shape: tuple[int, int] = (64, 64), **settings: Any
) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        tensors[f"{START}{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator)
        tensors[f"{START}{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator)
    return write_adapter(path, tensors, **settings)


def test_a_target_is_merged_as_it_is_loaded(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_checkpoint("llama", base, dtype=torch.bfloat16)
    write_tokenizer(base)
    random_adapter(adapter, Q_PROJ)
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"{START}{Q_PROJ}.lora_{x}.weight"]
            for x in "AB")  # fmt: skip

    def merge(tensors: Tensors) -> None:
        key = f"{Q_PROJ}.weight"
        tensors[key] = (tensors[key].float() + (b @ a) * 2.0).bfloat16()

    engine = specrt.load(base, lora=adapter, activations="float32", progress=False)
    plain = specrt.load(base, activations="float32", progress=False)
    assert not torch.equal(engine.target.weights.arena, plain.target.weights.arena)
    edit_tensors(base, merge)
    merged = specrt.load(base, activations="float32", progress=False)
    assert torch.equal(engine.target.weights.arena, merged.target.weights.arena)
    prompt = [1, 5, 9]
    assert (
        engine.generate(prompt, max_new_tokens=8).token_ids
        == merged.generate(prompt, max_new_tokens=8).token_ids
    )


def test_a_quantised_model_is_merged_too(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "base", intermediate_size=128)
    exact = store_quantized(tmp_path / "base", "awq")[f"{Q_PROJ}.weight"]
    adapter = random_adapter(tmp_path / "adapter", Q_PROJ)
    a, b = (Checkpoint(adapter, ("adapter_model.safetensors",)).tensor(
        f"{START}{Q_PROJ}.lora_{x}.weight") for x in "AB")  # fmt: skip
    merged = open_checkpoint(tmp_path / "base", adapter).tensor(f"{Q_PROJ}.weight")
    torch.testing.assert_close(merged, exact.float() + b @ a * 2.0)


def test_a_transposed_matrix_tells_itself(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    stored = torch.zeros(24, 32)  # [K, N]
    save_file({"h.c_attn.weight": stored}, tmp_path / "base/model.safetensors")
    adapter = random_adapter(tmp_path / "adapter", "h.c_attn", shape=(32, 24))
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"{START}h.c_attn.lora_{x}.weight"] for x in "AB")
    merged = open_checkpoint(tmp_path / "base", adapter)
    rows = torch.cat([merged.rows("h.c_attn.weight", 0, 7), merged.rows("h.c_attn.weight", 7, 24)])
    torch.testing.assert_close(rows, (b @ a).T * 2.0)


# --- what is refused ----------------------------------------------------------------------------


def refusal(base: Path, adapter: Path) -> str:
    config = ModelConfig.from_directory(base, adapter=adapter)
    with pytest.raises(CheckpointError) as caught:
        load_weights(base, config, torch.float32, adapter=adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"bias": "all"}, "bias: expected none, got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the model's own"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: not supported"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: not supported"),
        ({"r": 0}, "r: expected a positive number, got 0"),
        ({"rank_pattern": {"q_proj": 2}}, "expected [2, 64] for model.layers.0"),
        ({"use_dora": True}, "lora_magnitude_vector beside it, found none"),
    ],
)
def test_settings_that_do_more(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", Q_PROJ, **settings)
    assert words in refusal(tmp_path / "base", adapter)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{START}{Q_PROJ}.lora_B.weight"), "q_proj.lora_B beside it, found none"),
        (
            lambda t: t.update({f"{START}{Q_PROJ}.lora_B.bias": torch.zeros(64)}),
            "lora_B.bias: not supported",
        ),
        (
            lambda t: t.update({f"{START}model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}),
            "the model has no model.layers.9.mlp.up_proj.weight, it was made for org/base",
        ),
        (
            lambda t: t.update({f"{START}lm_head.weight": torch.zeros(99, 64)}),
            "expected [97, 64] for lm_head.weight [97, 64], got [99, 64]",
        ),
        (
            lambda t: t.update({f"{START}{Q_PROJ}.lora_magnitude_vector": torch.ones(64)}),
            "lora_magnitude_vector: not expected",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    edit: Callable[[Tensors], object], words: str, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", Q_PROJ)
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    assert words in refusal(tmp_path / "base", write_adapter(adapter, tensors))


def test_another_model_s_adapter_names_shapes(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", DOWN, shape=(64, 128))
    message = refusal(tmp_path / "base", adapter)
    assert "expected [4, 112] for model.layers.1.mlp.down_proj.weight [64, 112], got [4, 128]" in (
        message
    )
    assert message.endswith("the adapter was made for org/base")


def test_a_tied_table_is_not_changed(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path / "base")
    tables = {f"{START}model.embed_tokens.weight": torch.zeros(97, 64)}
    adapter = write_adapter(tmp_path / "adapter", tables)
    assert "an embedding that is the head too" in refusal(tmp_path / "base", adapter)


def test_an_adapter_is_never_passed_over(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    random_adapter(tmp_path, Q_PROJ)
    with pytest.raises(CheckpointError, match="a LoRA adapter beside a model: name it"):
        ModelConfig.from_directory(tmp_path)
    ModelConfig.from_directory(tmp_path, adapter=tmp_path)
    (tmp_path / "model.safetensors").unlink()
    alone = r"a LoRA adapter of org/base, no model \(load 'org/base' with lora="
    with pytest.raises(CheckpointError, match=alone):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=alone):
        specrt.load(tmp_path)
    make_checkpoint("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected a LoRA adapter, got no adapter_config"):
        specrt.load("builtin", lora=tmp_path / "model")
