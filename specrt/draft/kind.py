"""What a kind of drafter is: how it is told, and how it is made.

Nothing here imports torch, so that ``specrt --help`` may name every kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from specrt.config import ModelConfig
    from specrt.draft.base import Drafter
    from specrt.draft.length.control import ControlOptions
    from specrt.models.model import LlamaModel


WEIGHTS = ("fp8",)


@dataclass(frozen=True)
class DraftWindow:
    """What a drafter's layer sees of a long text beside the tree itself.

    Raises:
        ValueError: ``size`` is no number from 1 on, or ``num_sinks`` none from 0 on.
    """

    size: int
    """Tokens, the last ones."""
    num_sinks: int = 0
    """And the text's first ones."""

    def __post_init__(self) -> None:
        given = ("draft_window", self.size, 1), ("num_sinks", self.num_sinks, 0)
        for name, value, least in given:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected a number of tokens from {least}, got {value!r}")

    @property
    def num_seen(self) -> int:
        """Tokens in all, at most."""
        return self.size + self.num_sinks


@dataclass(frozen=True)
class DrafterOptions:
    """How a trained drafter is set up; nothing here changes the text."""

    fold: bool | None = None
    """Replace weights that are functions of the token by tables; None: where that pays."""
    is_coupled: bool = True
    """Where the temperature is above 0, rank candidates with the target's own noise."""
    control: ControlOptions | None = None
    """How long to draft; None: the drafter's own way."""
    weights: str | None = None
    """Of :data:`WEIGHTS`: what matrices are rounded to as they are loaded; None: not at all."""
    hot_tokens: str | os.PathLike[str] | Sequence[int] | None = None
    """The only tokens that are proposed, or a file of them; None: the checkpoint's own choice."""
    window: DraftWindow | None = None
    """What FSPAD's and EAGLE's layer sees of a text; None: all of it."""

    def __post_init__(self) -> None:
        if self.weights not in (None, *WEIGHTS):
            raise ValueError(
                f"draft_weights: expected one of {', '.join(WEIGHTS)}, got {self.weights!r}"
            )


@dataclass(frozen=True)
class DrafterRequest:
    """What a drafter may be made of."""

    directory: Path | None
    """Its checkpoint; None for a kind that has none."""
    target: LlamaModel
    """The model it drafts for, on whose device it drafts."""
    dtype: torch.dtype | None
    """Of a small model's matrices; None takes its checkpoint's. A trained drafter keeps its own on
    the CPU: a narrower one is faster, and its rounding moves no token. On a GPU it has the
    target's, whose features it multiplies."""
    options: DrafterOptions
    target_path: Path | None = None
    """The target's directory, whose tokenizer a smaller model must have; None: not known."""

    @property
    def checkpoint(self) -> Path:
        """``directory``, of a kind that :attr:`Kind.matches` told by it."""
        assert self.directory is not None, "a checkpoint's kind is told by its directory"
        return self.directory


@dataclass(frozen=True)
class Kind:
    """One kind of drafter; its modules are imported when it is first asked for."""

    name: str
    """What a user calls it; of a checkpoint, what its ``config.json`` may."""
    help: str
    """One line: what drafts, or what a directory holds."""
    load: Callable[[DrafterRequest], Drafter]
    """Make one. May raise CheckpointError, ValueError, OSError and MemoryError, for users to read;
    anything else is a fault of the kind's own."""
    matches: Callable[[Path], bool] | None = None
    """Whether a directory is a checkpoint of this kind; None for a kind without checkpoints, which
    is asked for by name."""
    has_control: bool = False
    """Whether a controller may say how long it drafts."""
    has_narrowing: bool = False
    """Whether its matrices may be rounded, its tokens chosen and its sight bounded
    (``options.weights``, ``hot_tokens``, ``window``) as it is loaded."""
    check: Callable[[Path, ModelConfig, Path | None], None] | None = None
    """Raise CheckpointError where a checkpoint of this kind does not fit a target (its
    configuration, and where it lies if known): what can be told before the target's weights are
    read. None: nothing can; :attr:`load` refuses it in any case."""
