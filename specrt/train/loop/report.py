"""What a person sees of a running training: a bar or lines on stderr, and TensorBoard's curves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_SECONDS = 30.0


class Reporter:
    """Shows progress; does nothing in any process but the main one.

    Args:
        is_main: whether this process shows anything.
        log_dir: where TensorBoard's files go, None for no curves.
        console: on stderr by default. Where it is no terminal, a line now and then takes the place
            of the bar.
    """

    def __init__(
        self, is_main: bool, log_dir: Path | None = None, console: Console | None = None
    ) -> None:
        self._is_main = is_main
        self._console = console or Console(stderr=True)
        self._log_dir = log_dir if is_main else None
        self._bar: Progress | None = None
        self._writer: Any = None
        self._last_line = 0.0

    def start(self, step: int, total: int) -> None:
        """Begin, or take up, a run of ``total`` steps at ``step``."""
        if not self._is_main:
            return
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=self._console)
            self._bar.start()
            self._bar.add_task("training", total=total, completed=step)
        if self._log_dir is not None:
            self._writer = self._make_writer(self._log_dir, step)

    def update(self, step: int, total: int, values: Mapping[str, float] | None) -> None:
        """Show that ``step`` steps are done; ``values`` when it is time to log them."""
        if not self._is_main:
            return
        text = "" if values is None else _described(values)
        if self._bar is not None:
            described = f"step {step}/{total} {text}" if text else None
            self._bar.update(self._bar.task_ids[0], completed=step, description=described)
        elif values is not None and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{total} {text}")
        if self._writer is not None and values is not None:
            try:
                for name, value in values.items():
                    self._writer.add_scalar(f"train/{name}", value, step)
            except OSError as error:  # a full disk, which training may well survive
                self._writer = None
                self.say(f"no more curves: {self._log_dir}: {error.strerror}")

    def say(self, line: str) -> None:
        """One line."""
        if self._is_main:
            self._console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._bar = self._writer = None

    def _make_writer(self, log_dir: Path, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no curves: tensorboard is not installed (pip install 'specrt[train]')")
            return None
        try:
            return SummaryWriter(str(log_dir), purge_step=step or None)
        except OSError as error:
            self.say(f"no curves: {log_dir}: {error.strerror}")
            return None


def _described(values: Mapping[str, float]) -> str:
    tops = [
        f"{name.removesuffix('top1')}top-1 {value:.3f}"
        for name, value in values.items()
        if name.endswith("top1")
    ]
    speed = f"{values['tokens_per_second']:.0f} tokens/s"
    return f"loss {values['loss']:.4f} {' '.join(tops)} {speed}"
