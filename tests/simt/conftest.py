"""Every test begins with the shim's defaults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simt import _simt


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    _simt.set_schedule(0)
    _simt.set_device()
    _simt.set_arithmetic()
