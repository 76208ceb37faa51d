"""The end of a run: the drafter's checkpoint and ``training.json`` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specrt.draft.fspad.checkpoint import DraftConfig, write_checkpoint

SUMMARY_FILE = "training.json"


def write_drafter(
    out: Path,
    config: DraftConfig,
    tensors: Mapping[str, torch.Tensor],
    summary: Mapping[str, Any],
) -> None:
    """Write a drafter that ``specrt.load`` takes.

    Args:
        out: its directory.
        config: its architecture.
        tensors: its weights, all of one dtype, as they shall be stored.
        summary: goes to ``training.json`` and, without its history, into ``config.json``.

    Raises:
        OSError: a file cannot be written.
    """
    dtype = next(iter(tensors.values())).dtype
    extra = {**config.extra, "training": brief(summary)}
    stored = replace(config, layer=replace(config.layer, dtype=dtype), extra=extra)
    write_checkpoint(out, stored, tensors)
    write_summary(out, summary)


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What of a summary goes into ``config.json``: all but its history."""
    return {key: value for key, value in summary.items() if key != "history"}


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Write ``training.json``.

    Raises:
        OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{SUMMARY_FILE}.partial"
    try:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        partial.replace(out / SUMMARY_FILE)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(out / SUMMARY_FILE)) from error
