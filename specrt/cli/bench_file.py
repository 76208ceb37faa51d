"""What ``specrt bench`` measured, prompt by prompt, in a file that can be gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from specrt.cli.answers import digest
from specrt.cli.line_file import LineFile

if TYPE_CHECKING:
    from pathlib import Path

    from specrt.engine.prompts import Prompt
    from specrt.lab.measure import Figures
    from specrt.sampling import SamplingParams


@dataclass(frozen=True)
class Case:
    """One prompt at one temperature, for all contenders."""

    place: int
    """Of the prompt among all."""
    name: str
    """What messages call it."""
    task: str
    """As :func:`specrt.lab.tasks.task_names` gives it."""
    temperature: float
    """That the command line asks for; a prompt's line may say otherwise."""
    prompt: Prompt
    sampling: SamplingParams

    @property
    def key(self) -> str:
        """What tells it from others in a file."""
        return digest(f"{self.prompt} {self.sampling}")


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    case: Case
    figures: Mapping[str, Figures]
    """By contender."""


class ResultFile(LineFile):
    """A file of results.

    Args:
        path, is_restart: as for :class:`~specrt.cli.line_file.LineFile`.
    """

    what = "a result"

    def __init__(self, path: Path, *, is_restart: bool = False) -> None:
        self._done: dict[str, Mapping[str, Figures]] = {}
        super().__init__(path, is_restart=is_restart)

    def take(self, where: str, data: dict[str, Any]) -> None:
        """As :meth:`LineFile.take`."""
        from specrt.lab.measure import PLAIN, Difference, Figures

        try:
            figures = {}
            for name, one in data["contenders"].items():
                parting = one.pop("difference")
                parting = None if parting is None else Difference(**parting)
                figures[name] = Figures(**one, difference=parting)
            figures[PLAIN]  # which all are compared with
            self._done[data["key"]] = figures
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected {self.what} of specrt bench") from error

    def find(self, case: Case) -> Result | None:
        """A case's result, if it is there."""
        figures = self._done.get(case.key)
        return None if figures is None else Result(case, figures)

    def write(self, result: Result) -> None:
        """Add one; it is in the file when this returns.

        Raises:
            OSError: it cannot be written, and nothing of it is.
        """
        self.append(
            {
                "prompt": result.case.name,
                "task": result.case.task,
                "temperature": result.case.temperature,
                "key": result.case.key,
                "contenders": {name: asdict(one) for name, one in result.figures.items()},
            }
        )
        self._done[result.case.key] = result.figures
