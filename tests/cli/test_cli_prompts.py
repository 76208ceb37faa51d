"""Files of prompts: their forms, the parameters of a line, and what is refused by its name."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specrt.cli.demo import legend
from specrt.cli.prompts import own_sampling, read_prompts
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.cli.test_cli import expect_one_line, generate_json, run, write_tokenizer

HI = [{"role": "user", "content": "hi"}]
YO = {"role": "assistant", "content": "yo"}


def read(path: Path, *lines: dict[str, Any], is_chat: bool = False) -> list[Any]:
    file = path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return read_prompts(None, str(file), is_jsonl=False, is_chat=is_chat)


@pytest.mark.parametrize(
    ("line", "prompt", "as_chat"),
    [
        ({"prompt": "hi"}, "hi", HI),
        ({"prompt": [1, 2]}, [1, 2], [1, 2]),
        ({"prompt": HI, "completion": [YO]}, HI, HI),
        ({"messages": HI}, HI, HI),
        ({"messages": [{"from": "human", "value": "hi"}]}, HI, HI),
        ({"conversations": [{"from": "human", "value": "hi"}, YO]}, HI, HI),
        ({"prompt_token_ids": [1, 2]}, [1, 2], [1, 2]),
        ({"prompt": "hi", "response": "x", "prompt_ids": [5], "response_ids": [6]}, [5], [5]),
        ({"question_id": 81, "category": "x", "turns": ["hi", "b"], "reference": []}, "hi", HI),
        ({"question": "hi", "answer": "x"}, "Question: hi\nAnswer:", HI),
        ({"instruction": "hi", "input": "", "output": "x"}, HI, HI),
        ({"task_id": "HumanEval/0", "prompt": "hi", "entry_point": "f", "test": "t"}, "hi", HI),
        ({"prompt": "hi", "question": "its source"}, "hi", HI),
        ({"prompt": "hi", "metadata": {"temperature": 1}, "temperature": None}, "hi", HI),
    ],
)
def test_forms(line: dict[str, Any], prompt: Any, as_chat: Any, tmp_path: Path) -> None:
    (plain,), (chat,) = read(tmp_path, line), read(tmp_path, line, is_chat=True)
    assert (plain.prompt, chat.prompt) == (prompt, as_chat)
    assert plain.options == chat.options == {}


def test_several_turns_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, {"turns": ["a", "b"]}, {"turns": ["a"]}, {"prompt": "a"})
    file = tmp_path / "p.jsonl"
    note = f"specrt: {file}: several turns in 1 of 3 prompts; the first is asked\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", None])
def test_arrays_and_single_objects(
    name: str | None, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"prompt": "a"}
    for content, expected in (([one, {"prompt": "b"}], ["a", "b"]), (one, ["a"])):
        text = json.dumps(content, indent=indent)
        if name is not None:
            (tmp_path / name).write_text(text)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        file = None if name is None else str(tmp_path / name)
        prompts = read_prompts(None, file, is_jsonl=name is None, is_chat=False)
        assert [found.prompt for found in prompts] == expected


def test_a_lines_own_parameters(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "temperature": 0.5, "logit_bias": {"5": -1}, "id": 7}]
    given = SamplingParams(max_new_tokens=9, seed=3)
    own = SamplingParams(max_new_tokens=9, seed=3, temperature=0.5, logit_bias={5: -1})
    assert own_sampling(read(tmp_path, *lines), given) == [given, own]
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: temperature: expected .*got 'warm'"):
        own_sampling(read(tmp_path, lines[0], {"prompt": "b", "temperature": "warm"}), given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "temprature": 1}, "temprature: no sampling option; expected temperature "),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens: no sampling option; expected max_new_tok"),
        ({"prompt": "a", "tools": []}, "tools: no sampling option"),
        ({"prompt": "a", "system": "x"}, "system: no sampling option"),
        ({"prompt": "a", "messages": HI}, "expected an object with one of .*prompt, messages$"),
        ({"text": "a", "id": 1}, "expected an object with one of .*; got text, id"),
        ({}, "expected an object with one of .*; got no keys"),
        ({"prompt": 5}, '"prompt": expected text or a list, got int'),
        ({"messages": "a"}, '"messages": expected a list, got str'),
        ({"turns": []}, '"turns": expected a list of texts'),
        ({"turns": [["a"]]}, '"turns": expected a list of texts'),
        ({"conversations": [5]}, '"conversations", turn 1: expected an object'),
    ],
)
def test_a_bad_line_is_named(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"p\.jsonl, line 2: {message}"):
        read(tmp_path, {"prompt": "fine"}, line)


# --- through the commands -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, num_hidden_layers=1, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return str(path)


def test_generate_and_bench_heed_a_lines_parameters(
    capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ab", "max_new_tokens": 3}\n{"prompt": "ab", "ignore_eos": true}\n')
    args = ("--target", target, "-f", str(file), "--max-new-tokens", "5", "--max-batch", "1")
    results = generate_json(capsys, *args)
    assert [len(result["token_ids"]) for result in results] == [3, 5]  # type: ignore[arg-type]
    *_, last = generate_json(capsys, *args, "--stream")
    assert last["token_ids"] == results[1]["token_ids"]
    bench = ("bench", "--target", target, "--prompts", str(file), "--max-new-tokens", "5")
    code, out, _ = run(capsys, *bench, "--repeats", "1", "--json")
    assert code == 0
    prompts = json.loads(out)["prompts"]
    told = [one["num_tokens"] for prompt in prompts for one in prompt["drafters"].values()]
    assert told == [3, 5]


@pytest.mark.parametrize(
    "line", [{"prompt": "ab\ud83d"}, {"messages": [{"role": "user", "content": "\ud83d"}]}]
)
@pytest.mark.parametrize("command", ["generate", "bench", "distill-data"])
def test_half_a_character_names_its_line(
    capsys: pytest.CaptureFixture[str],
    target: str,
    tmp_path: Path,
    line: dict[str, Any],
    command: str,
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ab"}\n' + json.dumps(line))
    option = "-f" if command == "generate" else "--prompts"
    out = ("--out", str(tmp_path / "out.jsonl")) if command == "distill-data" else ()
    done = run(capsys, command, "--target", target, option, str(file), *out)
    expect_one_line(done, f"{file}, line 2: ")


def test_a_second_bos_is_said_once(
    capsys: pytest.CaptureFixture[str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: object, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if add_special_tokens:
            warnings.warn("two of them", stacklevel=2)
        return [5]

    monkeypatch.setattr("specrt.models.tokenizer.Tokenizer.encode", encode)
    args = ("generate", "--target", target, "--prompt", "ab", "--max-new-tokens", "1")
    assert run(capsys, *args)[2] == "specrt: prompt: two of them\n"
    assert run(capsys, *args, "--no-add-special-tokens")[2] == ""


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("generate", "--prompt", "a", "--jsonl"), "jsonl: goes with --file"),
        (("generate", "--prompt", "a", "--logprobs"), "logprobs: goes with --json"),
        (("generate", "--prompt", "a", "--stop-token-ids", "5;6"), "expected token ids"),
        (("bench", "--jsonl"), "jsonl: goes with --prompts"),
        (("bench", "--chat"), "chat: goes with --prompts"),
    ],
)
def test_options_that_would_say_nothing(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], named: str
) -> None:
    expect_one_line(run(capsys, *args), named)


def test_ids_with_commas(capsys: pytest.CaptureFixture[str], target: str) -> None:
    args = ("--target", target, "--prompt", "ab", "--top-k", "-1", "--ignore-eos")
    biased = ("--logit-bias", "35=100,36=50")
    (result,) = generate_json(capsys, *args, *biased, "--stop-token-ids", "40,35")
    assert result["token_ids"] == [35]


def test_h_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ((), ("generate",)):
        assert run(capsys, *args, "-h") == run(capsys, *args, "--help")


@pytest.mark.parametrize(
    ("terminal", "words"),
    [
        ({"force_terminal": True, "color_system": "standard"}, "green tokens"),
        ({"force_terminal": True, "color_system": "standard", "no_color": True}, "bold tokens"),
        ({"force_terminal": True, "color_system": None}, None),
        ({"force_terminal": False}, None),
    ],
)
def test_the_demo_names_the_look_that_can_be_seen(
    terminal: dict[str, Any], words: str | None
) -> None:
    said = legend(Console(file=io.StringIO(), **terminal))
    assert (said and said.plain.partition(":")[0]) == words
