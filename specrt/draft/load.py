"""From what a user names to a drafter."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from specrt.config import ModelConfig, checkpoint_directory, read_json
from specrt.draft.base import Drafter, EmptyDrafter
from specrt.draft.prompt_lookup import PromptLookupDrafter
from specrt.draft.small_model import SmallModelDrafter
from specrt.models.llama import LlamaModel, StepRunner
from specrt.models.loader import load_weights
from specrt.types import CheckpointError

PROMPT_LOOKUP = "prompt-lookup"


def load_drafter(
    name: str | os.PathLike[str] | None,
    target: ModelConfig,
    dtype: torch.dtype | None,
    run_step: StepRunner,
    on_move: Callable[[], None],
) -> Drafter:
    """Make the drafter a user asks for.

    Args:
        name: None (plain decoding), ``"prompt-lookup"`` or a checkpoint directory.
        target: the model it drafts for.
        dtype: of the drafting model's matrices; None takes its checkpoint's.
        run_step: how its model's steps run.
        on_move: called when its model's buffers move.

    Raises:
        CheckpointError: no such checkpoint, a kind that is not known, or another vocabulary.
    """
    if name is None:
        return EmptyDrafter()
    if name == PROMPT_LOOKUP:
        return PromptLookupDrafter()
    directory = checkpoint_directory(name)
    file = directory / "config.json"
    kind = read_json(file).get("drafter") if file.is_file() else None
    if kind is not None:
        raise CheckpointError(f"{file}: this version has no drafter of kind {kind!r}")
    config = ModelConfig.from_directory(directory)
    if config.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{file}: a drafter needs the target's vocabulary of {target.vocab_size}, "
            f"got {config.vocab_size}"
        )
    weights = load_weights(directory, config, dtype or config.dtype)
    return SmallModelDrafter(LlamaModel(config, weights, run_step, on_move))
