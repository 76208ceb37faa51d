"""What every command that runs a model is told of it, and does first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.builtin import drafter_paths, target_path
from specrt.cli.options import RUNTIME, Device, Dtype, Target, Threads

if TYPE_CHECKING:
    from specrt.draft.length.control import ControlOptions
    from specrt.engine.engine import Engine

BUILTIN = "builtin"
NO_DRAFTER = "none"
_AUTO = "auto"
RULES = "fixed-K, threshold, adaptive-threshold, beta-ts, calibration-ts or cost-aware"


def drafter_names() -> tuple[str, ...]:
    """What ``--drafter`` takes beside a directory."""
    return (NO_DRAFTER, _AUTO, "prompt-lookup", *drafter_paths())


def _drafter_help() -> str:
    bundled = [f"'{name}'" for name in drafter_paths()]
    own = [f"'{name}'" for name in drafter_names() if name not in (_AUTO, *drafter_paths())]
    return (
        f"'{_AUTO}' (bundled FSPAD for the bundled target, else prompt lookup), {', '.join(own)}, "
        f"a bundled one ({', '.join(bundled)}), or a directory with an EESD, FSPAD or EAGLE "
        "drafter or a smaller model."
    )


Drafter = Annotated[str, typer.Option(help=_drafter_help(), rich_help_panel=RUNTIME)]
Controller = Annotated[
    str | None,
    typer.Option(
        help=f"How long a trained drafter drafts: {RULES}; default: EESD cost-aware, others by "
        "measured cost.",
        rich_help_panel=RUNTIME,
    ),
]
MaxNodes = Annotated[
    int, typer.Option(help="Largest tree, its root included.", rich_help_panel=RUNTIME)
]


@dataclass(frozen=True)
class EngineOptions:
    """A target and a drafter as named on the command line, and how they run."""

    target: Target = BUILTIN
    drafter: Drafter = _AUTO
    controller: Controller = None
    device: Device = "cpu"
    dtype: Dtype = "auto"
    max_nodes: MaxNodes = 64
    threads: Threads = None

    def load(self, *, max_batch: int = 8) -> Engine:
        """As :func:`load_engine`."""
        return load_engine(**vars(self), max_batch=max_batch)


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
    from specrt.loading import load

    names = drafter_names()
    # The empty path is the present folder. What looks like a path `load` refuses with more words.
    is_path = drafter != "" and (Path(drafter).exists() or "/" in drafter)
    if drafter not in names and not is_path:
        raise ValueError(f"drafter: expected {', '.join(names)} or a directory, got {drafter!r}")
    return load(
        target,
        None if drafter == NO_DRAFTER else drafter,
        device=device,
        dtype=dtype,
        max_nodes=max_nodes,
        max_batch=max_batch,
        controller=controller,
    )


def drafter_name(drafter: str, target: str, engine: Engine) -> str:
    """What to call the engine's drafter in a table: ``"auto"`` by what it stands for."""
    from specrt.loading import default_drafter

    return default_drafter(target, engine.target.device) if drafter == _AUTO else Path(drafter).name


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
    if target == BUILTIN:
        return target_path(), BUILTIN
    directory = Path(target)
    return directory, directory.resolve().name
