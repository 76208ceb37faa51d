"""Which sources and which command a result comes from."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path


def command_line(module: str, arguments: Sequence[str]) -> str:
    """How it was called; of files elsewhere only the names, since results are kept."""
    options = (re.sub(r"(?<![^\s,=])(?:/|\.\./)[^\s,=]*/", "", arg) for arg in arguments)
    return shlex.join(["python", "-m", module, *options])


def git_commit() -> str | None:
    """The commit, marked ``+`` when tracked files differ from it.

    Outside a checkout that of the package which was brought along, and said so: the sources came
    with it (``bench.gpu_check.package``), but may have been changed. None without that either.
    """
    here = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return packed_commit(here.parent / "build/gpu-package/manifest.json")


def packed_commit(manifest: Path) -> str | None:
    """What a package says it was made at; None if there is none that says so."""
    try:
        commit = json.loads(manifest.read_text())["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"{commit} (of the package)" if commit else None
