"""``specrt convert``: official drafters of every kind, and those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specrt.config import ModelConfig, config_fingerprint
from specrt.draft.checkpoint import ARCHS, DraftConfig, read_checkpoint, tensor_shapes
from tests.checkpoints import make_checkpoint
from tests.test_cli import expect_one_line, run

KINDS = tuple(ARCHS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "little"
    make_checkpoint("llama", path)
    return path


def write_official(
    path: Path, target: Path, arch: str, *, dtype: torch.dtype = torch.float16, **config: Any
) -> dict[str, torch.Tensor]:
    """A directory as the authors of FSPAD and EAGLE publish them; its tensors."""
    model = ModelConfig.from_directory(target)
    shapes = tensor_shapes(DraftConfig.for_target(model, arch, name="x"))
    shapes["embed_tokens.weight"] = (model.vocab_size, model.hidden_size)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()
    }
    path.mkdir()
    given = json.loads((target / "config.json").read_text())
    given |= {"architectures": ["Model"], "num_hidden_layers": 1, "torch_dtype": "float16"}
    (path / "config.json").write_text(json.dumps(given | config))
    torch.save(tensors, path / "pytorch_model.bin")
    return tensors


@pytest.mark.parametrize("arch", KINDS)
def test_an_official_drafter_becomes_ours(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path, arch: str
) -> None:
    tensors = write_official(tmp_path / "src", target, arch, authors_note="hello")
    src, dst = str(tmp_path / "src"), tmp_path / "dst"
    code, out, err = run(capsys, "convert", src, str(dst), "--target", str(target))
    assert (code, err) == (0, "")
    model = ModelConfig.from_directory(target)
    config, stored = read_checkpoint(dst, model)
    assert config.arch == arch
    assert (config.target_name, config.target_fingerprint) == ("little", config_fingerprint(model))
    assert config.extra["authors_note"] == "hello"
    embedding = tensors.pop("embed_tokens.weight")
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == torch.float16 and torch.equal(stored[key], tensor), key
    count = sum(tensor.numel() for tensor in tensors.values())
    assert f"{arch}: feature sampling" in out
    assert f"{count} parameters, float16" in out and "embedding is left out" in out
    assert f"written to {dst} for little" in out
    assert embedding.numel() + count > count


def test_safetensors_in_bfloat16_without_a_bias(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    tensors = write_official(src, target, "eagle2", dtype=torch.bfloat16)
    (src / "pytorch_model.bin").unlink()
    del tensors["fc.bias"]
    save_file(tensors, src / "model.safetensors")
    code, _, err = run(capsys, "convert", str(src), str(dst), "--target", str(target))
    assert (code, err) == (0, "")
    stored = load_file(dst / "model.safetensors")
    assert stored["fc.bias"].tolist() == [0.0] * 64
    assert stored["fc.bias"].dtype == torch.bfloat16


def test_a_drafter_of_another_size_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    write_official(tmp_path / "src", target, "fspad")
    make_checkpoint("llama", tmp_path / "other", hidden_size=32, vocab_size=80)
    args = ("convert", str(tmp_path / "src"), str(tmp_path / "dst"))
    done = run(capsys, *args, "--target", str(tmp_path / "other"))
    expect_one_line(done, "hidden_size: the target has 32, this drafter 64")
    assert not (tmp_path / "dst").exists()


def test_a_misshaped_tensor_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    tensors = write_official(tmp_path / "src", target, "fspad")
    tensors["fc.fc.weight"] = tensors["fc.fc.weight"][:, :-1]
    torch.save(tensors, tmp_path / "src" / "pytorch_model.bin")
    args = ("convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--target", str(target))
    expect_one_line(run(capsys, *args), "fc.fc.weight: expected [64, 128], got [64, 127]")


def test_what_is_no_drafter_and_what_is_there_already(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    def converted(src: Path, dst: Path) -> tuple[int, str, str]:
        return run(capsys, "convert", str(src), str(dst), "--target", str(target))

    expect_one_line(converted(target, tmp_path / "dst"), "no FSPAD or EAGLE drafter")
    expect_one_line(converted(tmp_path / "nowhere", tmp_path / "dst"), "no such directory")
    write_official(tmp_path / "src", target, "fspad")
    before = (tmp_path / "src" / "config.json").read_text()
    expect_one_line(converted(tmp_path / "src", tmp_path / "src"), "expected a new directory")
    assert (tmp_path / "src" / "config.json").read_text() == before
