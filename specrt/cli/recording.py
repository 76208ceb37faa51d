"""Recording the chains that ``specrt replay`` reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from specrt.cli.engine_options import drafter_name, load_engine, target_config, target_directory
from specrt.cli.errors import note
from specrt.cli.options import RUNTIME, Dtype, Jsonl, Target, Threads
from specrt.targets import BUILTIN

if TYPE_CHECKING:
    from specrt.cli.prompts import NamedPrompt
    from specrt.draft.eesd.drafter import EesdDrafter
    from specrt.engine.engine import Engine
    from specrt.lab.trace import TraceModels
    from specrt.sampling import SamplingParams

_NUM_PROBLEMS = 6


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Recording")


@dataclass(frozen=True)
class RecordOptions:
    """What to record, as given on the command line."""

    record: Annotated[
        str | None,
        _option(
            metavar="FILE",
            help="Record into it first (gzipped if it ends in .gz), then replay it too.",
        ),
    ] = None
    prompts: Annotated[
        str | None,
        _option(help="A file as for generate; default: problems the bundled model has not seen."),
    ] = None
    jsonl: Jsonl = False
    chat: Annotated[bool, _option("--chat", help="Prompts are user messages.")] = False
    task: Annotated[str | None, _option(help="The prompts' name; default: the file's.")] = None
    num_prompts: Annotated[int | None, _option(help="The first so many.")] = None
    max_draft: Annotated[int, _option(help="Tokens drafted at each.")] = 8
    target: Target = BUILTIN
    drafter: Annotated[
        str, typer.Option(help="A bundled EESD drafter or a directory.", rich_help_panel=RUNTIME)
    ] = "eesd"
    dtype: Dtype = "auto"
    threads: Threads = None

    def named_prompts(self) -> list[NamedPrompt]:
        """The prompts, each with the name that error messages give it."""
        from specrt.cli.prompts import prompts_or_bundled

        found = prompts_or_bundled(
            self.prompts,
            self.num_prompts,
            num_bundled=_NUM_PROBLEMS,
            is_jsonl=self.jsonl,
            is_chat=self.chat,
        )
        for one in found:
            if one.options:
                names = ", ".join(one.options)
                raise ValueError(f"{one.name}: a trace has one set of options, got {names}")
        return found

    def task_name(self) -> str:
        """What the prompts are called."""
        if self.task is not None:
            return self.task
        return "problems" if self.prompts is None else Path(self.prompts).name.split(".")[0]


def record_file(
    file: str, options: RecordOptions, sampling: SamplingParams, notice: str | None = None
) -> None:
    """Load the models, record, and write a trace.

    Args:
        file: to write.
        options, sampling: what and how.
        notice: said once the work begins.

    Raises:
        ValueError: an option is out of range, or the drafter is none of EESD.
        CheckpointError, OSError: a file is missing or broken.
        GenerationError: a sequence failed.
    """
    from specrt.cli.prompts import encode
    from specrt.draft.eesd.drafter import EesdDrafter
    from specrt.lab.record import measuring_control, record
    from specrt.lab.trace import write_trace

    named = options.named_prompts()
    _check(file, options)
    engine = load_engine(
        options.target,
        options.drafter,
        dtype=options.dtype,
        threads=options.threads,
        controller=measuring_control(options.max_draft),
    )
    drafter = engine.drafter
    assert isinstance(drafter, EesdDrafter), "what its checkpoint says"
    prompts = encode(engine, named)
    if notice is not None:
        note(notice)
    greedy, sampled = drafter.exit_model.slope.tolist()
    trace = record(
        engine,
        prompts,
        sampling,
        _models(options, engine, drafter),
        task=options.task_name(),
        slope=(greedy, sampled),
        on_prompt=lambda done: _progress(done, len(prompts)),
    )
    write_trace(file, trace)


def _check(file: str, options: RecordOptions) -> None:
    """What would else be found out after the work, or told less clearly."""
    from specrt.draft.eesd.checkpoint import is_exit_checkpoint
    from specrt.draft.kinds import bundled_names

    if not Path(file).parent.is_dir():
        raise ValueError(f"record: expected a folder to write into, got {file!r}")
    if Path(file).is_dir():  # the empty name is the present one
        raise ValueError(f"record: expected a file to write, got {file!r}")
    directory = Path(options.drafter)
    if options.drafter in bundled_names():
        directory = _bundled(options)
    if not is_exit_checkpoint(directory):
        raise ValueError(
            "drafter: expected a bundled EESD drafter or the directory of one, "
            f"got {options.drafter!r}"
        )


def _bundled(options: RecordOptions) -> Path:
    """The directory of a drafter that is bundled for the target."""
    from specrt.draft.kinds import drafter_directory

    path, _ = target_directory(options.target)
    return drafter_directory(options.drafter, target_config(options.target), path)


def _models(options: RecordOptions, engine: Engine, drafter: EesdDrafter) -> TraceModels:
    from specrt.config import config_fingerprint
    from specrt.draft.kinds import drafter_directory
    from specrt.lab.trace import TraceModels

    config = engine.target.config
    weights = drafter_directory(options.drafter, config) / "model.safetensors"
    return TraceModels(
        target=target_directory(options.target)[1],
        target_fingerprint=config_fingerprint(config),
        drafter=drafter_name(options.drafter, config),
        drafter_fingerprint=hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        exit_layer=drafter.exit_model.num_layers,
        dtype=engine.target.weights.form,
        max_draft=options.max_draft,
    )


def _progress(done: int, total: int) -> None:
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(f"{done} of {total} prompts recorded", end="\r")
