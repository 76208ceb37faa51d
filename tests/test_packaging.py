"""What a user installs: version, import cost, the contents of sdist and wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import specrt
from specrt import ops  # noqa: F401  (the extension must load)

ROOT = Path(__file__).resolve().parents[1]
IMPORT_BUDGET_S = 0.5


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_version_is_one() -> None:
    from specrt import _C

    assert re.fullmatch(r"\d+\.\d+\.\d+", specrt.__version__)
    assert _C.build_info()["version"] == specrt.__version__, "stale build: run `make ext`"


def test_metadata_version() -> None:
    from importlib.metadata import version

    assert version("specrt") == specrt.__version__, "stale installation: run `make clean test`"


def test_import_is_quick_and_leaves_transformers_alone() -> None:
    """specrt's own share of the import, torch being there already; by clock or CPU time, since a
    busy machine stretches the clock above all, and the best of up to three."""
    code = """
import torch, time, json, sys
torch.library, torch.compiler
wall, cpu = time.perf_counter(), time.process_time()
import specrt
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([min(wall, cpu), "transformers" in sys.modules]))
"""

    def seconds() -> float:
        taken, has_transformers = json.loads(run_python(code))
        assert not has_transformers
        return float(taken)

    assert any(seconds() <= IMPORT_BUDGET_S for _ in range(3))


def tracked(*patterns: str) -> set[str]:
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("needs the git checkout to know what belongs in")
    return set(listing.stdout.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sdist_and_wheel_contents(tmp_path: Path) -> None:
    """The wheel is built from the unpacked sdist, so nothing it needs can be missing there."""
    sources = tracked("cmake", "csrc", "specrt", "tests", "docs")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, env={**os.environ, "SPECRT_CUDA": "OFF"}, check=True)

    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.name == f"specrt-{specrt.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert (sources | needed) - packed == set()
    assert not [name for name in packed if name.endswith(".so")]

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    package = {name for name in sources if name.startswith("specrt/")}
    assert package - installed == set()
    assert len([name for name in installed if re.fullmatch(r"specrt/_C\..*\.so", name)]) == 1
    assert not [name for name in installed if name.startswith(("csrc/", "tests/"))]
