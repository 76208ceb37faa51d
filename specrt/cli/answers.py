"""A target's own answers, line by line in a file that can be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specrt.cli.errors import USER_ERROR, report
from specrt.cli.line_file import LineFile
from specrt.cli.progress import progress

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.results import GenerationResult
    from specrt.sampling import SamplingParams
    from specrt.train.data.prompts import TrainingPrompt

_KEYS = ("prompt_ids", "response_ids", "temperature", "seed", "target")


@dataclass(frozen=True)
class Job:
    """One answer to make."""

    prompt: TrainingPrompt
    sampling: SamplingParams

    @property
    def key(self) -> tuple[tuple[int, ...], float, int]:
        """What tells an answer from all others in a file."""
        return (self.prompt.token_ids, self.sampling.temperature, self.sampling.seed or 0)


@dataclass(frozen=True)
class Plan:
    """Which answers every prompt gets."""

    temperatures: tuple[float, ...]
    samples_per_prompt: int
    """At each temperature above 0; a greedy answer is always the same."""
    seed: int

    def jobs(self, prompts: Sequence[TrainingPrompt], max_new_tokens: int) -> list[Job]:
        """All answers, prompt by prompt.

        Raises:
            ValueError: a temperature or ``max_new_tokens`` is out of range.
        """
        from specrt.sampling import SamplingParams

        jobs = []
        for prompt in prompts:
            for temperature in self.temperatures:
                for sample in range(self.samples_per_prompt if temperature > 0 else 1):
                    sampling = SamplingParams(
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        seed=self._seed(prompt, temperature, sample),
                    )
                    jobs.append(Job(prompt, sampling))
        return jobs

    def _seed(self, prompt: TrainingPrompt, temperature: float, sample: int) -> int:
        """Of the prompt itself, so that its answers do not depend on the prompts around it."""
        content = f"{self.seed} {temperature} {sample} {prompt.token_ids}"
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")


class AnswerFile(LineFile):
    """A file of answers.

    Args:
        path, is_restart: as for :class:`~specrt.cli.line_file.LineFile`.
        target: the target's name; answers of another are refused.

    Raises:
        ValueError: the file has lines that are no answers, or another target's, or another process
            is writing to it.
        OSError: it cannot be read or written.
    """

    what = "an answer"

    def __init__(self, path: Path, target: str, *, is_restart: bool = False) -> None:
        self.target = target
        self.done: set[tuple[tuple[int, ...], float, int]] = set()
        super().__init__(path, is_restart=is_restart)

    def take(self, where: str, data: dict[str, Any]) -> None:
        """As :meth:`LineFile.take`."""
        if not all(key in data for key in _KEYS):
            raise ValueError(f"{where}: expected an answer with {', '.join(_KEYS)}")
        if data["target"] != self.target:
            raise ValueError(
                f"{where}: an answer of target {data['target']!r}, expected {self.target!r}"
            )
        self.done.add((tuple(data["prompt_ids"]), data["temperature"], data["seed"]))

    def write(self, job: Job, result: GenerationResult) -> None:
        """Add one answer; it is in the file when this returns.

        Raises:
            OSError: it cannot be written, and nothing of it is.
        """
        self.append(
            {
                "prompt": job.prompt.text,
                "response": result.text,
                "prompt_ids": list(job.prompt.token_ids),
                "response_ids": result.token_ids,
                "temperature": job.sampling.temperature,
                "seed": job.sampling.seed,
                "finish_reason": result.finish_reason,
                "target": self.target,
            }
        )
        self.done.add(job.key)


def answer(
    engine: Engine,
    jobs: Sequence[Job],
    file: AnswerFile,
    say: Callable[[str], object] = print,
) -> None:
    """Make the answers that are not in the file yet, and say what came of it.

    Args:
        engine: of the target.
        jobs: what to make.
        file: where to.
        say: is given one line at the end.

    Raises:
        typer.Exit: with code 2, after all others were made, if a sequence failed.
    """
    left = [job for job in jobs if job.key not in file.done]
    num_there = len(jobs) - len(left)
    num_tokens = num_failed = 0
    chunks = engine.stream([job.prompt.token_ids for job in left], [job.sampling for job in left])
    with progress("answers", len(jobs), num_there) as advance, closing(chunks):
        for chunk in chunks:
            if chunk.result is None:
                continue
            if chunk.result.error is not None:
                num_failed += 1
                report(f"prompt {chunk.index + 1}: {chunk.result.error}")
            else:
                file.write(left[chunk.index], chunk.result)
                num_tokens += len(chunk.result.token_ids)
            advance()
    say(
        f"{file.path}: {len(left) - num_failed} answers written, {num_tokens} tokens; "
        f"{num_there} were there"
    )
    if num_failed:
        raise typer.Exit(USER_ERROR)


def model_options(engine: Engine, directory: Path, adapter: Path | None = None) -> dict[str, str]:
    """What of a target, beside its name, decides its answers; as :meth:`AnswerFile.begin` takes it.

    Args:
        engine: of the target.
        directory: the target's.
        adapter: of the LoRA adapter that is merged into it.

    Raises:
        CheckpointError, OSError: its weights cannot be read.
    """
    from specrt.models.opening import weights_hash

    dtype, weights = str(engine.target.dtype).removeprefix("torch."), engine.target.weights.form
    return {"target": weights_hash(directory, adapter), "dtype": dtype, "weights": weights}


def digest(content: str) -> str:
    """What tells one text from another, short enough to stand on every line."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]
