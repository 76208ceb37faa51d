"""What every command that runs a model does first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specrt.draft.length.control import ControlOptions
    from specrt.engine.engine import Engine

BUILTIN = "builtin"


def load_engine(
    target: str,
    drafter: str,
    *,
    device: str = "cpu",
    dtype: str,
    threads: int | None,
    max_nodes: int = 64,
    max_batch: int = 8,
    controller: str | ControlOptions | None = None,
) -> Engine:
    """Load a target and a drafter as named on the command line.

    Args:
        target, device, dtype, max_nodes, max_batch, controller: as for :func:`specrt.load`.
        drafter: ``"none"``, or as for :func:`specrt.load`.
        threads: of the kernels; None leaves torch's choice.

    Raises:
        CheckpointError: a checkpoint is missing or broken.
        ValueError: an argument out of range, or a drafter that is neither a name nor a directory.
    """
    set_threads(threads)
    from specrt.draft.kinds import NONE, check_name
    from specrt.loading import load

    check_name(drafter)  # before a target is loaded
    name = None if drafter == NONE else drafter
    return load(
        target,
        name,
        device=device,
        dtype=dtype,
        max_nodes=max_nodes,
        max_batch=max_batch,
        controller=controller,
    )


def drafter_name(drafter: str, target: str, engine: Engine) -> str:
    """What to call the engine's drafter in a table: ``"auto"`` by what it stands for."""
    from specrt.draft.kinds import AUTO
    from specrt.loading import default_drafter

    return default_drafter(target, engine.target.device) if drafter == AUTO else Path(drafter).name


def set_threads(threads: int | None) -> None:
    """Set the number of the kernels' threads; None leaves torch's choice.

    Raises:
        ValueError: it is less than 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)


def target_directory(target: str) -> tuple[Path, str]:
    """The directory of a target as named on the command line, and its name."""
    from specrt.builtin import target_path

    if target == BUILTIN:
        return target_path(), BUILTIN
    directory = Path(target)
    return directory, directory.resolve().name
