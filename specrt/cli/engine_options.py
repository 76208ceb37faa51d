"""What every command that runs a model is told of it, and does first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli.options import RUNTIME, Device, Dtype, Target, Threads
from specrt.draft.kinds import (
    AUTO,
    WITH_LOOKUP,
    check_fit,
    check_name,
    default_drafter,
    describe_names,
    without_lookup,
)
from specrt.targets import BUILTIN, SMOLLM2, target_names, target_path

if TYPE_CHECKING:
    from specrt.config import ModelConfig
    from specrt.draft.length.control import ControlOptions
    from specrt.engine.engine import Engine

RULES = "fixed-K, threshold, adaptive-threshold, beta-ts, calibration-ts or cost-aware"


Drafter = Annotated[str, typer.Option(help=f"{describe_names()}.", rich_help_panel=RUNTIME)]
Controller = Annotated[
    str | None,
    typer.Option(
        help=f"How long a trained drafter drafts: {RULES}; default: EESD cost-aware, others by "
        "measured cost.",
        rich_help_panel=RUNTIME,
    ),
]
DraftWeights = Annotated[
    str | None,
    typer.Option(
        help="fp8: an FSPAD or EAGLE drafter's matrices are rounded to one byte a weight.",
        rich_help_panel=RUNTIME,
    ),
]
HotTokens = Annotated[
    str | None,
    typer.Option(
        help="A file with the ids of the only tokens that an FSPAD or EAGLE drafter shall propose "
        "(JSON or .pt).",
        rich_help_panel=RUNTIME,
    ),
]
DraftWindow = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the text that an FSPAD or EAGLE drafter sees, the last ones; default: all.",
        rich_help_panel=RUNTIME,
    ),
]
MaxNodes = Annotated[
    int, typer.Option(help="Largest tree, its root included.", rich_help_panel=RUNTIME)
]
Eager = Annotated[
    bool,
    typer.Option(
        "--eager",
        help="Launch kernel by kernel, not by captured graphs: slower, the same text.",
        rich_help_panel=RUNTIME,
    ),
]


Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8: the target's matrices are rounded to bytes as they are loaded (CPU); none: a "
        "GGUF file's blocks become values of --dtype.",
        rich_help_panel=RUNTIME,
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="What rows are made of where bfloat16 weights multiply them: split (the default), "
        "bfloat16 or float32 (CPU).",
        rich_help_panel=RUNTIME,
    ),
]
Lora = Annotated[
    str | None,
    typer.Option(
        help="A directory, or a repository of the Hub, with a LoRA adapter that is merged into the "
        "target.",
        rich_help_panel=RUNTIME,
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """A target and a drafter as named on the command line, and how they run."""

    target: Target = BUILTIN
    drafter: Drafter = AUTO
    controller: Controller = None
    draft_weights: DraftWeights = None
    hot_tokens: HotTokens = None
    draft_window: DraftWindow = None
    device: Device = "cpu"
    dtype: Dtype = "auto"
    max_nodes: MaxNodes = 64
    eager: Eager = False
    quantize: Quantize = None
    activations: Activations = None
    lora: Lora = None
    threads: Threads = None

    def check(self) -> None:
        """Refuse what needs no weights to be refused, as :meth:`load` does: options, paths, a
        drafter of another target. What the Hub has is left to that, for it may have to be fetched.

        Raises:
            CheckpointError, ValueError: as :func:`load_engine`.
        """
        from specrt.config import hub_name
        from specrt.config.lora import read_adapter_config
        from specrt.draft.kind import DrafterOptions, DraftWindow
        from specrt.draft.length.control import parse_control
        from specrt.loading import parse_dtype
        from specrt.models.packing import choose_packing
        from specrt.models.placement import choose_dtype, parse_device

        set_threads(self.threads)
        check_name(self.drafter)
        place, dtype = parse_device(self.device), parse_dtype(self.dtype)
        control = None if self.controller is None else parse_control(self.controller)
        window = None if self.draft_window is None else DraftWindow(self.draft_window)
        DrafterOptions(control=control, weights=self.draft_weights, window=window)
        if self.hot_tokens is not None and not Path(self.hot_tokens).is_file():
            raise ValueError(f"hot_tokens: no such file: {self.hot_tokens}")
        if hub_name(self.target) is not None or hub_name(self.lora or "") is not None:
            return
        config = target_config(self.target, self.lora)
        if self.lora is not None:
            read_adapter_config(self.lora)
        choose_packing(choose_dtype(config, dtype, place), place, self.quantize, self.activations)
        check_fit(self.drafter, config, target_path(self.target))

    def load(self, *, max_batch: int = 8, **limits: int | None) -> Engine:
        """As :func:`load_engine`."""
        return load_engine(**vars(self), max_batch=max_batch, **limits)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ChatEngine(EngineOptions):
    """Of a chat: the bundled model is none that answers."""

    target: Target = SMOLLM2


@dataclass(frozen=True)
class ServedEngine(EngineOptions):
    """Of a server: what it serves is its first word."""

    target: Annotated[str, typer.Argument(help="As --target of generate.")] = BUILTIN


def load_engine(
    target: str,
    drafter: str,
    *,
    device: str = "cpu",
    dtype: str,
    threads: int | None,
    max_nodes: int = 64,
    max_batch: int = 8,
    max_shared_tokens: int | None = None,
    controller: str | ControlOptions | None = None,
    draft_weights: str | None = None,
    hot_tokens: str | None = None,
    draft_window: int | None = None,
    eager: bool = False,
    quantize: str | None = None,
    activations: str | None = None,
    lora: str | None = None,
    **limits: int | None,
) -> Engine:
    """Load a target and a drafter as named on the command line.

    Args:
        target, drafter, device, dtype, max_nodes, max_batch, max_shared_tokens, controller,
            draft_weights, hot_tokens, draft_window, eager, quantize, activations, lora: as for
            :func:`specrt.load`.
        threads: of the kernels; None leaves torch's choice.
        **limits: further fields of :class:`specrt.engine.limits.EngineLimits`.

    Raises:
        CheckpointError: a checkpoint is missing or broken.
        ValueError: an argument out of range, or a drafter that is neither a name nor a directory.
    """
    set_threads(threads)
    from specrt.loading import load

    check_name(drafter)  # before a target is loaded
    return load(
        target,
        drafter,
        device=device,
        dtype=dtype,
        max_nodes=max_nodes,
        max_batch=max_batch,
        max_shared_tokens=max_shared_tokens,
        controller=controller,
        draft_weights=draft_weights,
        hot_tokens=hot_tokens,
        draft_window=draft_window,
        eager=eager,
        quantize=quantize,
        activations=activations,
        lora=lora,
        **limits,  # type: ignore[arg-type]
    )


def drafter_name(drafter: str, target: ModelConfig, *, is_gpu: bool = False) -> str:
    """What to call a target's drafter in a table: ``"auto"`` by what it stands for."""
    if drafter == AUTO:
        return default_drafter(target, is_gpu=is_gpu)
    own, has_lookup = without_lookup(drafter)
    return (Path(own).name or Path(own).resolve().name) + (WITH_LOOKUP if has_lookup else "")


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
    """Where a target named on the command line lies, and its name.

    Raises:
        CheckpointError: as :func:`specrt.targets.target_path`.
    """
    from specrt.config.hub import hub_name

    directory, hub = target_path(target), hub_name(target)
    if hub is not None:
        return directory, hub.name
    return directory, target if target in target_names() else directory.resolve().name


def target_config(target: str, lora: str | None = None) -> ModelConfig:
    """The configuration of a target named on the command line; no weights are read.

    Raises:
        CheckpointError: it is missing or broken, or of a family that is not run.
    """
    from specrt.config import ModelConfig

    return ModelConfig.from_directory(target_path(target), adapter=adapter_directory(lora))


def adapter_directory(lora: str | None) -> Path | None:
    """Where a LoRA adapter named on the command line lies.

    Raises:
        CheckpointError: as :func:`specrt.config.local_path`.
    """
    from specrt.config import local_path

    return None if lora is None else local_path(lora)
