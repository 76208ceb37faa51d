"""A server of ours as a process of its own, and what /proc says of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.http_client import Address

_TICKS = os.sysconf("SC_CLK_TCK")
_START_SECONDS, _STOP_SECONDS = 120.0, 30.0


@dataclass(frozen=True)
class Held:
    """What a process holds at some moment."""

    resident_kb: int
    files: int
    threads: int
    cpu_seconds: float
    """Of all its threads, since it began."""
    main_seconds: float
    """Of its first thread: of a server's event loop."""


def held_by(pid: int) -> Held:
    """As /proc says (Linux)."""
    folder = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    return Held(
        resident_kb=int(status["VmRSS"].split()[0]),
        files=len(list((folder / "fd").iterdir())),
        threads=int(status["Threads"]),
        cpu_seconds=_cpu_seconds(folder / "stat"),
        main_seconds=_cpu_seconds(folder / "task" / str(pid) / "stat"),
    )


def _cpu_seconds(stat: Path) -> float:
    """User and system time, fields 14 and 15; the name in parentheses may hold spaces."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Served:
    """``specrt serve``, from ``with`` to its end.

    Args:
        target: as the command takes it.
        options: further options of the command.
        threads: of the server's kernels.
        env: further environment.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of what it wrote.
    """

    def __init__(
        self,
        target: str,
        options: Sequence[str] = (),
        *,
        threads: int = 2,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.address = Address("127.0.0.1", free_port())
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        place = ["--host", self.address.host, "--port", str(self.address.port)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "specrt", "serve", target, *place, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **(env or {})},
            )

    def __enter__(self) -> Served:
        end = time.monotonic() + _START_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                log = self.log()
                self.stop()
                raise RuntimeError(f"specrt serve did not start:\n{log}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        """Of the OpenAI routes."""
        return f"http://{self.address.host}:{self.address.port}/v1"

    def held(self) -> Held:
        """What it holds now."""
        return held_by(self.process.pid)

    def log(self, most: int = 4000) -> str:
        """The end of what it wrote."""
        return self._log.read_bytes()[-most:].decode(errors="replace")

    def stop(self) -> int:
        """SIGTERM, then SIGKILL where that ends nothing; its exit status. Its log goes too."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        status = self.process.wait()
        self._folder.cleanup()
        return status

    def _is_up(self) -> bool:
        url = f"http://{self.address.host}:{self.address.port}/health"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])
