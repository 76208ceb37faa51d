"""Ctrl-C, and Ctrl-C again while the first is being handled: nothing is left behind."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import specrt
from specrt.cli import errors, main
from specrt.cli.chat import Conversation, talk
from specrt.engine.drafting import Drafting
from specrt.lab import measure
from tests.checkpoints import make_checkpoint
from tests.cli.test_cli import PROMPT, write_tokenizer
from tests.cli.test_cli_chat import console, conversation, messages

LOOKED_AT = ("/specrt/", "/contextlib.py", "/rich/")


class Presses:
    """The first Ctrl-C in the midst of a round, and one more at each call from there on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_rounds = self.num_more = 0
        self._observe = Drafting.observe
        monkeypatch.setattr(Drafting, "observe", lambda *given: self._round(*given))

    def first(self) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            sys.setprofile(self._look)

    def _round(self, *given: Any) -> None:
        self._observe(*given)
        self.num_rounds += 1
        if self.num_rounds == 3:
            self.first()

    def _look(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and any(part in frame.f_code.co_filename for part in LOOKED_AT):
            self.num_more += 1
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def presses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Presses]:
    before = signal.getsignal(signal.SIGINT), sys.getprofile()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Presses(monkeypatch)
    sys.setprofile(before[1])
    signal.signal(signal.SIGINT, before[0])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "letters"
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1, max_position_embeddings=64)
    write_tokenizer(path)
    return path


def whole_process(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """As the command line's own process has it."""
    monkeypatch.setattr("sys.argv", ["specrt", *args])
    try:
        return main()
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("command", ["generate", "stream", "chat", "bench", "distill-data"])
def test_two_leave_one_line_and_no_file(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: Path,
    tmp_path: Path,
    presses: Presses,
    command: str,
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    files = ("--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"))
    more = {
        "generate": ("generate", "--prompt", PROMPT),
        "stream": ("generate", "--prompt", PROMPT, "--stream"),
        "chat": ("chat",),
        "bench": ("bench", *files, "--drafter", "recycle"),
        "distill-data": ("distill-data", *files),
    }[command]
    code = whole_process(monkeypatch, *more, "--target", str(target), "--max-new-tokens", "30")
    captured = capsys.readouterr()
    lines = ["specrt: interrupted"]
    if command == "bench":
        lines.insert(0, "specrt: 0 of 1 measurements were made")
    assert (code, captured.err.splitlines()) == (130, lines)
    assert presses.num_more > 10
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
    # What comes until the process has ended is as if nobody had pressed anything.
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_one_does_not_cut_the_tables_short(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: Path,
    tmp_path: Path,
    presses: Presses,
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "abc")))
    real, calls = measure.compare, list[int]()

    def compare(*given: Any, **options: Any) -> Any:
        presses.num_rounds = 4  # no more in the midst of a round
        calls.append(1)
        if len(calls) == 2:
            presses.first()
        return real(*given, **options)

    monkeypatch.setattr(measure, "compare", compare)
    args = ("--target", str(target), "--prompts", str(prompts), "--out", str(out))
    more = ("--drafters", "recycle", "--max-new-tokens", "4", "--repeats", "1", "--warmup", "0")
    code = whole_process(monkeypatch, "bench", *args, *more)
    captured = capsys.readouterr()
    said = ["specrt: 1 of 2 measurements were made", "specrt: interrupted"]
    assert (code, captured.err.splitlines()) == (130, said)
    assert captured.out.splitlines()[-1].startswith("tau: mean of accept_length")
    assert len(out.read_text().splitlines()) == 1
    names = {"prompts.jsonl", "out.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_two_stop_one_answer_of_a_chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: Path,
    presses: Presses,
) -> None:
    """What was said is known, and the next question is answered."""
    engine = specrt.load(target, None, max_batch=1, progress=False)
    talked, add = conversation(engine), Conversation.add

    def add_and_rest(conversation: Conversation, question: str, answer: str) -> None:
        sys.setprofile(None)
        add(conversation, question, answer)

    monkeypatch.setattr(Conversation, "add", add_and_rest)
    written = console()

    def command() -> None:
        assert talk(talked, ["abc", "de"], written[0], is_terminal=True)

    assert errors.run(command) == 0
    assert presses.num_more > 10
    assert [len(said) for said in messages(talked)[::2]] == [3, 2]
    assert [bool(said) for said in messages(talked)] == [True] * 4
    assert "stopped after" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_interrupts_goes_on_ignoring_them(presses: Presses) -> None:
    """A shell's job in the background; and a handler of somebody's own stays."""
    handlers: tuple[Any, ...] = (signal.SIG_IGN, lambda number, frame: None)
    for handler in handlers:
        signal.signal(signal.SIGINT, handler)
        assert errors.run(lambda: signal.raise_signal(signal.SIGINT), is_last=True) == 0
        assert signal.getsignal(signal.SIGINT) is handler


def test_each_of_several_that_were_handled_is_one(presses: Presses) -> None:
    """Only those that come in the midst of handling are passed over."""
    came = list[int]()

    def command() -> None:
        for number in range(3):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                came.append(number)
                try:
                    raise OSError
                except OSError:
                    signal.raise_signal(signal.SIGINT)

    assert errors.run(command) == 0
    assert came == [0, 1, 2]
