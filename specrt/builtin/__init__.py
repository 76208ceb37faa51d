"""What is bundled: a small target that runs anywhere, and problems it has not seen."""

from __future__ import annotations

import json
from pathlib import Path

_HERE = Path(__file__).parent


def target_path() -> Path:
    """The bundled target's directory (its card is the README.md there)."""
    return _HERE / "target"


def drafter_paths() -> dict[str, Path]:
    """The bundled drafters' directories, by name."""
    return {
        file.parent.name: file.parent
        for file in sorted(_HERE.glob("*/config.json"))
        if file.parent.name != "target"
    }


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
