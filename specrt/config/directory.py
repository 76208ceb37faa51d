"""A checkpoint directory and its files, looked at before anything trusts them."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from specrt.config.foreign import foreign_files
from specrt.types import CheckpointError

GGUF_MAGIC = b"GGUF"
"""What a GGUF file begins with."""
ADAPTER_CONFIG = "adapter_config.json"
"""What tells a LoRA adapter of peft."""
# Where a directory has one of these, its weights are not in GGUF.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ENDS = ("", ".index.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def checkpoint_directory(path: str | os.PathLike[str]) -> Path:
    """``path`` as a directory that exists, with nothing in it that waits when it is opened.

    Raises:
        CheckpointError: it does not, is a file, or holds a FIFO, a socket or a device.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(_no_directory(directory))
    try:
        for file in sorted(directory.iterdir()):
            if file.exists() and not (file.is_dir() or file.is_file()):
                raise CheckpointError(f"{file}: expected a file, got {_kind(file)}")
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from error
    return directory


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as what holds a model: a GGUF file, or a directory of files.

    Raises:
        CheckpointError: neither; as :func:`checkpoint_directory`.
    """
    path = Path(path)
    return path if path.is_file() and gguf_path(path) else checkpoint_directory(path)


def config_file(path: str | os.PathLike[str]) -> Path:
    """The ``config.json`` of a checkpoint directory.

    Raises:
        CheckpointError: no such directory, or it has none; says what it has instead.
    """
    directory = checkpoint_directory(path)
    file = directory / "config.json"
    if not file.exists():
        if (directory / ADAPTER_CONFIG).exists():
            raise CheckpointError(adapter_alone(directory))
        raise CheckpointError(f"{directory}: {foreign_files(directory) or 'no config.json'}")
    return file


def gguf_path(path: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a path is, or that a directory without other weights has; None: neither.

    Raises:
        CheckpointError: the directory has several; names them.
    """
    path = Path(path)
    if path.is_file():
        with suppress(OSError), path.open("rb") as content:
            is_gguf = content.read(len(GGUF_MAGIC)) == GGUF_MAGIC
            return path if is_gguf or path.suffix.lower() == ".gguf" else None
    if any((path / f"{name}{end}").exists() for name in _WEIGHTS for end in _ENDS):
        return None
    found = sorted(file for file in path.glob("*.gguf") if file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: expected one GGUF file, got {names} (name the one to load)")
    return found[0] if found else None


def refuse_adapter(directory: Path, adapter: str | os.PathLike[str] | None) -> None:
    """Refuse a model beside which an adapter lies that nobody has named.

    Args:
        directory: the model's.
        adapter: the directory of the adapter that is merged, if one is.

    Raises:
        CheckpointError: so; or there is an adapter and no model.
    """
    if not (directory / ADAPTER_CONFIG).exists():
        return
    if adapter is not None and directory.samefile(adapter):
        return
    if not any((directory / f"{name}{end}").exists() for name in _WEIGHTS for end in _ENDS):
        raise CheckpointError(adapter_alone(directory))
    raise CheckpointError(
        f"{directory / ADAPTER_CONFIG}: a LoRA adapter beside a model: name it "
        f"(lora={str(directory)!r}) to have it merged, or move it away"
    )


def adapter_alone(directory: Path) -> str:
    """That an adapter is there in place of a model, and how to load it."""
    base = None
    with suppress(CheckpointError):  # what it is, it is, readable or not
        base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    of, target = (f" of {base}", repr(base)) if isinstance(base, str) else ("", "its model")
    return (
        f"{directory / ADAPTER_CONFIG} is a LoRA adapter{of}, no model (load {target} with "
        f"lora={str(directory)!r})"
    )


def _no_directory(path: Path) -> str:
    is_gguf = path.suffix.lower() == ".gguf"
    if not path.exists():
        if is_gguf:
            return f"{path}: no such file"
        return f"{path}: no such directory"
    note = "; a GGUF file can be run as a target, and nothing else" if is_gguf else ""
    return f"{path}: expected a checkpoint directory, got a file{note}"


def check_file(file: Path) -> None:
    """Refuse what is no file of its own: nothing, a directory, or Git-LFS's pointer to one.

    Raises:
        CheckpointError: so, or the file cannot be read.
    """
    try:
        kind = stat.S_IFMT(file.stat().st_mode)
        if kind != stat.S_IFREG:
            raise CheckpointError(f"{file}: expected a file, got {_kind(file)}")
        with file.open("rb") as content:
            is_pointer = content.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if is_pointer:
        raise CheckpointError(
            f"{file}: a Git-LFS pointer, not the file it stands for (git lfs pull brings it)"
        )


def _kind(file: Path) -> str:
    return _KINDS.get(stat.S_IFMT(file.stat().st_mode), "something else")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON or holds no object.
    """
    check_file(file)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data
