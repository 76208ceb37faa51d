"""``specrt chat``: a conversation in a terminal, or with the lines of a pipe.

Every turn runs the whole conversation as its prompt: an engine keeps no keys and values of requests
that have ended.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from specrt.cli.demo import ACCEPTED, legend
from specrt.cli.errors import USER_ERROR, report

if TYPE_CHECKING:
    from specrt.engine.engine import Engine
    from specrt.engine.results import GenerationResult, StreamChunk
    from specrt.sampling import SamplingParams

HELP = "/reset forgets what was said, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"
_RESET, _QUIT = "/reset", "/quit"
_ROOM = 4  # of the context a quarter at most is kept free for an answer


class Conversation:
    """What was said, and as much of it as the model's context takes.

    Args:
        engine: whose target has a chat template.
        sampling: of every answer.
        system: what the model is told first; None: nothing, or what its template says by itself.

    Raises:
        ValueError: its target is none that chats.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams, system: str | None = None) -> None:
        if engine.tokenizer.inner.chat_template is None:
            raise ValueError("target: expected a model that chats, got one without a chat template")
        self.engine, self.sampling = engine, sampling
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._said: list[dict[str, str]] = []

    @property
    def num_turns(self) -> int:
        """Questions that are still known, each with its answer."""
        return len(self._said) // 2

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self._said.clear()

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question behind what was said before.

        Where the context is too short for that and an answer, the oldest turns are forgotten.

        Raises:
            ValueError: the template refuses it, or it fills the context by itself; nothing is
                forgotten then.
        """
        limit = self.engine.target.config.max_positions
        room = min(self.sampling.max_new_tokens or limit, limit // _ROOM)
        for start in range(0, len(self._said) + 1, 2):
            messages = [*self._system, *self._said[start:], {"role": "user", "content": question}]
            ids = self.engine.encode(messages)
            is_last = start == len(self._said)
            if len(ids) + (1 if is_last else room) <= limit:
                del self._said[:start]
                return ids
        raise ValueError(
            f"message: {len(ids)} tokens with its frame fill the model's context of {limit}"
        )

    def add(self, question: str, answer: str) -> None:
        """Keep a turn."""
        self._said += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


@dataclass
class Answer:
    """An answer as it comes."""

    text: str = ""
    num_tokens: int = 0
    result: GenerationResult | None = None
    """None until it is over, and of one that was stopped."""
    seconds: float = 0.0
    """Until it was over, the prompt's pass included."""

    def statistics(self) -> str:
        """A line for people; of one that was stopped what can be said."""
        if self.result is None:
            return f"stopped after {self.num_tokens} tokens"
        stats, prompt = self.result.stats, len(self.result.prompt_token_ids)
        rate = self.num_tokens / max(1e-9, self.seconds - stats.prefill_ms / 1e3)
        line = (
            f"{self.num_tokens} tokens, {rate:.0f} tokens/s, tau {stats.tau:.2f}; "
            f"prompt of {prompt} tokens in {stats.prefill_ms:.0f} ms"
        )
        ends = {"length": "cut off by --max-new-tokens", "context": "the model's context is full"}
        end = ends.get(self.result.finish_reason)
        return line if end is None else f"{line}; {end}"


@dataclass
class Painter:
    """Gives an answer's text the look of those who proposed its tokens.

    Text may come later than its tokens do: what could begin a stop string waits.
    """

    engine: Engine
    prompt_ids: list[int]
    _runs: deque[tuple[int, str]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        from specrt.engine.stop import TextTracker

        tokenizer = self.engine.tokenizer
        self._tracker = TextTracker(tokenizer.decode, self.prompt_ids, tokenizer.special_tokens)

    def paint(self, chunk: StreamChunk) -> Text:
        """A chunk's text; accepted draft tokens have a style."""
        for index, token in enumerate(chunk.token_ids):
            style = ACCEPTED if index < chunk.num_accepted else ""
            self._runs.append((len(self._tracker.push(token)), style))
        text, begin, style = Text(), 0, ""
        while begin < len(chunk.text):
            length, style = self._runs.popleft() if self._runs else (len(chunk.text), style)
            piece = chunk.text[begin : begin + length]
            text.append(piece, style=style)
            begin += len(piece)
            if len(piece) < length:
                self._runs.appendleft((length - len(piece), style))
        return text


def run(conversation: Conversation) -> None:
    """Talk until the input ends.

    Raises:
        typer.Exit: with code 2 at the end of a pipe one of whose lines had no answer.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    is_terminal = sys.stdin.isatty() and console.is_terminal
    if is_terminal:
        console.print(Text(HELP, style="dim"))
        if (said := legend(console)) is not None:
            console.print(said)
    lines = _typed() if is_terminal else iter(sys.stdin)
    is_good = talk(conversation, lines, console, is_terminal=is_terminal)
    if not (is_good or is_terminal):
        raise typer.Exit(USER_ERROR)


def talk(
    conversation: Conversation, lines: Iterable[str], console: Console, *, is_terminal: bool
) -> bool:
    """Answer lines; what is no answer goes to stderr. Whether all of them were answered.

    Raises:
        KeyboardInterrupt: Ctrl-C, where nobody types; else it stops an answer and no more.
    """
    notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    is_good = True
    for line in lines:
        said = line.strip()
        if said == _QUIT:
            break
        if said == _RESET:
            conversation.reset()
        elif said.startswith("/") and len(said.split()) == 1:
            notes.print(Text(HELP, style="dim"))
        elif said:
            try:
                is_good &= _turn(conversation, said, console, notes, is_terminal=is_terminal)
            except ValueError as error:  # a template's, or of a message that is too long
                report(str(error))
                is_good = False
    return is_good


def _turn(
    conversation: Conversation,
    question: str,
    console: Console,
    notes: Console,
    *,
    is_terminal: bool,
) -> bool:
    """One question and its answer. Whether there was one."""
    num_turns = conversation.num_turns
    prompt_ids = conversation.prompt(question)
    if (forgotten := num_turns - conversation.num_turns) > 0:
        turns = "turn" if forgotten == 1 else f"{forgotten} turns"
        notes.print(Text(f"the context is full: the oldest {turns} forgotten", style="dim"))
    answer = Answer()
    try:
        _say(conversation, prompt_ids, answer, console)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        # In here, where one more Ctrl-C does not cut it short.
        return _end_turn(conversation, question, answer, console, notes)
    return _end_turn(conversation, question, answer, console, notes)


def _end_turn(
    conversation: Conversation, question: str, answer: Answer, console: Console, notes: Console
) -> bool:
    console.print()
    if answer.result is not None and answer.result.error is not None:
        report(answer.result.error)
        return False
    notes.print(Text(answer.statistics(), style="dim"))
    if answer.text:
        conversation.add(question, answer.text)
    return True


def _say(
    conversation: Conversation, prompt_ids: list[int], answer: Answer, console: Console
) -> None:
    engine = conversation.engine
    painter, started = Painter(engine, prompt_ids), time.perf_counter()
    with closing(engine.stream(prompt_ids, conversation.sampling)) as chunks:
        for chunk in chunks:
            answer.num_tokens += len(chunk.token_ids)
            answer.text += chunk.text
            console.print(painter.paint(chunk), end="")
            answer.result = chunk.result
    answer.seconds = time.perf_counter() - started


def _typed() -> Iterator[str]:
    """Lines as a user types them, until Ctrl-D; Ctrl-C begins a line anew."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then has a history, and arrows move
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
