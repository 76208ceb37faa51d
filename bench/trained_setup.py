"""What the steps of ``bench.trained_cuda`` have in common: a target, problems, a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import Row
from specrt.engine.engine import Engine
from specrt.loading import load
from specrt.models.tokenizer import load_tokenizer
from specrt.targets import target_path
from specrt.train.data.prompts import read_prompts

KINDS = ("fspad", "eagle2", "eesd")
PLAIN = "plain"
_MEASURED, _TRAINED = 473, 7000


@dataclass
class Found:
    """What a step has to tell."""

    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """What is wrong with ours."""
    left_out: list[str] = field(default_factory=list)
    """What was not looked at, with the reason."""


@dataclass(frozen=True)
class Setup:
    """For what target, with what problems, and where the steps leave what they made."""

    target: str
    """A directory, or ``"builtin"``."""
    problems: Path
    work: Path
    assistant: str | None = None
    """A smaller model's directory."""
    is_dry: bool = False

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.is_dry else "cuda"

    @property
    def answers(self) -> Path:
        """The target's own."""
        return self.work / "answers.jsonl"

    def drafter(self, kind: str) -> Path:
        """Where a trained drafter is, or will be."""
        return self.work / kind

    def drafters(self) -> dict[str, str | None]:
        """What there is to generate with, by name, plain decoding first; as ``specrt.load`` takes
        them."""
        made = {kind: str(self.drafter(kind)) for kind in KINDS if self._is_there(kind)}
        return {PLAIN: None, **made}

    def missing(self) -> list[str]:
        """Kinds of drafters that are not there, in words."""
        return [f"{kind}: was not trained" for kind in KINDS if not self._is_there(kind)]

    def _is_there(self, kind: str) -> bool:
        return (self.drafter(kind) / "config.json").exists()

    def split(self) -> tuple[Path, Path]:
        """Files of the problems to train on and of those to measure on."""
        lines = self.problems.read_text(encoding="utf-8").splitlines(keepends=True)
        num_measured = min(_MEASURED, len(lines) // 4)
        first = len(lines) - num_measured
        files = self.work / "trained_on.jsonl", self.work / "measured_on.jsonl"
        for file, part in zip(files, (lines[:first][:_TRAINED], lines[first:]), strict=True):
            file.write_text("".join(part), encoding="utf-8")
        return files

    def prompts(self, *, count: int | None = None) -> list[list[int]]:
        """Token ids of the problems to measure on; with ``count`` the last so many of all."""
        tokenizer = load_tokenizer(target_path(self.target))
        trained, measured = self.split()
        files = [measured] if count is None else [trained, measured]
        found = [list(prompt.token_ids) for prompt in read_prompts(files, tokenizer)[0]]
        return found if count is None else found[-count:]

    def engine(self, drafter: str | None, *, batch: int = 1, is_eager: bool = False) -> Engine:
        """The target with a drafter; its cache leaves room for others'."""
        return load(
            self.target,
            drafter,
            device=self.device,
            max_batch=batch,
            max_cached_tokens=2048 + 512 * batch,
            max_shared_tokens=0,  # each run computes its prompt
            progress=False,
            eager=is_eager,
        )
