"""The little target that files share, and ``--drafter``: whom the contract is held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrt.models.model import LlamaModel
from tests.checkpoints import make_checkpoint
from tests.cli.test_cli import write_tokenizer
from tests.engine.support import make_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--drafter",
        help="package.module:factory (a Kind, or what takes a DrafterRequest and gives a drafter), "
        "or as for specrt.load: a name or a directory",
    )
    parser.addoption(
        "--drafter-target",
        help="the directory of the target it drafts for, or 'builtin'; default: a tiny random one, "
        "for a bundled drafter the bundled one",
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little Llama with a tokenizer; a file that needs another has a fixture of that name."""
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(target: Path) -> LlamaModel:
    return make_model(target)
