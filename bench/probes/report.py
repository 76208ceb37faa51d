"""What is printed and kept of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.clocks import clocks
from bench.commit import command_line, git_commit
from bench.probes import facts
from bench.probes.catalogue import Probe
from bench.probes.run import Outcome, Row

_HIDDEN = ("probe",)
_WIDEST = 40


@dataclass
class Report:
    """Grows by a probe at a time."""

    device: Mapping[str, Any]
    """The program's own row about it."""
    arguments: Sequence[str]
    folder: Path | None
    """Where ``probes_<card>.json`` is kept, rewritten after each probe."""
    rows: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = {
            "git_commit": git_commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": {key: value for key, value in self.device.items() if key != "probe"},
        }
        self._read_clocks("clocks")

    def add(self, probe: Probe, outcome: Outcome) -> str:
        """What there is to print of it."""
        fact = facts.line(probe.name, outcome.rows, outcome.failure)
        self.rows += outcome.rows
        self.facts.append(fact)
        if outcome.failure:
            self.failed.append(f"{probe.name}: {outcome.failure}")
        self._read_clocks("clocks_after")
        self.save()
        head = f"== {probe.name.upper()}: {probe.question} ({outcome.seconds:.1f} s)"
        return "\n".join([head, *table(outcome.rows), fact, ""])

    def _read_clocks(self, when: str) -> None:
        if uuid := self.device.get("uuid"):
            self.environment["gpu"][when] = clocks(str(uuid))

    @property
    def result(self) -> dict[str, Any]:
        """The last line: without what is only of interest in a file."""
        return {"rows": self.rows, "facts": self.facts, "failed": self.failed}

    def save(self) -> None:
        """Whole or not at all: the process may be stopped any time."""
        if self.folder is None:
            return
        name = file_name("probes", str(self.device.get("device", "")))
        command = command_line("bench.probes", self.arguments)
        kept = {"name": name, "command": command, "environment": self.environment, **self.result}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps(kept, indent=2) + "\n")
        new.replace(path)


def file_name(kind: str, card: str) -> str:
    """``probes_h100_80gb_hbm3`` for the ``probes`` of ``NVIDIA H100 80GB HBM3``."""
    words = [word for word in re.findall(r"[a-z0-9]+", card.lower()) if word != "nvidia"]
    return "_".join([kind, *(words or ["unknown"])])


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of fixed columns, one table for each set of keys."""
    lines: list[str] = []
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(key for key in row if key not in _HIDDEN), []).append(row)
    for keys, members in groups.items():
        cells = [list(keys), *([_shown(row[key]) for key in keys] for row in members)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
        for line in cells:
            padded = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return lines


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
