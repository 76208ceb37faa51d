"""Whether files are what was written: a list of their digests, in the form of ``sha256sum``."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from specrt.types import CheckpointError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_PIECE = 1 << 20


def write_sums(folder: Path) -> None:
    """List the digests of all files in a folder; ``sha256sum -c SHA256SUMS`` reads it too.

    Raises:
        OSError: a file cannot be read, or the list not be written.
    """
    lines = [f"{_digest(folder / name)}  {name}\n" for name in _names(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Read every file of a folder and compare; a folder without a list is taken as it is.

    Raises:
        CheckpointError: a file is missing, not listed or changed; names it.
        OSError: a file cannot be read.
    """
    file = folder / SUMS
    if not file.is_file():
        return
    lines = file.read_bytes().decode("utf-8", "replace").splitlines()
    found = [match for match in map(_LINE.fullmatch, lines) if match]
    if len(found) < len(lines):
        raise CheckpointError(f"{file}: damaged: expected a digest and a name on each line")
    listed = {match[2]: match[1] for match in found}
    for name in sorted({*listed, *_names(folder)}):
        if name not in listed:
            raise CheckpointError(f"{file}: damaged: {name} is not listed")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, though {SUMS} lists it")
        if _digest(folder / name) != listed[name]:
            raise CheckpointError(f"{folder / name}: damaged: not what {SUMS} says was written")


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted({str(path.relative_to(folder)) for path in files} - {SUMS})


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
