"""``specrt distill-data``: the engine's own answers, kept whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import specrt
from specrt.cli import main
from specrt.cli.answers import AnswerFile
from specrt.models.tokenizer import load_tokenizer
from specrt.sampling import SamplingParams
from specrt.train.data.dataset import read_examples
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.cli.test_cli import expect_one_line, run, write_tokenizer

PROMPTS = ("to be or not to be", "abc", "what is 2+3?")
ANSWERS = ("--max-new-tokens", "12", "--threads", "1")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "letters"
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1, max_position_embeddings=64)
    write_tokenizer(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.jsonl", *({"prompt": text} for text in PROMPTS))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def distil(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path, *more: str
) -> tuple[str, str]:
    """Run the command into ``out.jsonl`` beside the prompts; what it says."""
    out = str(prompts.parent / "out.jsonl")
    args = ("--target", str(target), "--prompts", str(prompts), "--out", out)
    code, said, err = run(capsys, "distill-data", *args, *ANSWERS, *more)
    assert code == 0, err
    return said, err


def answers(prompts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prompts.parent / "out.jsonl").read_text().splitlines()]


def by_key(rows: list[dict[str, Any]]) -> dict[Any, Any]:
    return {(tuple(r["prompt_ids"]), r["temperature"], r["seed"]): r for r in rows}


MIXED = ("--temperature", "0", "--temperature", "1", "--samples-per-prompt", "2")


def test_answers_are_the_engines_own(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    said, err = distil(capsys, target, prompts, *MIXED, "--batch-size", "2")
    rows = answers(prompts)
    assert (len(rows), err) == (9, "")
    assert said.startswith(f"{prompts.parent / 'out.jsonl'}: 9 answers written")
    engine = specrt.load(target, None)
    for row in rows:
        sampling = SamplingParams(
            max_new_tokens=12, temperature=row["temperature"], seed=row["seed"]
        )
        result = engine.generate(row["prompt"], sampling)
        assert result.prompt_token_ids == row["prompt_ids"]
        assert result.token_ids == row["response_ids"]
        assert (result.text, result.finish_reason) == (row["response"], row["finish_reason"])
    assert sorted(row["temperature"] for row in rows) == [0.0] * 3 + [1.0] * 6
    assert len({row["seed"] for row in rows}) == 9  # or prompts would share their noise


def test_answers_may_be_those_of_bytes(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    distil(capsys, target, prompts, "--quantize", "int8")
    rows = answers(prompts)
    assert {row["run"]["weights"] for row in rows} == {"INT8"}
    engine = specrt.load(target, None, quantize="int8")
    sampling = SamplingParams(max_new_tokens=12)
    for row in rows:
        assert engine.generate(row["prompt"], sampling).token_ids == row["response_ids"]
    content = (prompts.parent / "out.jsonl").read_bytes()
    args = ("--target", str(target), "--prompts", str(prompts), *ANSWERS)
    out = ("--out", str(prompts.parent / "out.jsonl"))
    done = run(capsys, "distill-data", *args, *out)
    expect_one_line(done, "weights: ")
    assert (prompts.parent / "out.jsonl").read_bytes() == content


def test_answers_are_training_data(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    distil(capsys, target, prompts)
    out = prompts.parent / "out.jsonl"
    dataset = read_examples([out], load_tokenizer(target), max_length=64)
    for index, row in enumerate(answers(prompts)):
        token_ids, loss_mask = dataset[index]
        assert token_ids[loss_mask].tolist() == row["response_ids"]
        assert token_ids[~loss_mask].tolist() == row["prompt_ids"]


def test_a_rerun_makes_what_is_missing(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    distil(capsys, target, prompts, *MIXED)
    out, whole = prompts.parent / "out.jsonl", by_key(answers(prompts))
    content = out.read_bytes()
    assert "0 answers written" in distil(capsys, target, prompts, *MIXED)[0]
    assert out.read_bytes() == content
    lines = content.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # killed in the middle of a line
    said, _ = distil(capsys, target, prompts, *MIXED, "--drafter", "prompt-lookup")
    assert "5 answers written" in said and "4 were there" in said
    assert out.read_bytes().startswith(b"".join(lines[:4]))
    assert by_key(answers(prompts)) == whole


def test_an_answer_does_not_depend_on_the_other_prompts(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    distil(capsys, target, prompts, *MIXED, "--batch-size", "5")
    whole = by_key(answers(prompts))
    (prompts.parent / "out.jsonl").unlink()
    prompts.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    distil(capsys, target, prompts, *MIXED, "--batch-size", "1", "--num-prompts", "1")
    alone = by_key(answers(prompts))
    assert len(alone) == 3 and alone.items() <= whole.items()
    (prompts.parent / "out.jsonl").unlink()
    distil(capsys, target, prompts, "--temperature", "1", "--seed", "9")
    assert by_key(answers(prompts)).keys().isdisjoint(whole)


def test_a_bad_prompt_is_named_or_skipped(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    prompts.write_text(prompts.read_text() + '{"prompt": "cut \\ud83d"}\n')
    out = str(prompts.parent / "out.jsonl")
    args = ("--target", str(target), "--prompts", str(prompts), "--out", out)
    expect_one_line(run(capsys, "distill-data", *args), f'{prompts}, line 4: "prompt": expected')
    said, err = distil(capsys, target, prompts, "--skip-bad")
    assert "3 answers written" in said and "1 malformed lines skipped" in err


def test_repeated_empty_and_long_prompts_are_left_out_and_said(
    capsys: pytest.CaptureFixture[str], target: Path, tmp_path: Path
) -> None:
    texts = ("abc", "", "abc", "x" * 64, "x" * 63)
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": text} for text in texts))
    said, err = distil(capsys, target, prompts)
    assert "2 answers written" in said
    assert [row["finish_reason"] for row in answers(prompts)].count("context") == 1
    for line in (
        "1 empty prompts",
        "1 repeated prompts",
        "1 prompts skipped: they fill the target",
    ):
        assert line in err


def test_prompts_that_are_all_empty_are_refused(
    capsys: pytest.CaptureFixture[str], target: Path, tmp_path: Path
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": ""}, {"prompt": "", "response": "x"})
    out = str(tmp_path / "out.jsonl")
    args = ("--target", str(target), "--prompts", str(prompts), "--out", out, *ANSWERS)
    done = run(capsys, "distill-data", *args)
    expect_one_line(done, f"prompts: none in {prompts}: 2 read, 2 of them empty")


# --- ends -----------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_done(
    capsys: pytest.CaptureFixture[str],
    target: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, inner = prompts.parent / "out.jsonl", AnswerFile.write

    def interrupted(file: AnswerFile, *answer: Any) -> None:
        inner(file, *answer)
        if len(file.done) == 2:
            raise KeyboardInterrupt

    args = ("--target", str(target), "--prompts", str(prompts), "--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", interrupted)
        done = run(capsys, "distill-data", *args, *ANSWERS)
    assert done == (130, "", "specrt: interrupted\n")
    assert len(answers(prompts)) == 2
    assert "1 answers written" in distil(capsys, target, prompts)[0]


def test_a_full_disk_is_one_line_and_a_rerun_goes_on(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    out = prompts.parent / "out.jsonl"
    args = ("distill-data", "--target", str(target), "--prompts", str(prompts), "--out", str(out))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, before[1]))
    try:
        done = run(capsys, *args, *ANSWERS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    expect_one_line(done, f"{out}: File too large; the lines before are kept")
    assert 0 < len(answers(prompts)) < 3  # and nothing of the next one
    distil(capsys, target, prompts)
    assert len(answers(prompts)) == len(by_key(answers(prompts))) == 3


def test_a_failed_sequence_is_reported_not_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: Path
) -> None:
    target = tmp_path / "broken"
    make_checkpoint("llama", target, bos_token_id=0, eos_token_id=1)
    write_tokenizer(target)
    edit_tensors(target, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    out = tmp_path / "out.jsonl"
    args = ("--target", str(target), "--prompts", str(prompts), "--out", str(out))
    code, said, err = run(capsys, "distill-data", *args, *ANSWERS)
    assert code == 2
    assert "0 answers written" in said
    assert err.count("NaN") == 3
    assert not out.exists()


# --- other options --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, prompts and two of their nine answers, each in its place."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(target, folder / "letters")
    write(folder / "prompts.jsonl", *({"prompt": text} for text in PROMPTS))
    write(folder / "more.jsonl", {"prompt": "else"})
    names = ("--target", folder / "letters", "--prompts", folder / "prompts.jsonl")
    args = map(str, (*names, "--out", folder / "out.jsonl", *ANSWERS, *MIXED))
    assert main(["distill-data", *args, "--num-prompts", "1"]) == 0
    return folder


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--temperature", "2"), r"temperature: .* made with \[0.0, 1.0\], not \[0.0, 1.0, 2.0\]"),
        (("--seed", "9"), "seed: .* made with 0, not 9"),
        (("--max-new-tokens", "5"), "max_new_tokens: .* made with 12, not 5"),
        (("--samples-per-prompt", "3"), "samples_per_prompt: .* made with 2, not 3"),
        (("--dtype", "bfloat16"), "dtype: .* made with float32, not bfloat16"),
        (("--quantize", "int8"), r"weights: .* made with float32, not INT8"),
        (("--prompts", "more.jsonl"), "prompts: .* made with [0-9a-f]{16}, not"),
        (("chat_template",), "template: .* made with [0-9a-f]{16}, not"),
        (("weights",), "target: .* made with [0-9a-f]{16}, not"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_run_with_other_options_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    begun: Path,
    tmp_path: Path,
    args: tuple[str, ...],
    message: str,
) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    content = (tmp_path / "out.jsonl").read_bytes()
    if args == ("chat_template",):
        (tmp_path / "letters" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    elif args == ("weights",):
        edit_tensors(tmp_path / "letters", lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    given = ("--target", "letters", "--prompts", "prompts.jsonl", "--out", "out.jsonl")
    more = args if len(args) == 2 else ()
    code, _, err = run(capsys, "distill-data", *given, *ANSWERS, *MIXED, *more)
    assert code == 2
    assert re.match(f"specrt: error: {message}.*; --restart begins anew, or write to another", err)
    assert "out.jsonl, line 1: " in err
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_a_restart_forgets_the_answers(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    write(prompts.parent / "out.jsonl", {"anything": 1})
    assert "3 answers written" in distil(capsys, target, prompts, "--restart")[0]
    assert len(answers(prompts)) == 3
    out, content = prompts.parent / "out.jsonl", (prompts.parent / "out.jsonl").read_bytes()
    args = ("--target", str(target), "--prompts", "no/such.jsonl", "--out", str(out), "--restart")
    expect_one_line(run(capsys, "distill-data", *args), "no/such.jsonl")
    assert out.read_bytes() == content  # which a mistake does not cost


def test_more_prompts_of_the_same_files_are_no_other_options(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    distil(capsys, target, prompts, "--num-prompts", "1")
    assert "2 answers written" in distil(capsys, target, prompts, "--batch-size", "1")[0]


def test_answers_of_an_earlier_version_are_gone_on_with(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    distil(capsys, target, prompts)
    old = answers(prompts)
    for row in old:
        del row["run"]
    write(prompts.parent / "out.jsonl", *old[:2])
    assert "1 answers written" in distil(capsys, target, prompts)[0]


def test_answers_have_one_writer(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    out = prompts.parent / "out.jsonl"
    args = ("--target", str(target), "--prompts", str(prompts), "--out", str(out))
    with AnswerFile(out, "letters"):
        done = run(capsys, "distill-data", *args, *ANSWERS)
    expect_one_line(done, f"{out}: process {os.getpid()} on")
    assert not list(prompts.parent.glob(".*"))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("x\n", "line 1: not JSON"),
        ('{"prompt": "x"}\n', "line 1: expected an answer with prompt_ids"),
        ('{"prompt_ids":1,"response_ids":1,"temperature":0,"seed":1,"target":"another"}\n', "'an"),
    ],
)
def test_a_file_of_something_else_is_left_alone(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path, content: str, named: str
) -> None:
    out = prompts.parent / "out.jsonl"
    out.write_text(content)
    args = ("--target", str(target), "--prompts", str(prompts), "--out", str(out))
    expect_one_line(run(capsys, "distill-data", *args), named)
    assert out.read_text() == content


def test_an_empty_file_of_the_users_is_left_alone(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path
) -> None:
    out = prompts.parent / "out.jsonl"
    out.touch()
    args = ("--target", str(target), "--prompts", "no/such.jsonl", "--out", str(out))
    expect_one_line(run(capsys, "distill-data", *args), "no/such.jsonl")
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--samples-per-prompt", "0"), "samples_per_prompt"),
        (("--num-prompts", "0"), "num_prompts"),
        (("--temperature", "-1"), "temperature"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--batch-size", "0"), "max_batch"),
        (("--prompts", "no/such.jsonl"), "no/such.jsonl"),
        (("--out", "no/such/out.jsonl"), "no/such/out.jsonl"),
        (("--prompts", "{out}"), "out: expected a file of its own"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_bad_option_is_one_line(
    capsys: pytest.CaptureFixture[str],
    target: Path,
    prompts: Path,
    args: tuple[str, ...],
    named: str,
) -> None:
    given = ("--target", str(target), "--prompts", str(prompts), "--out", str(prompts) + ".out")
    more = [arg.format(out=f"{prompts}.out") for arg in args]
    expect_one_line(run(capsys, "distill-data", *given, *more), named)
    assert not Path(f"{prompts}.out").exists()


def test_the_bar_is_for_terminals(
    capsys: pytest.CaptureFixture[str], target: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    _, err = distil(capsys, target, prompts)
    assert "3/3" in err
