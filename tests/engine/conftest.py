"""The model that most of the engine's tests ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrt.models.llama import LlamaModel
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint)
