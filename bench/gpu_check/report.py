"""The summary of a stage: a file rewritten after each command, a table, and one archive of it all.

An interruption, even a kill, leaves what was known until then.
"""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check.judge import CUT, FAILED, OK, PARTIAL, SKIPPED, Verdict, printable

_SHOWN_DETAIL = 130
_KEPT_DETAIL = 2000
_PACKED_BYTES = 8 << 20
"""Of a file: of a longer one the archive, which is made after every command, has the end."""
_BAD = (FAILED, CUT)
Row = dict[str, Any]


@dataclass
class Report:
    """Of one stage."""

    path: Path
    """Of the summary; the benchmarks' results lie beside it."""
    head: Mapping[str, Any]
    order: Sequence[str]
    """Names of the stage's commands."""
    logs: Path
    archive: Path | None = None
    earlier: Sequence[Row] = ()
    """Rows of an earlier run that are not run again."""
    other_logs: Sequence[Path] = ()
    """Folders of the other stages' logs, which the archive has too."""
    rows: list[Row] = field(default_factory=list)
    begun: set[str] = field(default_factory=set)
    """Names of the commands that were started."""
    started: float = field(default_factory=time.monotonic)
    is_interrupted: bool = False

    def add(self, command: str, verdict: Verdict, seconds: float) -> None:
        status, detail = verdict
        row = {"command": command, "status": status, "seconds": round(seconds, 1)}
        self.rows.append(row | {"detail": detail[:_KEPT_DETAIL]})
        self.try_write()

    def try_write(self) -> None:
        """As :meth:`write`; a disk that is full ends no run: the table is still printed."""
        try:
            self.write()
        except OSError as error:
            print(f"gpu-check: the results are not written: {error}", flush=True)

    def write(self) -> None:
        """The summary, and the archive with what lies beside it.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **self.head,
            "seconds": round(time.monotonic() - self.started, 1),
            "outcome": self.outcome,
            "left_out": self.left_out,
            "commands": self.all_rows,
        }
        whole = self.path.with_suffix(".json.new")
        whole.write_text(json.dumps(result, indent=2) + "\n")
        whole.replace(self.path)
        if self.archive:
            others = [folder for folder in self.other_logs if folder != self.logs]
            pack(self.archive, [self.path.parent, self.logs, *others])

    @property
    def all_rows(self) -> list[Row]:
        """In the stage's order, with those of the earlier run."""
        found = {row["command"]: row for row in (*self.earlier, *self.rows)}
        return [found[name] for name in self.order if name in found]

    @property
    def left_out(self) -> list[str]:
        """What has no result: for want of time, of a tool, or because the run ended."""
        known = {row["command"]: row for row in self.all_rows}
        waiting = [
            f"{name}: {'interrupted' if name in self.begun else 'not reached'}"
            for name in self.order
            if name not in known
        ]
        cut = [f"{n}: {r['detail']}" for n, r in known.items() if r["status"] in (CUT, SKIPPED)]
        return cut + waiting

    @property
    def has_passed(self) -> bool:
        return self.outcome in ("passed", "PARTIAL")

    @property
    def outcome(self) -> str:
        """In a word; PARTIAL if nothing failed, but not all was looked at."""
        states = {row["status"] for row in self.all_rows}
        if self.is_interrupted:
            return "INTERRUPTED"
        if states & set(_BAD) or len(self.all_rows) < len(self.order):
            return "FAILED"
        return "PARTIAL" if PARTIAL in states else "passed"

    def table(self) -> str:
        """Fixed columns, one line a command."""
        lines = [f"{'command':18}{'status':9}{'seconds':>8}  detail"]
        for row in self.all_rows:
            detail = printable(" ".join(row["detail"].split()))[:_SHOWN_DETAIL]
            again = f" (earlier run, {row['earlier']['date'][:16]})" if "earlier" in row else ""
            lines.append(
                f"{row['command']:18}{row['status']:9}{row['seconds']:8.1f}  {detail}{again}"
            )
        return "\n".join(lines)


def facts_found(folder: Path, since: str) -> list[str]:
    """What results in ``folder`` say in words, of those made since that ISO date and time."""
    found: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            if result["environment"]["date"] >= since:
                found += map(str, result["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another kind of file
    return found


def passed_before(path: Path, device: str | None) -> list[Row]:
    """The rows of an earlier summary that need not be run again, each with what it is of.

    Args:
        path: of the summary.
        device: this GPU's name; None without one.

    Raises:
        SystemExit: there is none, it is not one, or it is another GPU's.
    """
    try:
        summary = json.loads(path.read_text())
        origin = {"earlier": {name: summary[name] for name in ("commit", "date")}}
        found = (summary["gpu"] or {}).get("device")
        rows = [origin | row for row in summary["commands"] if row["status"] in (OK, PARTIAL)]
    except FileNotFoundError:
        raise SystemExit(f"gpu-check: --only-failed: no earlier run in {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"gpu-check: --only-failed: {path} is no summary: {error!r}") from None
    if found != device:
        raise SystemExit(f"gpu-check: --only-failed: {path} is of {found}, this is {device}")
    return rows


def pack(archive: Path, folders: Sequence[Path]) -> None:
    """What lies in ``folders`` (not in their subfolders), as one ``.tar.gz``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    whole = archive.with_name(archive.name + ".new")
    with tarfile.open(whole, "w:gz", compresslevel=6) as tar:
        for folder in folders:
            for path in sorted(folder.glob("*")):
                if path.is_file() and path not in (archive, whole):
                    _add_end(tar, path, f"{folder.name}/{path.name}")
    whole.replace(archive)


def _add_end(tar: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb") as file:
        entry = tar.gettarinfo(arcname=name, fileobj=file)
        kept = min(entry.size, _PACKED_BYTES)
        file.seek(entry.size - kept)
        entry.size = kept
        tar.addfile(entry, file)
