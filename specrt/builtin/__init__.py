"""What is bundled: a small target that runs anywhere, drafters for it and for others, and problems
that it has not seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

TARGET = "builtin"
"""The name of the bundled target."""

_HERE = Path(__file__).parent


def target_path() -> Path:
    """The bundled target's directory (its card is the README.md there)."""
    return _HERE / "target"


@dataclass(frozen=True)
class BundledDrafter:
    """A drafter that comes with the package."""

    name: str
    """What it is asked for by, with its target."""
    target: str
    """The name of the target that it was made for."""
    path: Path
    """Its directory."""

    @property
    def fingerprint(self) -> str | None:
        """The target's, as the drafter's ``config.json`` has it."""
        said = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        fingerprint = said.get("target", {}).get("fingerprint")
        return None if fingerprint is None else str(fingerprint)


def drafters() -> list[BundledDrafter]:
    """All that are here: of the bundled target beside it, of others in a folder a target."""
    own = (
        BundledDrafter(file.parent.name, TARGET, file.parent)
        for file in sorted(_HERE.glob("*/config.json"))
        if file.parent.name != "target"
    )
    others = (
        BundledDrafter(file.parent.name, file.parent.parent.name, file.parent)
        for file in sorted(_HERE.glob("*/*/config.json"))
    )
    return [*own, *others]


def drafter_paths(target: str = TARGET) -> dict[str, Path]:
    """The directories of the drafters bundled for a target, by name."""
    return {one.name: one.path for one in drafters() if one.target == target}


def heldout_prompts(count: int | None = None) -> list[str]:
    """Held-out GSM8K problems in the form the bundled target was trained on.

    Args:
        count: that many, evenly spaced over the 473; all by default.

    Raises:
        ValueError: ``count`` is not 1..473.
    """
    with (_HERE / "data" / "gsm8k_heldout.jsonl").open(encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    if count is not None and not 1 <= count <= len(problems):
        raise ValueError(f"count: expected 1..{len(problems)}, got {count}")
    step = len(problems) / (count or len(problems))
    chosen = [problems[int(i * step)] for i in range(count or len(problems))]
    return [f"Question: {problem['question']}\nAnswer:" for problem in chosen]
