"""Prompts that a chat model writes itself, as the user of its own template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from specrt.cli.answers import AnswerFile, Plan, answer
from specrt.cli.errors import note

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.models.tokenizer import Tokenizer
    from specrt.train.data.prompts import TrainingPrompt

_PROBE = "specrt-probe"
_MOST_TOKENS = 256


def own_prompts(
    engine: Engine,
    file: AnswerFile,
    run: dict[str, str],
    *,
    num_prompts: int,
    seed: int,
) -> list[TrainingPrompt]:
    """Let a model go on from an empty user's turn, at temperature 1 (Magpie, arXiv 2406.08464).

    Args:
        engine: of the model.
        file: where what it writes is kept; what is there already is not written again.
        run: as :meth:`AnswerFile.begin` takes it.
        num_prompts: that it is asked for. What does not end by itself within 256 tokens, is empty
            or was there before is left out, so that fewer may come.
        seed: of what is drawn.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not tell what users say.
        typer.Exit: with code 2 if a text failed.
    """
    from specrt.train.data.prompts import TrainingPrompt

    tokenizer = engine.tokenizer
    opening = TrainingPrompt.from_tokens(_opening(tokenizer), tokenizer)
    file.begin({"own_prompts_seed": seed, **run})
    plan = Plan((1.0,), num_prompts, seed)
    jobs = plan.jobs([opening], _MOST_TOKENS)
    answer(engine, jobs, file, note)
    wanted = {job.sampling.seed for job in jobs}
    prompts: dict[tuple[int, ...], TrainingPrompt] = {}
    for text in _written(file.path, wanted):
        told = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        prompts[tuple(told)] = TrainingPrompt.from_tokens(tuple(told), tokenizer)
    return list(prompts.values())


def _opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands before the first word of a user.

    Raises:
        ValueError: the template does not say what users say, or there is none.
    """
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROBE}], add_generation_prompt=False
    )
    text = tokenizer.inner.decode(told, clean_up_tokenization_spaces=False)
    before, found, _ = text.partition(_PROBE)
    if not found:
        raise ValueError("own_prompts: expected a chat template that tells what users say")
    return tuple(tokenizer.encode(before, add_special_tokens=False))


def _written(path: Path, seeds: set[int | None]) -> Iterator[str]:
    """Texts that ended by themselves."""
    for line in path.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        text = said["response"].strip()
        if said["seed"] in seeds and said["finish_reason"] == "stop" and text:
            yield text
