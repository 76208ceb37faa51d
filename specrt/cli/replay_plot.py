"""The picture of ``specrt replay``: regret as it grows, and speed-ups."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from specrt.lab.replay import Replay

_SUFFIXES = (".png", ".svg")
_WIDTH, _HEIGHT = 6.4, 4.0  # inches a panel


def check(file: str) -> None:
    """Whether a picture can be written; before anything that takes time.

    Raises:
        ValueError: the name has another ending, its folder or matplotlib is missing.
    """
    if Path(file).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"plot: expected a name in {' or '.join(_SUFFIXES)}, got {file!r}")
    if not Path(file).parent.is_dir():
        raise ValueError(f"plot: expected a folder to write into, got {file!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("plot: needs matplotlib: pip install 'specrt[plot]'")


def save(file: str, result: Replay, shown: Sequence[str]) -> None:
    """One panel a task with the regret curves, and one with all speed-ups.

    Args:
        file: ``.png`` or ``.svg``.
        result: of the replay.
        shown: controllers, in order; fixed lengths are drawn in grey.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    num_panels = len(result.tasks) + 1
    figure = Figure(figsize=(_WIDTH, _HEIGHT * num_panels), layout="constrained")
    panels = figure.subplots(num_panels, squeeze=False)[:, 0]
    for panel, task in zip(panels, result.tasks, strict=False):
        _draw_regret(panel, result, shown, task)
    _draw_speedups(panels[-1], result, shown)
    tasks = panels[-1].get_legend_handles_labels()
    figure.legend(*tasks, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(file, dpi=150)


def _draw_regret(axes: Axes, result: Replay, shown: Sequence[str], task: str) -> None:
    for name in shown:
        tokens, lost = result.regret_curve(name, task)
        if name in result.fixed:
            axes.plot(tokens, lost, color="0.75", linewidth=0.8)
            axes.annotate(name, (tokens[-1], lost[-1]), color="0.5", fontsize=6)
        else:
            axes.plot(tokens, lost, label=name)
    axes.margins(x=0.1)  # room for the names at the curves' ends
    axes.set_title(f"{task}: time lost against {result.best_fixed(task)}", fontsize=10)
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")
    if any(name not in result.fixed for name in shown):
        axes.legend(fontsize=7)


def _draw_speedups(axes: Axes, result: Replay, shown: Sequence[str]) -> None:
    tasks = result.task_names()
    thickness = 0.8 / len(tasks)
    for number, task in enumerate(tasks):
        places = [row + number * thickness for row in range(len(shown))]
        speedups = [result.speedup(name, task) for name in shown]
        axes.barh(places, speedups, height=thickness, label=task)
    axes.axvline(1.0, color="0.5", linewidth=0.8)
    axes.set_yticks([row + 0.4 - thickness / 2 for row in range(len(shown))], shown, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over plain decoding (modelled)")
