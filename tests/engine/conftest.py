"""The model that most of the engine's tests ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrt.models.model import LlamaModel
from tests.engine.support import make_model


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint)
