"""GGUF files as targets: what is loaded, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specrt
from specrt.config import ModelConfig
from specrt.models.loader import load_weights
from tests.checkpoints import make_checkpoint
from tests.gguf_files import write_gguf


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_has_the_weights_of_its_directory(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model", intermediate_size=128)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    config = ModelConfig.from_directory(tmp_path / "model")
    ours = load_weights(tmp_path / "model", config, torch.float32)
    engine = specrt.load(tmp_path / "model.gguf", dtype="float32", progress=False)
    theirs = engine.target.weights
    assert torch.equal(theirs.arena, ours.arena)
    assert torch.equal(theirs.final_norm, ours.final_norm)
