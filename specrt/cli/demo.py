"""``specrt demo``: plain decoding and speculation side by side.

Both are measured first, one at a time and with nothing drawn; what is shown afterwards is a replay
of recorded rounds, slowed down where the model is too fast to watch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from specrt.cli.bench_report import TAU
from specrt.cli.demo_prompts import CHAT_PROMPTS, PROMPTS
from specrt.cli.errors import FAILED
from specrt.targets import BUILTIN

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.prompts import Prompt
    from specrt.lab.measure import Comparison, Measurement
    from specrt.sampling import SamplingParams

ACCEPTED = "bold green"
_PLAIN_SECONDS = 4.0  # what watching the slower contender should take
_FRAME_SECONDS = 0.05
_FRAME_WIDTH = 4  # a panel's border and padding


@dataclass(frozen=True)
class Piece:
    """One token's text in the replay."""

    time: float
    """Seconds after the start when its round ended."""
    text: str
    is_accepted: bool
    """The drafter had proposed it."""


def run(
    engine: Engine,
    drafter: str,
    prompt: str | None,
    sampling: SamplingParams,
    target: str = BUILTIN,
) -> None:
    """Measure and show the demo's prompts, or the one given.

    Args:
        engine: whose target gets messages, if it is one that chats.
        drafter: its name.
        prompt: in place of the demo's own.
        sampling: of all of them.
        target: its name.

    Raises:
        typer.Exit: with code 1 if speculation's tokens were not plain decoding's.
    """
    from specrt.lab.measure import PLAIN, compare, without_drafter

    engines = {PLAIN: without_drafter(engine), drafter: engine}
    is_chat = target != BUILTIN and engine.tokenizer.inner.chat_template is not None
    shown = CHAT_PROMPTS if is_chat else PROMPTS
    if prompt is not None:
        shown = (("your prompt", prompt),)
    console = Console(highlight=False, markup=False, emoji=False)
    _print_header(console, engine, drafter, sampling, target)
    comparisons: list[Comparison] = []
    for number, (title, text) in enumerate(shown, start=1):
        console.rule(Text(f"{number}. {title}", style="bold"), align="left")
        console.print(Text(text.rpartition("\n\n")[2], style="dim"), soft_wrap=False)
        # Drawn once: no refreshing that would take time from what is measured.
        with Live("measuring …", console=console, auto_refresh=False, transient=True):
            said: Prompt = [{"role": "user", "content": text}] if is_chat else text
            comparison = compare(engines, said, sampling)
            pieces = {
                name: _record(engines[name], said, sampling, measured)
                for name, measured in comparison.measurements.items()
            }
        comparisons.append(comparison)
        if console.is_terminal:
            _replay(console, pieces, comparison)
        _print_outcome(console, pieces, comparison, drafter)
    _print_summary(console, comparisons, drafter)
    if not all(comparison.is_equal(drafter) for comparison in comparisons):
        raise typer.Exit(FAILED)


def _record(
    engine: Engine, prompt: Prompt, sampling: SamplingParams, measured: Measurement
) -> list[Piece]:
    """Run once more, noting what each round gave; times are scaled to those measured."""
    from specrt.engine.stop import TextTracker

    tokenizer = engine.tokenizer
    tracker = TextTracker(tokenizer.decode, engine.encode(prompt), tokenizer.special_tokens)
    pieces: list[Piece] = []
    started = time.perf_counter()
    with closing(engine.stream(prompt, sampling)) as chunks:
        for chunk in chunks:
            now = time.perf_counter() - started
            for index, token in enumerate(chunk.token_ids):
                pieces.append(Piece(now, tracker.push(token), index < chunk.num_accepted))
    scale = median(measured.seconds) / pieces[-1].time
    rest = Piece(pieces[-1].time, tracker.flush(), pieces[-1].is_accepted)
    return [Piece(p.time * scale, p.text, p.is_accepted) for p in (*pieces, rest)]


# --- on a terminal --------------------------------------------------------------------------------


def _replay(
    console: Console, pieces: Mapping[str, Sequence[Piece]], comparison: Comparison
) -> None:
    """Show the rounds of all contenders as if they ran at once, at the measured pace."""
    longest = max(median(m.seconds) for m in comparison.measurements.values())
    slowdown = max(1.0, _PLAIN_SECONDS / longest)
    started = time.perf_counter()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        elapsed = 0.0
        while elapsed <= longest:
            elapsed = (time.perf_counter() - started) / slowdown
            frame = _panels(console, pieces, comparison, elapsed)
            note = f"replay of the measured rounds, {slowdown:.0f}x slower"
            frame.caption = note if slowdown > 1 else "replay of the measured rounds"
            live.update(frame, refresh=True)
            time.sleep(_FRAME_SECONDS)


def _panels(
    console: Console,
    pieces: Mapping[str, Sequence[Piece]],
    comparison: Comparison,
    elapsed: float,
) -> Table:
    width = console.width // len(pieces) - _FRAME_WIDTH
    # As high as it will get, so that nothing below moves; but never higher than the screen.
    longest = max(len(_text(those).wrap(console, width)) for those in pieces.values())
    height = max(1, min(longest, console.height - 5))
    grid = Table.grid(expand=True)
    panels = []
    for name, those in pieces.items():
        grid.add_column(ratio=1)
        known = [piece for piece in those if piece.time <= elapsed]
        measured = comparison.measurements[name]
        seconds = min(elapsed, median(measured.seconds))
        is_done = len(known) == len(those)
        count = measured.num_tokens if is_done else len(known)
        panels.append(
            Panel(
                _tail(_text(known), console, width, height),
                height=height + 2,
                title=f"{name} {'✓' if is_done else ''}".strip(),
                subtitle=f"{count} tokens in {1e3 * seconds:.0f} ms",
                border_style="green" if is_done else "dim",
                title_align="left",
                subtitle_align="right",
            )
        )
    grid.add_row(*panels)
    return grid


def _tail(text: Text, console: Console, width: int, height: int) -> Text:
    """The last lines, where there are more than fit."""
    return Text("\n").join(text.wrap(console, width)[-height:])


def _text(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(piece.text, style=ACCEPTED if piece.is_accepted else "")
    return text


# --- in either case -------------------------------------------------------------------------------


def _print_header(
    console: Console, engine: Engine, drafter: str, sampling: SamplingParams, target: str
) -> None:
    from specrt.cli.info import machine_of

    config = engine.target.config
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    if sampling.temperature > 0:
        how += f", seed {sampling.seed}"
    console.print(Text(f"specrt demo: plain decoding against {drafter}, {how}", style="bold"))
    console.print(
        f"{'bundled model' if target == BUILTIN else target}: {config.num_layers} layers of "
        f"{config.hidden_size}, vocabulary {config.vocab_size}, {engine.target.weights.form}; "
        f"{machine_of(engine.target.device)}"
    )
    console.print(
        "Each is timed alone and warm, with nothing drawn meanwhile: median of 3 runs, the "
        "prompt's own pass included."
    )
    if (said := legend(console)) is not None:
        console.print(said)


def legend(console: Console) -> Text | None:
    """What accepted tokens look like there; None where nothing has a look."""
    if not console.is_terminal or console.color_system is None:
        return None
    look = "bold" if console.no_color else "green"
    return Text.assemble((look, ACCEPTED), " tokens: drafted, then accepted")


def _print_outcome(
    console: Console,
    pieces: Mapping[str, Sequence[Piece]],
    comparison: Comparison,
    drafter: str,
) -> None:
    console.print(_text(pieces[drafter]))
    plain, other = comparison.measurements.values()
    console.print()
    console.print(_table([comparison], drafter))
    equal, total = comparison.num_equal(drafter), plain.num_tokens
    if comparison.is_equal(drafter):
        console.print(Text(f"equal: {equal} of {total} tokens", style="bold green"))
    else:
        was = f"{other.num_tokens} tokens against {total}"
        console.print(
            Text(f"NOT EQUAL: only the first {equal} tokens agree ({was})", style="bold red")
        )
    console.print()


def _table(comparisons: Sequence[Comparison], drafter: str) -> Table:
    """A row for each contender: sums over the comparisons."""
    from specrt.lab.measure import summarise

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for column in ("tokens", "time", "tokens/s", "speed-up", "tau"):
        table.add_column(column, justify="right")
    for name in comparisons[0].measurements:
        summary = summarise(name, comparisons)
        table.add_row(
            Text(name),
            str(summary.num_tokens),
            f"{1e3 * summary.seconds:.0f} ms",
            f"{summary.tokens_per_second:.0f}",
            f"{summary.speedup:.2f}x",
            f"{summary.tau:.2f}",
            style="bold" if name == drafter else "",
        )
    return table


def _print_summary(console: Console, comparisons: Sequence[Comparison], drafter: str) -> None:
    if len(comparisons) > 1:
        console.rule(Text("all together", style="bold"), align="left")
        console.print(_table(comparisons, drafter))
        equal = sum(comparison.num_equal(drafter) for comparison in comparisons)
        total = sum(c.measurements[drafter].num_tokens for c in comparisons)
        console.print(f"equal: {equal} of {total} tokens")
    console.print(TAU)
