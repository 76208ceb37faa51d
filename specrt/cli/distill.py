"""``specrt distill-data``: the target's own answers, to train drafters on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrt.cli.answers import AnswerFile, Plan, answer, digest, model_options
from specrt.cli.engine_options import (
    Lora,
    Quantize,
    adapter_directory,
    load_engine,
    target_directory,
)
from specrt.cli.errors import note
from specrt.cli.options import (
    INPUT,
    RUNTIME,
    SAMPLING,
    Device,
    Dtype,
    NumPrompts,
    Target,
    Threads,
    with_options,
)
from specrt.cli.sampling_options import MaxNewTokens
from specrt.targets import BUILTIN

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.train.data.prompts import TrainingPrompt


@dataclass(frozen=True)
class AnswerOptions:
    """Which answers to make, and of which prompts.

    Raises:
        ValueError: a count is less than 1, there are to be no prompts, or ``out`` is one of their
            files.
    """

    out: Annotated[
        str, typer.Option(help="JSONL to write or to go on with.", rich_help_panel=INPUT)
    ]
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL with any form of training data, or prompts alone; repeatable.",
            rich_help_panel=INPUT,
        ),
    ] = None
    own_prompts: Annotated[
        int | None,
        typer.Option(
            help="Besides, so many prompts that the target, a chat model, writes itself; kept in "
            "OUT.own-prompts.",
            rich_help_panel=INPUT,
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL with texts for measuring: prompts that share 13 words in a row with one "
            "are left out; repeatable.",
            rich_help_panel=INPUT,
        ),
    ] = None
    num_prompts: NumPrompts = None
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 is greedy (the default); repeatable.", rich_help_panel=SAMPLING),
    ] = None
    samples_per_prompt: Annotated[
        int, typer.Option(help="At each temperature above 0.", rich_help_panel=SAMPLING)
    ] = 1
    max_new_tokens: MaxNewTokens = 512
    seed: Annotated[int, typer.Option(help="Same seed, same texts.", rich_help_panel=SAMPLING)] = 0
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip malformed lines.", rich_help_panel=INPUT)
    ] = False
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what OUT holds.", rich_help_panel=INPUT)
    ] = False

    def __post_init__(self) -> None:
        for name in ("num_prompts", "own_prompts", "samples_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not self.prompts and self.own_prompts is None:
            raise ValueError("prompts: expected --prompts or --own-prompts, got neither")
        given = (*(self.prompts or ()), *(self.exclude or ()))
        if Path(self.out).resolve() in {Path(file).resolve() for file in given}:
            raise ValueError(f"out: expected a file of its own, got one of the prompts: {self.out}")

    def plan(self) -> Plan:
        """What every prompt gets."""
        temperatures = tuple(dict.fromkeys(self.temperature or [0.0]))
        return Plan(temperatures, self.samples_per_prompt, self.seed)


@with_options
def distill_data(
    *,
    answers: AnswerOptions,
    target: Target = BUILTIN,
    drafter: Annotated[
        str,
        typer.Option(help="As for generate; changes the time only.", rich_help_panel=RUNTIME),
    ] = "none",
    batch_size: Annotated[
        int, typer.Option(help="Answers made together.", rich_help_panel=RUNTIME)
    ] = 16,
    lora: Lora = None,
    quantize: Quantize = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Write the target's own answers, greedy and sampled, as training data."""
    directory, target_name = target_directory(target)
    with AnswerFile(Path(answers.out), target_name, is_restart=answers.restart) as file:
        engine = load_engine(
            target,
            drafter,
            device=device,
            dtype=dtype,
            threads=threads,
            max_batch=batch_size,
            lora=lora,
            quantize=quantize,
        )
        model = model_options(engine, directory, adapter_directory(lora))
        _distill(engine, model, answers, file)


def _distill(
    engine: Engine, model: Mapping[str, str], answers: AnswerOptions, file: AnswerFile
) -> None:
    """Read the prompts or have them written, and write what of the answers is not there yet."""
    template = str(engine.tokenizer.inner.chat_template)
    model = {**model, "template": digest(template)}
    given = _given(engine, answers) if answers.prompts else []
    asked = [*given[: answers.num_prompts], *_own(engine, answers, file, model)]
    found = _measured_apart(asked, answers.exclude or ())
    plan = answers.plan()
    jobs = plan.jobs(_fitting(found, engine), answers.max_new_tokens)
    file.begin(
        {
            "temperature": sorted(plan.temperatures),
            "samples_per_prompt": plan.samples_per_prompt,
            "max_new_tokens": answers.max_new_tokens,
            "seed": plan.seed,
            **model,
            "prompts": digest(str(sorted(prompt.token_ids for prompt in given))),
        }
    )
    answer(engine, jobs, file)


def _given(engine: Engine, answers: AnswerOptions) -> list[TrainingPrompt]:
    """The prompts of the files."""
    from specrt.train.data.prompts import read_prompts

    found, told = read_prompts(answers.prompts or (), engine.tokenizer, skip_bad=answers.skip_bad)
    for count, why in (
        (told.num_empty, "empty prompts"),
        (told.num_repeated, "repeated prompts"),
        (told.num_bad, "malformed lines"),
    ):
        if count:
            note(f"{count} {why} skipped")
    return found


def _own(
    engine: Engine, answers: AnswerOptions, file: AnswerFile, model: Mapping[str, str]
) -> list[TrainingPrompt]:
    """Prompts that the target writes, if it is to."""
    if answers.own_prompts is None:
        return []
    from specrt.cli.own_prompts import own_prompts

    path = Path(f"{answers.out}.own-prompts")
    with AnswerFile(path, file.target, is_restart=answers.restart) as own:
        return own_prompts(engine, own, model, num_prompts=answers.own_prompts, seed=answers.seed)


def _measured_apart(
    prompts: Sequence[TrainingPrompt], measured: Sequence[str]
) -> list[TrainingPrompt]:
    """Those that are not in files for measuring, nor close to what is."""
    if not measured:
        return list(prompts)
    from specrt.train.data.overlap import WordRuns, asked_texts

    runs = WordRuns(asked_texts(measured))
    apart = [prompt for prompt in prompts if not runs.meet(prompt.text)]
    if len(apart) < len(prompts):
        note(f"{len(prompts) - len(apart)} prompts skipped: they are for measuring, or nearly so")
    return apart


def _fitting(prompts: Sequence[TrainingPrompt], engine: Engine) -> list[TrainingPrompt]:
    """Those that leave room for an answer."""
    limit = engine.target.config.max_positions
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) < limit]
    if len(fitting) < len(prompts):
        num_long = len(prompts) - len(fitting)
        note(f"{num_long} prompts skipped: they fill the target's context of {limit} tokens")
    return fitting
