"""From what a user names to a drafter."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from specrt import builtin
from specrt.config import ModelConfig, checkpoint_directory
from specrt.draft.base import Drafter, EmptyDrafter
from specrt.draft.eesd.checkpoint import is_exit_checkpoint, load_exit, read_exit
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.fspad.checkpoint import is_draft_checkpoint, read_checkpoint
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer, fold, folding_pays, pack_weights
from specrt.draft.fspad.official import open_drafter, refuse_other_kinds, settle_head
from specrt.draft.length.control import ControlOptions
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.draft.small_model.vocabulary import check_vocabulary
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel, StepRunner
from specrt.models.placement import choose_dtype, choose_head_dim, place_weights
from specrt.types import CheckpointError

PROMPT_LOOKUP = "prompt-lookup"
BUNDLED_DEFAULT = "fspad"


@dataclass(frozen=True)
class DrafterOptions:
    """How a trained drafter is set up; nothing here changes the text."""

    fold: bool | None = None
    """Replace weights that are functions of the token by tables; None: where that pays."""
    is_coupled: bool = True
    """Where the temperature is above 0, rank candidates with the target's own noise."""
    control: ControlOptions | None = None
    """How long to draft; None: the drafter's own way."""


def drafter_directory(name: str | os.PathLike[str]) -> Path:
    """The checkpoint that ``name`` means: a bundled drafter's name, or a directory.

    Raises:
        CheckpointError: there is no such directory.
    """
    bundled = builtin.drafter_paths().get(str(name))
    return bundled if bundled is not None else checkpoint_directory(name)


def load_drafter(
    name: str | os.PathLike[str] | None,
    target: LlamaModel,
    dtype: torch.dtype | None,
    run_step: StepRunner,
    on_move: Callable[[], None],
    options: DrafterOptions,
    target_path: Path | None = None,
) -> Drafter:
    """Make the drafter a user asks for.

    Args:
        name: None (plain decoding), ``"prompt-lookup"``, a bundled drafter or a checkpoint
            directory.
        target: the model it drafts for.
        dtype: of a small model's matrices; None takes its checkpoint's. A trained drafter keeps its
            own: a narrower one is faster, and its rounding moves no token.
        run_step: how its model's steps run on the CPU.
        on_move: called when its model's buffers move.
        options: for trained drafters.
        target_path: the target's directory, whose tokenizer a smaller model must have.

    Raises:
        CheckpointError: no such checkpoint, a kind that is not known, or made for another target.
        ValueError: a controller for a drafter that takes none; on a GPU, EESD, or a model that its
            kernels do not run.
    """
    if name is None or name == PROMPT_LOOKUP:
        _refuse_control(options)
        return EmptyDrafter() if name is None else PromptLookupDrafter()
    directory = drafter_directory(name)
    _refuse_several(directory)
    if is_exit_checkpoint(directory):
        _refuse_gpu(directory, target)
        config = read_exit(directory, target.config)
        weights = load_exit(directory, config, target.weights)
        exit_model = ExitModel(config, weights, target, on_move)
        return EesdDrafter(exit_model, options.control, run_step, is_coupled=options.is_coupled)
    if is_draft_checkpoint(directory):
        return FspadDrafter(
            _draft_layer(directory, target, options.fold),
            run_step,
            on_move,
            is_coupled=options.is_coupled,
            control=options.control,
        )
    refuse_other_kinds(open_drafter(directory))
    _refuse_control(options)
    return _small_model(directory, target, dtype, run_step, on_move, target_path)


def _refuse_several(directory: Path) -> None:
    """Say so where training left several exits to choose from."""
    inner = [file.parent.name for file in sorted(directory.glob("exit-*/config.json"))]
    if inner and not (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory}: has several drafters, expected one of them: {', '.join(inner)}"
        )


def _refuse_gpu(directory: Path, target: LlamaModel) -> None:
    if target.device.type != "cpu":
        raise ValueError(
            f"drafter: {directory.name} is an EESD drafter, which runs the target's own layers and "
            f"needs device='cpu', got {target.device}; with it run: none, {PROMPT_LOOKUP}, FSPAD "
            "and EAGLE (on the CPU), a smaller model"
        )


def _refuse_control(options: DrafterOptions) -> None:
    if options.control is not None:
        raise ValueError(
            f"controller: only trained drafters take one (EESD, FSPAD, EAGLE), got "
            f"{options.control.kind!r}"
        )


def _small_model(
    directory: Path,
    target: LlamaModel,
    dtype: torch.dtype | None,
    run_step: StepRunner,
    on_move: Callable[[], None],
    target_path: Path | None,
) -> Drafter:
    config, vocab_size = ModelConfig.from_directory(directory), target.config.vocab_size
    check_vocabulary(directory, config.vocab_size, target_path, vocab_size)
    chosen = choose_dtype(config, dtype, target.device)
    head_dim = choose_head_dim(config, target.device)
    loaded = load_weights(directory, config, chosen, head_dim=head_dim)
    weights = place_weights(loaded, target.device)
    model = LlamaModel(config, weights, run_step, on_move, rope=target.rope)
    return SmallModelDrafter(model, vocab_size=vocab_size)


def _draft_layer(directory: Path, target: LlamaModel, is_folded: bool | None) -> DraftLayer:
    config, tensors = read_checkpoint(directory, target.config)
    # It drafts on the CPU wherever the target is.
    embed, head = target.weights.embed.cpu(), target.weights.lm_head.cpu()
    settle_head(directory, tensors, head)
    # Rotary positions must reach as far as the target's, whatever a drafter's config says.
    reach = max(config.layer.max_positions, target.config.max_positions)
    config = replace(config, layer=replace(config.layer, max_positions=reach))
    weights = pack_weights(config, tensors, embed, head, config.layer.dtype)
    if is_folded is None:
        is_folded = folding_pays(weights, target.weights.arena.nbytes)
    return DraftLayer(config, fold(weights) if is_folded else weights, target.rope)
