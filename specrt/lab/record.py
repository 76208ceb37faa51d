"""From an engine and prompts to a trace (``specrt/lab/trace.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import cast

from specrt.draft.base import Drafter, DraftParams, EmptyDrafter
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.engine.engine import Engine
from specrt.engine.prompts import Prompt
from specrt.engine.results import GenerationResult
from specrt.lab.recording_drafter import ChainDrafter, Recording, RecordingDrafter
from specrt.lab.trace import Trace, TraceHeader, TraceModels
from specrt.sampling import SamplingParams
from specrt.types import GenerationError

_COST_REPEATS = 6
_COST_TOKENS = 16


def record(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    models: TraceModels,
    *,
    task: str,
    slope: tuple[float, float],
    costs: DraftCosts | None = None,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> Trace:
    """Answer prompts with a chain of ``models.max_draft`` tokens drafted at every token.

    Args:
        engine: its drafter is a :class:`~specrt.lab.recording_drafter.ChainDrafter`.
        prompts: as :meth:`Engine.generate` takes them.
        sampling: needs a seed, from which controllers draw even where the temperature is 0.
        models: of the header.
        task: what the prompts are called.
        slope: of the header.
        costs: of the header; None: as :func:`measure_costs` finds them.
        on_prompt: called with the number of prompts done.

    Raises:
        ValueError: no prompts, no seed, options that a trace does not keep (bias, penalties), or a
            chain that is longer than the engine's trees.
        GenerationError: a sequence failed.
    """
    longest = models.max_draft
    sampling = sampling.with_defaults()  # without the model's own penalty, which traces do not keep
    _check(engine, prompts, sampling, longest)
    drafter = cast("ChainDrafter", engine.drafter)
    if costs is None:
        costs = measure_costs(engine, prompts[0], sampling)
    recorder = RecordingDrafter(drafter)
    draft = DraftParams(depth=longest)
    results = _answers(_with_drafter(engine, recorder), prompts, sampling, draft, on_prompt)
    overruns = _overruns(engine, recorder.recordings, results, sampling, longest)
    header = TraceHeader(
        models=models,
        temperature=float(sampling.temperature),
        top_k=sampling.top_k or 0,
        top_p=float(sampling.top_p),
        min_p=float(sampling.min_p),
        costs=costs,
        slope=slope,
    )
    sequences = tuple(
        recording.sequence(task, index, longest, overrun)
        for index, (recording, overrun) in enumerate(
            zip(recorder.recordings, overruns, strict=True)
        )
    )
    return Trace(header, sequences)


def measuring_control(max_draft: int) -> ControlOptions:
    """A controller that drafts chains of all lengths, for :func:`measure_costs`."""
    return ControlOptions("beta-ts", max_draft, prior=(8.0, 2.0), discount=0.5)


def measure_costs(engine: Engine, prompt: Prompt, sampling: SamplingParams) -> DraftCosts:
    """Times of one sequence's rounds, from drafted and plain ones in turn.

    A recording cannot give them: it verifies one row a round, and asks no controller, whose own
    time is part of a drafted round's.

    Args:
        engine: its drafter is a ``ChainDrafter`` (:mod:`specrt.lab.recording_drafter`), under a
            controller whose lengths vary (:func:`measuring_control`), or rows could not be told
            apart.
        prompt: what is answered, a few tokens of it each time.
        sampling: how.

    Raises:
        GenerationError: the sequence failed.
    """
    for seed in range(_COST_REPEATS):  # or the same lengths would come again
        few = replace(sampling, max_new_tokens=_COST_TOKENS, ignore_eos=True, seed=seed)
        for draft in (None, DraftParams(total_tokens=1)):
            result = engine.generate(prompt, few, draft)
            if result.error is not None:
                raise GenerationError(result.error)
    return cast("ChainDrafter", engine.drafter).costs()


def _check(
    engine: Engine, prompts: Sequence[Prompt], sampling: SamplingParams, max_draft: int
) -> None:
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    if sampling.seed is None:
        raise ValueError("seed: expected one, got none")
    if sampling.edits_logits:
        raise ValueError("sampling: expected no bias and no penalties, which traces do not keep")
    if not 1 <= max_draft < engine.max_nodes:
        raise ValueError(
            f"max_draft: expected 1..{engine.max_nodes - 1}, below the engine's max_nodes, "
            f"got {max_draft}"
        )


def _with_drafter(engine: Engine, drafter: Drafter) -> Engine:
    return Engine(
        engine.target,
        drafter,
        engine.tokenizer,
        max_batch=engine.max_batch,
        max_nodes=engine.max_nodes,
    )


def _answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    draft: DraftParams,
    on_prompt: Callable[[int], None],
) -> list[GenerationResult]:
    results: dict[int, GenerationResult] = {}
    with closing(engine.stream(prompts, sampling, draft)) as chunks:
        for chunk in chunks:
            if chunk.result is None:
                continue
            if chunk.result.error is not None:
                raise GenerationError(f"prompt {chunk.index + 1}: {chunk.result.error}")
            results[chunk.index] = chunk.result
            on_prompt(len(results))
    return [results[index] for index in range(len(prompts))]


def _overruns(
    engine: Engine,
    recordings: Sequence[Recording],
    results: Sequence[GenerationResult],
    sampling: SamplingParams,
    max_draft: int,
) -> list[list[int]]:
    """What the target says behind the end of each output that could have been longer.

    A token's noise belongs to its position, so it is the same in a new sequence that begins with
    the whole output.
    """
    overruns: list[list[int]] = [[] for _ in results]
    rooms = [min(recording.state.num_left, max_draft - 1) for recording in recordings]
    cut = [row for row, room in enumerate(rooms) if room > 0]
    whole = [results[row].prompt_token_ids + results[row].token_ids for row in cut]
    plain = replace(sampling, ignore_eos=True, stop=None, stop_token_ids=None)
    further = [replace(plain, max_new_tokens=rooms[row]) for row in cut]
    said = _with_drafter(engine, EmptyDrafter()).generate(whole, further)
    for row, result in zip(cut, said, strict=True):
        if result.error is not None:
            raise GenerationError(f"prompt {row + 1}: {result.error}")
        overruns[row] = result.token_ids
    return overruns
