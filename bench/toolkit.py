"""Where the CUDA toolkit's programs are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def find_tool(name: str) -> str | None:
    """The path of ``name`` on PATH, else in the toolkit of nvcc or in one that is known."""
    if found := shutil.which(name):
        return found
    for home in _homes():
        for path in (home / "bin" / name, home / "compute-sanitizer" / name):
            if path.is_file():
                return str(path)
    return None


def _homes() -> Iterator[Path]:
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home)
    yield Path("/usr/local/cuda")
