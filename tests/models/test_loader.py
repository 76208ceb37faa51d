"""Loaded weights against the checkpoint's own tensors, the arena's layout, and every refusal."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specrt.config import ModelConfig
from specrt.models.loader import LayerWeights, Weights, load_weights
from specrt.types import CheckpointError
from tests.checkpoints import (
    FAMILIES,
    edit_config,
    edit_tensors,
    make_checkpoint,
    store_as_bin,
    store_as_float8,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


def load(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(path, ModelConfig.from_directory(path), dtype)


def matrices(layer: LayerWeights) -> list[torch.Tensor]:
    return [layer.qkv, layer.o, layer.gate_up, layer.down]


def expected_layer(state: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor | None]:
    """A layer as ``torch.cat`` of the checkpoint's tensors packs it."""

    def packed(kind: str, *names: str) -> torch.Tensor | None:
        keys = [f"model.layers.{index}.{name}.{kind}" for name in names]
        return torch.cat([state[key] for key in keys]) if keys[0] in state else None

    qkv = [f"self_attn.{name}_proj" for name in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    return {
        "input_norm": packed("weight", "input_layernorm"),
        "qkv": packed("weight", *qkv),
        "qkv_bias": packed("bias", *qkv),
        "q_norm": packed("weight", "self_attn.q_norm"),
        "k_norm": packed("weight", "self_attn.k_norm"),
        "o": packed("weight", "self_attn.o_proj"),
        "o_bias": packed("bias", "self_attn.o_proj"),
        "post_norm": packed("weight", "post_attention_layernorm"),
        "gate_up": packed("weight", *gate_up),
        "gate_up_bias": packed("bias", *gate_up),
        "down": packed("weight", "mlp.down_proj"),
        "down_bias": packed("bias", "mlp.down_proj"),
    }


def assert_same(actual: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to the stored tensor in ``dtype``, or float32 if it is a vector."""
    wanted = stored.to(dtype if stored.dim() == 2 else torch.float32)
    assert actual.dtype == wanted.dtype
    assert actual.is_contiguous()
    assert torch.equal(actual, wanted)


def assert_loaded(weights: Weights, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for index, layer in enumerate(weights.layers):
        for name, stored in expected_layer(state, index).items():
            actual = getattr(layer, name)
            if stored is None:
                assert actual is None, name
            else:
                assert_same(actual, stored, dtype)
    assert_same(weights.embed, state[EMBED], dtype)
    assert_same(weights.lm_head, state.get("lm_head.weight", state[EMBED]), dtype)
    assert_same(weights.final_norm, state["model.norm.weight"], dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_dtype(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    for dtype in DTYPES:
        weights = load(tmp_path, dtype)
        assert len(weights.layers) == model.config.num_hidden_layers
        assert_loaded(weights, model.state_dict(), dtype)


@pytest.mark.parametrize("stored", [*DTYPES, torch.float64])
def test_every_stored_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    model = make_checkpoint("llama_biased", tmp_path, dtype=stored)
    for dtype in DTYPES:
        assert_loaded(load(tmp_path, dtype), model.state_dict(), dtype)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "bin shards", "legacy bin"])
def test_every_file_layout(layout: str, is_tied: bool, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path, tie_word_embeddings=is_tied)
    if "shards" in layout:
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if "bin" in layout:
        store_as_bin(tmp_path, is_zip=layout != "legacy bin")
        assert not list(tmp_path.glob("*.safetensors*"))
    weights = load(tmp_path, torch.bfloat16)
    assert (weights.lm_head is weights.embed) == is_tied
    assert_loaded(weights, model.state_dict(), torch.bfloat16)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arena_is_in_the_order_of_a_decode_step(
    dtype: torch.dtype, is_tied: bool, tmp_path: Path
) -> None:
    # An odd vocabulary and hidden size 66: matrices whose sizes are no multiples of 64 bytes.
    make_checkpoint("qwen3", tmp_path, hidden_size=66, tie_word_embeddings=is_tied)
    weights = load(tmp_path, dtype)
    order = [matrix for layer in weights.layers for matrix in matrices(layer)]
    order += [weights.lm_head] if is_tied else [weights.lm_head, weights.embed]
    assert weights.arena.data_ptr() % (2 << 20) == 0
    end = weights.arena.data_ptr()
    for matrix in order:
        assert matrix.data_ptr() % 64 == 0
        assert end <= matrix.data_ptr() < end + 64
        end = matrix.data_ptr() + matrix.numel() * matrix.itemsize
    assert weights.arena.data_ptr() + weights.arena.numel() - end < 64


def test_weights_outlive_the_checkpoint(tmp_path: Path) -> None:
    """Nothing loaded is still mapped from a file (a vanished file would be a bus error)."""
    model = make_checkpoint("llama", tmp_path)
    weights = load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    file.unlink()
    assert_loaded(weights, model.state_dict(), torch.float32)


def test_float8_storage_is_exact(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path)
    exact = store_as_float8(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        weights = load(tmp_path, dtype)
        assert_loaded(weights, exact, dtype)
        assert torch.equal(weights.layers[0].qkv.float(), load(tmp_path).layers[0].qkv)
    assert_loaded(load(tmp_path, torch.float16), exact, torch.float16)


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors[EMBED].clone()

    edit_tensors(tmp_path, add)
    weights = load(tmp_path)
    assert weights.lm_head is weights.embed
    assert_loaded(weights, model.state_dict(), torch.float32)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_for_terminals(
    is_terminal: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_checkpoint("llama", tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    load_weights(tmp_path, config, torch.float32, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("loading" in err) == is_terminal
    load_weights(tmp_path, config, torch.float32)
    assert capsys.readouterr().err == ""


def test_dtype_is_checked(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ValueError, match=r"dtype: expected float32.*float64"):
        load(tmp_path, torch.float64)


# --- refusals --------------------------------------------------------------------------------


def refusal(path: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, dtype)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


Edit = Callable[[dict[str, torch.Tensor]], Any]


def poison(key: str, value: float) -> Edit:
    """Write one value into the last element of a tensor."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(UP_PROJ), ["missing tensor", UP_PROJ, "[112, 64]"]),
        (lambda t: (t.pop(UP_PROJ), t.pop(NORM)), ["missing tensor", "(and 1 more)"]),
        (lambda t: t.pop("lm_head.weight"), ["missing tensor lm_head.weight [97, 64]"]),
        (
            lambda t: t.update({Q_PROJ: torch.ones(64, 32)}),
            ["model.safetensors", Q_PROJ, "expected [64, 64], got [64, 32]"],
        ),
        (lambda t: t.update({NORM: torch.ones(63)}), [NORM, "expected [64], got [63]"]),
        (lambda t: t.update(extra=torch.ones(2)), ["unknown tensor extra [2]"]),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
            ["unknown tensor model.layers.3.mlp.up_proj.weight"],
        ),
        (
            lambda t: t.update({Q_PROJ.replace("weight", "bias"): torch.ones(64)}),
            ["unknown tensor", "q_proj.bias"],
        ),
        (
            lambda t: t.update({Q_PROJ: torch.ones(64, 64, dtype=torch.int8)}),
            [Q_PROJ, "floating-point", "int8"],
        ),
        (
            lambda t: t.update({Q_PROJ: torch.ones(64, 64).to(torch.float8_e4m3fn)}),
            [Q_PROJ, "float8_e4m3fn"],
        ),
        (
            lambda t: t.update({NORM: torch.ones(64, dtype=torch.bool)}),
            [NORM, "floating-point", "bool"],
        ),
        (poison(Q_PROJ, float("nan")), [Q_PROJ, "NaN or infinite"]),
        (poison(UP_PROJ, float("-inf")), [UP_PROJ, "NaN or infinite"]),
        (poison(NORM, float("inf")), [NORM, "NaN or infinite"]),
        (poison("lm_head.weight", float("nan")), ["lm_head.weight", "NaN or infinite"]),
    ],
)
def test_tensors_that_do_not_fit(edit: Edit, parts: list[str], tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_tensors(tmp_path, edit)
    message = refusal(tmp_path)
    for part in parts:
        assert part in message


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    assert "tie_word_embeddings" in refusal(tmp_path)


def test_values_out_of_the_dtypes_range(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_tensors(tmp_path, poison(UP_PROJ, -1e5))
    message = refusal(tmp_path, torch.float16)
    assert UP_PROJ in message
    assert "100000 is out of float16's range" in message
    load(tmp_path, torch.bfloat16)
    edit_tensors(tmp_path, poison(UP_PROJ, 3.4e38))
    assert "bfloat16's range" in refusal(tmp_path, torch.bfloat16)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(f"{Q_PROJ}_scale"), ["missing tensor", f"{Q_PROJ}_scale"]),
        (
            lambda t: t.update({f"{Q_PROJ}_scale": torch.ones(3)}),
            ["expected [1] or [64]", "got [3]"],
        ),
        (lambda t: t.update({f"{Q_PROJ}_scale": torch.tensor(3.0)}), ["powers of two"]),
        (lambda t: t.update({f"{Q_PROJ}_scale": torch.tensor(-2.0)}), ["powers of two"]),
        (lambda t: t.update({f"{Q_PROJ}_scale": torch.tensor(float("nan"))}), ["powers of two"]),
        (lambda t: t.update({f"{Q_PROJ}_scale": torch.tensor(1)}), ["float32", "int64"]),
        (lambda t: t.update({Q_PROJ: torch.ones(64, 64)}), ["unknown", f"{Q_PROJ}_scale"]),
        (
            lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)}),
            [NORM, "float8_e4m3fn"],
        ),
        (poison(Q_PROJ, float("nan")), [Q_PROJ, "NaN"]),
    ],
)
def test_float8_storage_that_does_not_fit(edit: Edit, parts: list[str], tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    store_as_float8(tmp_path)
    edit_tensors(tmp_path, edit)
    message = refusal(tmp_path)
    for part in parts:
        assert part in message


def test_float8_needs_its_declaration(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    store_as_float8(tmp_path)
    edit_config(tmp_path, specrt_storage=...)
    assert "float8_e4m3fn" in refusal(tmp_path)


def test_directories_without_weights(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    file = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="got a file"):
        load_weights(file, config, torch.float32)
    with pytest.raises(CheckpointError, match="no such directory"):
        load_weights(tmp_path / "absent", config, torch.float32)
    file.unlink()
    message = refusal(tmp_path)
    assert "no weights" in message
    assert "pytorch_model.bin.index.json" in message


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert "model.safetensors: truncated or corrupt" in message


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_bin(keep: int, is_zip: bool, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    store_as_bin(tmp_path, is_zip=is_zip)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    assert "pytorch_model.bin: truncated or corrupt" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([1], "no state dict but list"),
        ({"epoch": 3}, "epoch is no tensor but int"),
        ({7: torch.ones(2)}, "7 is no tensor's name"),
        ({NORM: torch.ones(64).to_sparse()}, f"{NORM}: expected a plain tensor, got a sparse one"),
        (
            {NORM: torch.ones(64, device="meta")},
            f"{NORM}: expected a plain tensor, got one without",
        ),
        ({"model": Fraction(1, 2)}, "has an object of fractions.Fraction that is no tensor"),
    ],
)
def test_bin_with_something_else(content: object, part: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert part in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "anything"])
def test_what_would_wait_for_a_writer(name: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert refusal(tmp_path) == f"{tmp_path / name}: expected a file, got a FIFO"


def test_more_layers_than_there_is_memory_for(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, num_hidden_layers=2**30)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: num_hidden_layers: expected no more")
    assert message.endswith("than there are tensors (30), got 1073741824")


def test_refusals_are_one_printable_line(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    key = "a\nb\ud800" + "c" * 5000
    edit_tensors(tmp_path, lambda t: t.update({key.replace("\ud800", ""): torch.ones(2)}))
    assert "a\\nbcc" in refusal(tmp_path)
    edit_config(tmp_path, **{key: 3})
    message = refusal(tmp_path)
    assert "a\\nb\\ud800cc" in message
    assert message.isprintable()
    assert len(message) < 1300


def test_bin_never_runs_code(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for save in (torch.save, lambda x, file: file.write_bytes(pickle.dumps(x, protocol=2))):
        save({"x": Payload()}, tmp_path / "pytorch_model.bin")
        refusal(tmp_path)
        assert not (tmp_path / "ran").exists()


def test_broken_shards(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    data = json.loads(text)
    shard = tmp_path / data["weight_map"][Q_PROJ]
    content = shard.read_bytes()

    tensors = load_file(shard)
    del tensors[Q_PROJ]
    save_file(tensors, shard)
    message = refusal(tmp_path)
    assert Q_PROJ in message
    assert shard.name in message

    shard.unlink()
    message = refusal(tmp_path)
    assert "names a shard that is missing" in message
    assert shard.name in message

    shard.write_bytes(content[:-10])
    assert f"{shard.name}: truncated" in refusal(tmp_path)
    shard.write_bytes(content)
    load(tmp_path)

    other = tmp_path / data["weight_map"]["lm_head.weight"]
    tensors = load_file(other)
    save_file({**tensors, Q_PROJ: torch.ones(64, 64)}, other)
    assert_loaded(load(tmp_path), model.state_dict(), torch.float32)  # the index decides
    del data["weight_map"][Q_PROJ]
    index.write_text(json.dumps(data))
    assert f"{Q_PROJ} is also in" in refusal(tmp_path)

    index.write_text("{}")
    assert "no weight_map" in refusal(tmp_path)
    index.write_text(text[:50])
    assert "JSON" in refusal(tmp_path)


# --- memory ----------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
import torch
from specrt.config import ModelConfig
from specrt.models.loader import load_weights

# Of this address space; getrusage would begin at the peak of the process that started this one.
def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

small, large = map(Path, sys.argv[1:])
load_weights(small, ModelConfig.from_directory(small), torch.bfloat16)  # what loads lazily
Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is used now
before = memory("VmRSS")
weights = load_weights(large, ModelConfig.from_directory(large), torch.bfloat16)
print((memory("VmHWM") - before) / weights.arena.numel())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)])
def test_loading_needs_hardly_more_memory_than_the_weights(layout: str, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    make_checkpoint("llama", small)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    # Stored as float32, so the files alone are twice the arena of about 60 MB.
    make_checkpoint("llama", large, **sizes)
    if layout == "bin":
        store_as_bin(small)
        store_as_bin(large)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, small, large], check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < 1.35
