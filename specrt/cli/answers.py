"""A target's own answers, line by line in a file that can be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specrt.cli.errors import USER_ERROR, report
from specrt.train.loop.lock import hold_file

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


class AnswerFile:
    """A file of answers that grows line by line; a line cut short by a kill is dropped.

    As a context that ends by an exception it removes a file that it made and wrote nothing to.

    Args:
        path: written if missing, else gone on with. One process at a time may.
        target: the target's name; answers of another are refused.
        is_restart: drop what is there, once :meth:`begin` is called.

    Raises:
        ValueError: the file has lines that are no answers, or another target's, or another process
            is writing to it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, target: str, *, is_restart: bool = False) -> None:
        self.path = path
        self.target = target
        self.done: set[tuple[tuple[int, ...], float, int]] = set()
        self._is_restart = is_restart
        self._is_new = not path.exists()
        self._run: Mapping[str, Any] = {}
        self._runs: dict[str, str] = {}
        with ExitStack() as stack:
            stack.enter_context(hold_file(path))
            # Unbuffered: what a full disk does not take is in no buffer to be tried again.
            self._file = stack.enter_context(path.open("ab", buffering=0))
            if not is_restart:
                self._read()
            self._held = stack.pop_all()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._is_new and self.path.stat().st_size == 0:
            self.path.unlink()
        self._held.close()

    def begin(self, run: Mapping[str, Any]) -> None:
        """Say how answers are made from here on; each line keeps it, under ``run``.

        Args:
            run: JSON values, by the names of the options.

        Raises:
            ValueError: answers that are there were made otherwise.
        """
        self._run = run
        if self._is_restart:
            self._file.truncate(0)
        for theirs, where in self._runs.items():
            said = json.loads(theirs)
            for name, value in run.items():
                if name in said and said[name] != value:
                    raise ValueError(
                        f"{name}: {where}: an answer made with {said[name]}, not {value}; "
                        "--restart begins anew, or write to another file"
                    )

    def write(self, job: Job, result: GenerationResult) -> None:
        """Add one answer; it is in the file when this returns.

        Raises:
            OSError: it cannot be written, and nothing of it is.
        """
        data = {
            "prompt": job.prompt.text,
            "response": result.text,
            "prompt_ids": list(job.prompt.token_ids),
            "response_ids": result.token_ids,
            "temperature": job.sampling.temperature,
            "seed": job.sampling.seed,
            "finish_reason": result.finish_reason,
            "target": self.target,
            "run": self._run,
        }
        size, line = self.path.stat().st_size, memoryview(json.dumps(data).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            said = f"{error.strerror}; the answers before are kept, the same command goes on"
            raise OSError(error.errno, said, str(self.path)) from error
        self.done.add(job.key)

    def _read(self) -> None:
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    self._file.truncate(end)
                    break
                end += len(line)
                self._take(f"{self.path}, line {number}", line)

    def _take(self, where: str, line: bytes) -> None:
        try:
            data: Any = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(data, dict) or not all(key in data for key in _KEYS):
            raise ValueError(f"{where}: expected an answer with {', '.join(_KEYS)}")
        if data["target"] != self.target:
            raise ValueError(
                f"{where}: an answer of target {data['target']!r}, expected {self.target!r}"
            )
        self.done.add((tuple(data["prompt_ids"]), data["temperature"], data["seed"]))
        if isinstance(run := data.get("run"), dict):  # earlier versions wrote none
            self._runs.setdefault(json.dumps(run), where)


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
    with _progress(len(jobs), num_there) as advance, closing(chunks):
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


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], None]]:
    """A function to call after each answer; a bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=total, completed=done)
        yield lambda: bar.advance(task)
