"""Training data from nothing: what a target says by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specrt.cli.answers import AnswerFile, Job, Plan, answer, model_options
from specrt.cli.engine_options import load_engine, target_directory
from specrt.cli.errors import note
from specrt.draft.kinds import NONE

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.train.data.prompts import TrainingPrompt

TEXTS_FILE = "distilled.jsonl"
_OPENINGS_FILE = "openings.jsonl"
_OPENING_TOKENS = 32
_BATCH = 16


def write_own_text(
    target: str,
    folder: Path,
    *,
    num_texts: int,
    max_new_tokens: int,
    seed: int,
    lora: Path | None = None,
    is_restart: bool = False,
) -> None:
    """Let a target speak from its first token on, and keep it in ``folder`` as training data.

    Half of the texts are drawn at temperature 1. The others are greedy from behind an opening of 32
    tokens, which was drawn too: greedy from the first token on there would be but one text. What is
    there already is not made again.

    Args:
        target: as named on the command line.
        folder: made where it is missing.
        num_texts: at least 2.
        max_new_tokens: of a text.
        seed: of what is drawn.
        lora: a directory with a LoRA adapter that is merged into it.
        is_restart: make all of it anew.

    Raises:
        ValueError: too few or too short texts, a target without a first token (bos), or files of
            another target or other options.
        OSError: a file cannot be read or written.
        typer.Exit: with code 2 if a text failed.
    """
    from specrt.train.data.prompts import TrainingPrompt

    _check_sizes(num_texts, max_new_tokens)
    adapter = None if lora is None else str(lora)
    engine = load_engine(target, NONE, dtype="auto", threads=None, max_batch=_BATCH, lora=adapter)
    first = engine.target.config.bos_id
    if first is None:
        raise ValueError("data: expected --data, for this target has no first token (bos_token_id)")
    beginning = [TrainingPrompt.from_tokens((first,), engine.tokenizer)]
    folder.mkdir(parents=True, exist_ok=True)
    # Of another seed, so that no opening is the beginning of a text that is drawn as well.
    openings = Plan((1.0,), num_texts // 2, seed + 1).jobs(beginning, _OPENING_TOKENS)
    drawn = Plan((1.0,), num_texts - num_texts // 2, seed).jobs(beginning, max_new_tokens)
    directory, name = target_directory(target)
    run = {
        "num_texts": num_texts,
        "max_length": max_new_tokens + 1,
        "seed": seed,
        **model_options(engine, directory, lora),
    }
    with AnswerFile(folder / _OPENINGS_FILE, name, is_restart=is_restart) as file:
        file.begin(run)
        answer(engine, openings, file, note)
    opened = _opened(folder / _OPENINGS_FILE, engine, openings)
    greedy = Plan((0.0,), 1, seed).jobs(opened, max_new_tokens)
    with AnswerFile(folder / TEXTS_FILE, name, is_restart=is_restart) as file:
        file.begin(run)
        answer(engine, [*drawn, *greedy], file, note)


def _check_sizes(num_texts: int, max_new_tokens: int) -> None:
    if num_texts < 2:
        raise ValueError(f"num_texts: expected at least 2, got {num_texts}")
    if max_new_tokens <= _OPENING_TOKENS:  # of texts behind an opening nothing would be left
        least = _OPENING_TOKENS + 2
        raise ValueError(
            f"max_length: expected at least {least} without --data, got {max_new_tokens + 1}"
        )


def _opened(file: Path, engine: Engine, jobs: Sequence[Job]) -> list[TrainingPrompt]:
    """What these jobs wrote as prompts; a text that was over within its opening is none."""
    from specrt.train.data.prompts import TrainingPrompt

    wanted = {job.sampling.seed for job in jobs}
    prompts: dict[tuple[int, ...], TrainingPrompt] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        token_ids = (*said["prompt_ids"], *said["response_ids"])
        if said["seed"] in wanted and token_ids[-1] not in engine.target.config.eos_ids:
            prompts[token_ids] = TrainingPrompt.from_tokens(token_ids, engine.tokenizer)
    return list(prompts.values())
