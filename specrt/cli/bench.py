"""``specrt bench``: drafters against plain decoding on a user's own target and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specrt.cli.answers import digest, model_options
from specrt.cli.bench_file import Case, Result, ResultFile
from specrt.cli.bench_report import Report
from specrt.cli.contenders import contenders, identity, name_drafters
from specrt.cli.engine_options import EngineOptions, drafter_name, target_config, target_directory
from specrt.cli.errors import FAILED, note, report
from specrt.cli.options import (
    INPUT,
    RUNTIME,
    SAMPLING,
    AddSpecialTokens,
    Chat,
    Jsonl,
    PromptFile,
    with_options,
)
from specrt.cli.progress import progress
from specrt.cli.prompts import NamedPrompt, encode, own_sampling, prompts_or_bundled
from specrt.cli.sampling_options import MaxNewTokens, Seed
from specrt.draft.kinds import AUTO, NONE
from specrt.lab.tasks import in_turn, spread, task_names

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.lab.measure import Figures
    from specrt.sampling import SamplingParams

_NUM_BUNDLED = 16


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how often, and where it is said.

    Raises:
        ValueError: a count is out of range, or options exclude each other.
    """

    drafters: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]DRAFTER,...",
            help="In place of --drafter several of them; 'all' among them: those that need no "
            "checkpoint, and the bundled ones that fit. NAME is what tables call it.",
            rich_help_panel=RUNTIME,
        ),
    ] = None
    prompts: PromptFile = None
    jsonl: Jsonl = False
    chat: Chat = False
    add_special_tokens: AddSpecialTokens = True
    num_prompts: Annotated[
        int | None,
        typer.Option(
            "--num-prompts",
            "--limit",
            help="So many: the first, or where lines name a task or category as many of each, "
            "evenly spaced.",
            rich_help_panel=INPUT,
        ),
    ] = None
    repeats: Annotated[int, typer.Option(help="Timed runs of each.", rich_help_panel=RUNTIME)] = 3
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Untimed runs before them; default: 1, on a GPU 3. The first prompt has no fewer.",
            rich_help_panel=RUNTIME,
        ),
    ] = None
    out: Annotated[
        str | None,
        typer.Option(
            help="JSONL that keeps what is measured, prompt by prompt; the same command goes on "
            "with it.",
            rich_help_panel=INPUT,
        ),
    ] = None
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what OUT holds.", rich_help_panel=INPUT)
    ] = False
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object.", rich_help_panel=INPUT)
    ] = False
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables in Markdown.", rich_help_panel=INPUT)
    ] = False
    max_new_tokens: MaxNewTokens = 128
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 is greedy (the default); repeatable.", rich_help_panel=SAMPLING),
    ] = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.json and self.markdown:
            raise ValueError("json, markdown: expected one of them")
        if self.restart and self.out is None:
            raise ValueError("restart: goes with --out")
        if self.out and self.prompts and Path(self.out).resolve() == Path(self.prompts).resolve():
            raise ValueError(f"out: expected a file of its own, got the prompts': {self.out}")

    def temperatures(self) -> tuple[float, ...]:
        """Each once."""
        return tuple(dict.fromkeys(self.temperature or [0.0]))

    def sampling(self, temperature: float) -> SamplingParams:
        """Of prompts whose lines say nothing.

        Raises:
            ValueError: an option is out of range.
        """
        from specrt.sampling import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=temperature, seed=self.seed
        )


@with_options
def bench(*, options: EngineOptions, wanted: BenchOptions) -> None:
    """Measure drafters against plain decoding: speed-up, tau, equal tokens."""
    if wanted.drafters is not None and options.drafter != AUTO:
        raise ValueError("drafter, drafters: expected one of them")
    for name in ("controller", "draft_weights", "hot_tokens", "draft_window"):
        if wanted.drafters is not None and getattr(options, name) is not None:
            raise ValueError(f"{name}: goes with --drafter, not with --drafters")
    is_kept = wanted.out is not None
    file = ResultFile(Path(wanted.out or ""), is_restart=wanted.restart) if is_kept else None
    with file or nullcontext():
        _bench(options, wanted, file)


def _bench(options: EngineOptions, wanted: BenchOptions, file: ResultFile | None) -> None:
    """Load, measure and print.

    Raises:
        typer.Exit: with code 1 if a drafter's tokens were not plain decoding's.
        KeyboardInterrupt: once what was measured before has been printed.
    """
    from specrt.lab.measure import PLAIN, without_drafter

    prompts, tasks = _choose(wanted)
    sampling = {one: own_sampling(prompts, wanted.sampling(one)) for one in wanted.temperatures()}
    is_gpu, config = options.device != "cpu", target_config(options.target, options.lora)
    if wanted.drafters is None:
        shown = drafter_name(options.drafter, config, is_gpu=is_gpu)
        if shown == PLAIN:
            raise ValueError(
                f"drafter: {PLAIN} is what plain decoding is called; --drafters NAME=DIR"
            )
        engine = options.load(max_shared_tokens=0)
        named = {shown: shown if options.drafter == AUTO else options.drafter}
        engines = dict.fromkeys(named, engine)
    else:
        named = name_drafters(wanted.drafters, config, is_gpu=is_gpu)
        engine = replace(options, drafter=NONE).load(max_shared_tokens=0)
        engines = contenders(engine, options.target, named)
    if file is not None:
        given = {name: named[name] for name in engines}
        file.begin(_circumstances(engine, options, wanted, given))
    encoded = encode(engine, prompts, add_special_tokens=wanted.add_special_tokens)
    cases = [
        Case(place, prompts[place].name, tasks[place], t, encoded[place], params[place])
        for place in in_turn(tasks)
        for t, params in sampling.items()
    ]
    engines = {PLAIN: without_drafter(engine), **engines}
    results: list[Result] = []
    try:
        _measure(engines, cases, wanted, file, results)
    except KeyboardInterrupt:  # in here one more does not cut the tables short
        _show(results, list(engines), wanted)
        note(f"{len(results)} of {len(cases)} measurements were made")
        raise
    _show(results, list(engines), wanted)
    if any(one.difference for result in results for one in result.figures.values()):
        raise typer.Exit(FAILED)


def _show(results: Sequence[Result], names: Sequence[str], wanted: BenchOptions) -> None:
    """Print what was measured, in the order of the prompts."""
    import torch

    if not results:
        return
    ordered = sorted(results, key=lambda one: one.case.place)
    told = Report(ordered, names, wanted.repeats, torch.get_num_threads())
    if wanted.json:
        print(json.dumps(told.as_dict()))
    else:
        told.show(wanted.markdown)


def _choose(wanted: BenchOptions) -> tuple[list[NamedPrompt], list[str]]:
    """The prompts to measure, and their tasks."""
    is_file = wanted.prompts is not None
    found = prompts_or_bundled(
        wanted.prompts,
        None if is_file else wanted.num_prompts,
        num_bundled=_NUM_BUNDLED,
        is_jsonl=wanted.jsonl,
        is_chat=wanted.chat,
    )
    tasks = task_names([one.category for one in found])
    places = spread(tasks, wanted.num_prompts)
    return [found[place] for place in places], [tasks[place] for place in places]


def _circumstances(
    engine: Engine, options: EngineOptions, wanted: BenchOptions, drafters: Mapping[str, str]
) -> dict[str, Any]:
    """What has to be the same wherever figures stand in one table."""
    import torch

    from specrt.cli.info import cpu_model

    directory, _ = target_directory(options.target)
    apart = ("target", "drafter", "threads", "dtype", "hot_tokens")
    hot_tokens = None if options.hot_tokens is None else Path(options.hot_tokens).read_bytes()
    return {
        **model_options(engine, directory),
        "drafters": {
            name: identity(drafter, engine.target.config) for name, drafter in drafters.items()
        },
        "options": {name: value for name, value in vars(options).items() if name not in apart},
        "hot_tokens": None if hot_tokens is None else digest(hot_tokens.hex()),
        "repeats": wanted.repeats,
        "warmup": wanted.warmup,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
    }


def _measure(
    engines: Mapping[str, Engine],
    cases: Sequence[Case],
    wanted: BenchOptions,
    file: ResultFile | None,
    results: list[Result],
) -> None:
    """Add the results of all cases, those that are there already first.

    Raises:
        KeyboardInterrupt: once what was measured before has been added.
    """
    known = [None if file is None else file.find(case) for case in cases]
    results += [one for one in known if one is not None]
    _tell_differences(results)
    left = [case for case, one in zip(cases, known, strict=True) if one is None]
    with progress("prompts", len(cases), len(results)) as advance:
        for number, case in enumerate(left):
            # Of a prompt that comes twice there is one by then.
            result = None if file is None else file.find(case)
            if result is None:
                result = Result(case, _compare(engines, case, wanted, is_first=number == 0))
                if file is not None:
                    file.write(result)
            results.append(result)
            _tell_differences([result])
            advance()


def _compare(
    engines: Mapping[str, Engine], case: Case, wanted: BenchOptions, *, is_first: bool
) -> Mapping[str, Figures]:
    from specrt.lab.measure import compare, warmups
    from specrt.types import GenerationError

    # Whoever comes first finds a prompt's pages and buffers cold: not always the same one.
    shift, names = case.place % len(engines), list(engines)
    engines = {name: engines[name] for name in names[shift:] + names[:shift]}
    warmup = wanted.warmup
    if is_first and warmup is not None:
        warmup = max(warmup, *(warmups(engine.target.device) for engine in engines.values()))
    try:
        found = compare(engines, case.prompt, case.sampling, repeats=wanted.repeats, warmup=warmup)
    except (ValueError, GenerationError) as error:
        raise type(error)(f"{case.name}: {error}") from error
    figures = found.figures()
    return {name: figures[name] for name in names}


def _tell_differences(results: Iterable[Result]) -> None:
    for result in results:
        for name, one in result.figures.items():
            if one.difference is not None:
                plain, other = (
                    "the end" if token is None else f"token {token}"
                    for token in (one.difference.plain, one.difference.other)
                )
                report(
                    f"{result.case.name}, temperature {result.case.temperature:g}: NOT EQUAL: "
                    f"position {one.difference.position} is {other} by {name}, {plain} by plain "
                    "decoding"
                )
