"""Which sources and which command a result comes from."""

from __future__ import annotations

import json
import os
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
    """What ``$SPECRT_COMMIT`` says, as a copy of the files may lie in another history; else the
    commit that git knows, marked ``+`` when tracked files differ from it.

    Where git knows of none (a copy of the files alone, or someone else's checkout) it is that of
    the package which was brought along (``bench.gpu_check.package``), and said so: files may have
    changed since. Else None.
    """
    if asked := os.environ.get("SPECRT_COMMIT"):
        return asked
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
