"""Repositories of the Hugging Face Hub by name, and where their files lie on this machine."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrt.types import CheckpointError

_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+\.gguf))?"
)
# Where a name ends so, it is meant as a file.
_FILES = (".gguf", ".safetensors", ".bin", ".json", ".pt")
_TEXTS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_BINS = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_MOST_NAMED = 8  # GGUF files in a message


@dataclass(frozen=True)
class HubName:
    """``OWNER/NAME``, ``OWNER/NAME@REVISION``, either with ``:FILE.gguf``."""

    repository: str
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""
    file: str | None = None
    """The GGUF file that is meant; None: the model in safetensors or PyTorch's format."""

    @property
    def name(self) -> str:
        """The repository's, without its owner."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return self.repository + revision + ("" if self.file is None else f":{self.file}")


def hub_name(name: str | os.PathLike[str]) -> HubName | None:
    """The repository that a string names; None: it is a path, as all that exists here is.

    Args:
        name: as a user gives it; a ``Path`` never names a repository.
    """
    if not isinstance(name, str) or Path(name).exists():
        return None
    found = _NAME.fullmatch(name)
    if found is None or found["repository"].lower().endswith(_FILES):
        return None
    return HubName(found["repository"], found["revision"], found["file"])


def local_path(name: str | os.PathLike[str], *, local_files_only: bool = False) -> Path:
    """Where the files are that a user names: a path, or a repository of the Hub.

    Of a repository only what is read is fetched, into ``huggingface_hub``'s cache: configuration,
    tokenizer, and weights in safetensors, or else in PyTorch's format. ``HF_HOME``, ``HF_TOKEN``,
    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and a login mean what they mean to that package.

    Args:
        name: a path, or a name as in :class:`HubName`. What exists here is a path.
        local_files_only: look into the cache alone.

    Raises:
        CheckpointError: no such repository, revision or file, one that is not open to this user, or
            one that is not in the cache and cannot be fetched.
    """
    hub = hub_name(name)
    if hub is None:
        return Path(name)
    if hub.file is not None:
        file = _fetched(hub, (hub.file,), local_files_only) / hub.file
        if not file.is_file():
            raise CheckpointError(f"{hub}: no such file{_gguf_files(hub)}")
        return file
    directory = _fetched(hub, (*_TEXTS, *_SAFETENSORS), local_files_only)
    if not _has(directory, _SAFETENSORS):
        directory = _fetched(hub, (*_TEXTS, *_BINS), local_files_only)
        if not _has(directory, _BINS):
            where = " in the cache" if local_files_only or _is_offline() else ""
            raise CheckpointError(
                f"{hub}: no weights{where} (expected model.safetensors or pytorch_model.bin)"
                f"{_gguf_files(hub)}"
            )
    return directory


def _has(directory: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(directory.glob(pattern), None) is not None for pattern in patterns)


def _fetched(hub: HubName, patterns: tuple[str, ...], local_files_only: bool) -> Path:
    """The directory of a revision's files, with those of ``patterns`` in it."""
    import huggingface_hub  # only where a repository is named: importing it takes time

    try:
        directory = huggingface_hub.snapshot_download(
            hub.repository,
            revision=hub.revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
        )
    except Exception as error:  # of the package, of its HTTP client, of the file system
        raise CheckpointError(_fault(hub, error, local_files_only)) from error
    return Path(directory)


def _fault(hub: HubName, error: Exception, local_files_only: bool) -> str:
    """Why a repository's files cannot be had, in one line."""
    from huggingface_hub import errors

    place = f"https://huggingface.co/{hub.repository}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub}: a gated repository: accept its terms at {place}, then log in (hf auth login, "
            "or HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub}: no such directory, and no such repository on the Hub (a private one needs "
            "hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub}: the repository has no revision {hub.revision or 'main'!r}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "the Hub cannot be reached"
        if local_files_only or _is_offline():
            why = "local_files_only" if local_files_only else "HF_HUB_OFFLINE is set"
        return f"{hub}: no such directory, and not complete in the Hub's cache ({why})"
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{hub}: cannot be fetched from the Hub: {type(error).__name__}: {reason}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _gguf_files(hub: HubName) -> str:
    """What GGUF files a repository has, where that can be known, to be put behind a message."""
    import huggingface_hub

    found: list[Any] = []
    with suppress(Exception):  # the message is of something else
        found = huggingface_hub.HfApi().list_repo_files(hub.repository, revision=hub.revision)
    names = sorted(name for name in found if name.endswith(".gguf"))
    if not names:
        return ""
    more = f", and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return (
        f"; one of its GGUF files is named as {hub.repository}:FILE: "
        f"{', '.join(names[:_MOST_NAMED])}{more}"
    )
