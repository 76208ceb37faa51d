"""The entry of EESD among the kinds of drafters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specrt.draft.kind import DrafterRequest, Kind

if TYPE_CHECKING:
    from specrt.config import ModelConfig
    from specrt.draft.base import Drafter


def _matches(directory: Path) -> bool:
    from specrt.draft.eesd.checkpoint import is_exit_checkpoint

    return is_exit_checkpoint(directory)


def _check(directory: Path, target: ModelConfig, target_path: Path | None) -> None:
    from specrt.draft.eesd.checkpoint import read_exit

    read_exit(directory, target)


def _load(request: DrafterRequest) -> Drafter:
    from specrt.draft.eesd.checkpoint import load_exit, read_exit
    from specrt.draft.eesd.drafter import EesdDrafter
    from specrt.draft.eesd.launched import LaunchedEesdDrafter
    from specrt.draft.eesd.model import ExitModel
    from specrt.draft.made_for import note_adapter

    directory, target, options = request.checkpoint, request.target, request.options
    config = read_exit(directory, target.config)
    note_adapter(directory, config.target_adapter, target.weights.adapter)
    weights = load_exit(directory, config, target.weights, target.device)
    kind = LaunchedEesdDrafter if target.device.is_gpu else EesdDrafter
    exit_model = ExitModel(config, weights, target)
    return kind(exit_model, options.control, is_coupled=options.is_coupled)


EESD = Kind("eesd", "an EESD drafter", _load, _matches, has_control=True, check=_check)
