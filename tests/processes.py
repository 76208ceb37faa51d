"""Of processes that tests start."""

from __future__ import annotations

import time
from pathlib import Path


def ends(pid: int, seconds: float = 20) -> bool:
    """Whether it is gone within that time; a zombie that nobody here collects is."""
    end = time.monotonic() + seconds
    while not _has_ended(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
