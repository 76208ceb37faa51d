"""The small target that most tests load; GPUs: what is marked ``gpu`` is skipped without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from specrt.device import Device
from tests.checkpoints import make_checkpoint
from tests.ops.conftest import load_simt
from tests.real_gpu import real_gpu
from tests.simulated_gpu import simulated_gpu


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once a file."""
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return path


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A GPU that lets nobody wait: the simulated one, and the one that is there.

    The mark ``runs_linear`` is for the simulated one: products by their own CUDA source.
    """
    if request.param == "real":
        with real_gpu() as made:
            yield made
        return
    simt, mark = load_simt(), request.node.get_closest_marker("runs_linear")
    simt.set_schedule(1)
    with simulated_gpu(simt, monkeypatch, has_linear=mark is not None) as simulated:
        yield simulated
