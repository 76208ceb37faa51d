"""``specrt bench``: sums by task, a file that is gone on with, Ctrl-C, tokens that differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import specrt
from specrt.cli.bench_file import Case, Result
from specrt.cli.bench_report import Report
from specrt.cli.contenders import name_drafters
from specrt.cli.engine_options import target_config
from specrt.cli.prompts import encode, prompts_or_bundled, read_prompts
from specrt.lab import measure
from specrt.lab.measure import Comparison, Difference, Figures, sum_figures
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.cli.test_cli import PROMPT, expect_one_line, lines_with, run, write_tokenizer

TEXTS = {"qa": (PROMPT, "abc"), "rag": ("the cat sat on the mat, the cat sat",)}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, bos_token_id=0, eos_token_id=1)
    write_tokenizer(path)
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two of one task, one of another."""
    file = tmp_path / "questions.jsonl"
    lines = [{"category": task, "turns": [text]} for task in TEXTS for text in TEXTS[task]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


class Calls:
    """``compare``, counted; from a call on it is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.last: int | None = None
        self.warmups: list[int | None] = []
        self.first: list[str] = []
        self._real = measure.compare
        monkeypatch.setattr(measure, "compare", self)

    def __call__(
        self, engines: Mapping[str, Any], *args: Any, warmup: int | None, **options: Any
    ) -> Comparison:
        if self.count == self.last:
            raise KeyboardInterrupt
        self.count += 1
        self.warmups.append(warmup)
        self.first.append(next(iter(engines)))
        return self._real(engines, *args, warmup=warmup, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def bench_args(target: str, questions: Path, *more: str) -> tuple[str, ...]:
    args = ("bench", "--target", target, "--prompts", str(questions), "--max-new-tokens", "8")
    return (*args, "--repeats", "1", *more)


# --- sums -----------------------------------------------------------------------------------------


def figures(num_tokens: int, num_rounds: int, seconds: float, prefill: float = 0.0) -> Figures:
    return Figures(
        num_tokens=num_tokens, num_rounds=num_rounds, num_draft_tokens=99,
        num_accepted_tokens=num_tokens - num_rounds, seconds=[seconds], prefill_seconds=[prefill],
        difference=None,
    )  # fmt: skip


def result(place: int, task: str, temperature: float, **of: Figures) -> Result:
    case = Case(place, f"line {place}", task, temperature, [place], SamplingParams())
    return Result(case, of)


RESULTS = [
    result(0, "qa", 0.0, plain=figures(8, 8, 4.0, 2.0), a=figures(8, 2, 3.0, 2.0)),
    result(1, "qa", 0.0, plain=figures(4, 4, 2.0, 1.0), a=figures(4, 2, 1.0, 0.5)),
    result(2, "rag", 0.0, plain=figures(8, 8, 4.0), a=figures(8, 8, 5.0)),
]
TABLES = """\
| | tokens | equal | tau | tokens/s | speed-up | by prompt | decoding alone |
| plain | 20 | 20 of 20 | 1.00 | 2.0 | 1.00x | 1.00x (1.00-1.00) | 1.00x |
| a | 20 | 20 of 20 | 1.67 | 2.2 | 1.11x | 1.33x (0.80-2.00) | 1.08x |
| | qa | rag | mean | all |
| plain | 1.00 | 1.00 | 1.00 | 1.00 |
| a | 3.00 | 1.00 | 2.00 | 1.67 |
| | qa | rag | mean | all |
| plain | 2.0 | 2.0 | 2.0 | 2.0 |
| a | 3.0 | 1.6 | 2.3 | 2.2 |
| | qa | rag | mean | all |
| plain | 1.00x | 1.00x | 1.00x | 1.00x |
| a | 1.50x | 0.80x | 1.15x | 1.11x |
| | qa | rag | mean | all |
| plain | 1.00x | 1.00x | 1.00x | 1.00x |
| a | 2.00x | 0.80x | 1.40x | 1.08x |
"""


def test_sums_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    Report(RESULTS, ["plain", "a"], 1, 2).show(is_markdown=True)
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines() if line.startswith("|")]
    assert "\n".join(row for row in rows if "--" not in row) + "\n" == TABLES
    titles = [line.strip("*") for line in out.splitlines() if line.startswith("**")]
    assert titles == [
        f"{figure}, temperature 0"
        for figure in ("tau", "tokens/s", "speed-up", "speed-up of decoding alone")
    ]
    assert "3 prompts one at a time, one run of each, 2 threads" in out


def test_text_says_what_markdown_does(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(RESULTS, ["plain", "a"], 1, 2)
    report.show(is_markdown=False)
    words = capsys.readouterr().out.split()
    report.show(is_markdown=True)
    said = capsys.readouterr().out.replace("|", " ").replace("**", "").split()
    assert [word for word in said if set(word) - set("-:")] == words


def test_tasks_are_rows_where_they_are_many(capsys: pytest.CaptureFixture[str]) -> None:
    one = figures(8, 8, 4.0)
    many = [result(i, f"task {i}", 0.0, plain=one) for i in range(12)]
    Report(many, ["plain"], 1, 2).show(is_markdown=True)
    assert "| task 11 | 1.00x |" in capsys.readouterr().out


def test_names_are_nobody_elses_in_any_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of sums, and what would end a cell or a line: each is one word of its own."""
    one = figures(8, 8, 4.0)
    names = [
        "mean",
        "all",
        '"mean"',
        "a|b",
        "a\nb",
        "a b",
        " ",
        "*x*_y_",
        "m_t",
        "a:cat:b",
        "\u2028",
        "\ud800",
    ]
    both = {"plain": one, **dict.fromkeys(names, one)}
    report = Report([result(i, n, 0.0, **both) for i, n in enumerate(names)], list(both), 1, 2)
    others = ['"\\"mean\\""', "a|b", '"a\\nb"', "a b", '" "', "*x*_y_", "m_t", "a:cat:b"]
    tasks = ['"mean"', '"all"', *others, '"\\u2028"', '"\\ud800"', "mean", "all"]
    report.show(is_markdown=False)
    text = [re.split(" {2,}", line)[0] for line in capsys.readouterr().out.splitlines()]
    start = text.index('"mean"')
    assert text[start : start + len(tasks)] == tasks
    report.show(is_markdown=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert [len(row) for row in rows[: len(both) + 2]] == [8] * (len(both) + 2)
    table = rows[len(both) + 2 :][: len(tasks) + 2]
    assert {len(row) for row in table} == {len(both) + 1}
    marked = [row[0].strip() for row in table[2:]]
    assert [re.sub(r"\\(.)", r"\1", cell) for cell in marked] == tasks
    assert {r"a\|b", r"\*x\*\_y\_", "m_t", r'"a\\nb"'} < set(marked)


def test_json_has_tasks_and_temperatures() -> None:
    sampled = result(0, "qa", 1.0, plain=figures(8, 8, 2.0), a=figures(8, 8, 4.0))
    said = Report([*RESULTS, sampled], ["plain", "a"], 1, 2).as_dict()
    assert [(one["temperature"], one["name"]) for one in said["summaries"]] == [
        (0.0, "plain"), (0.0, "a"), (1.0, "plain"), (1.0, "a"),
    ]  # fmt: skip
    found = {(one["task"], one["temperature"], one["name"]): one for one in said["tasks"]}
    assert len(found) == 6
    assert found["qa", 0.0, "a"]["speedup"] == 1.5
    assert found["qa", 0.0, "a"]["decode_speedup"] == 2.0
    assert found["qa", 1.0, "a"]["speedup"] == 0.5
    assert said["prompts"][1]["drafters"]["a"]["tau"] == 2.0
    assert [one["prompt"] for one in said["prompts"]] == ["line 0", "line 1", "line 2", "line 0"]


def test_differing_tokens_are_counted_up_to_the_first() -> None:
    plain = figures(8, 8, 1.0)
    other = replace(plain, difference=Difference(3, 5, None))
    summary = sum_figures("a", [{"plain": plain, "a": other}, {"plain": plain, "a": plain}])
    assert (summary.num_equal, summary.num_tokens) == (11, 16)
    assert (summary.num_equal_prompts, summary.num_prompts) == (1, 2)


# --- a file that is gone on with ------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path, calls: Calls, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    more = ("--drafters", "all", "--temperature", "0", "--temperature", "1", "--warmup", "0")
    args = bench_args(target, questions, *more, "--out", str(out))
    calls.last = 4
    code, said, err = run(capsys, *args)
    assert code == 130
    assert err.splitlines() == [
        "specrt: 4 of 6 measurements were made", "specrt: interrupted",
    ]  # fmt: skip
    # Tasks take turns: there is something of each.
    assert lines_with(said, "speed-up, temperature 1") and lines_with(said, "qa", "rag", "mean")
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["task"], one["temperature"]) for one in kept] == [
        ("qa", 0.0), ("qa", 1.0), ("rag", 0.0), ("rag", 1.0),
    ]  # fmt: skip
    assert calls.warmups == [1, 0, 0, 0]
    assert calls.first == ["plain", "plain", "recycle", "recycle"]
    assert [list(one["contenders"]) for one in kept] == [["plain", "prompt-lookup", "recycle"]] * 4

    out.write_bytes(out.read_bytes()[:-20])  # a line cut short
    calls.count, calls.last = 0, None
    code, said, err = run(capsys, *args, "--json")
    assert (code, err, calls.count) == (0, "", 3)
    prompts = json.loads(said)["prompts"]
    names = [f"{questions}, line {line}" for line in (1, 1, 2, 2, 3, 3)]
    assert [one["prompt"] for one in prompts] == names
    assert prompts[0]["seconds"]["plain"] == kept[0]["contenders"]["plain"]["seconds"]

    code, _, _ = run(capsys, *args, "--limit", "2")
    assert (code, calls.count) == (0, 3)  # all there
    _, _, _ = run(capsys, *args, "--limit", "1", "--restart")
    assert calls.count == 5 and len(out.read_text().splitlines()) == 2


def test_a_file_is_of_one_set_of_circumstances(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    args = bench_args(target, questions, "--limit", "1", "--out", str(out))
    assert run(capsys, *args, "--drafters", "recycle")[0] == 0
    refused = run(capsys, *args, "--drafters", "all")
    expect_one_line(refused, f"drafters: {out}, line 1: a result made with")
    expect_one_line(run(capsys, *args, "--drafters", "recycle", "--repeats", "2"), "repeats: ")
    expect_one_line(run(capsys, *args, "--drafters", "recycle", "--quantize", "int8"), "weights: ")
    assert len(out.read_text().splitlines()) == 1
    out.write_text('{"prompt": "x"}\n')
    expect_one_line(run(capsys, *args), f"{out}, line 1: expected a result of specrt bench")


def test_nothing_measured_leaves_no_file(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path, calls: Calls, tmp_path: Path
) -> None:
    calls.last = 0
    out = tmp_path / "out.jsonl"
    code, said, _ = run(capsys, *bench_args(target, questions, "--out", str(out)))
    assert (code, said) == (130, "") and not out.exists()


# --- tokens that differ ---------------------------------------------------------------------------


def changed(comparison: Comparison, name: str, position: int) -> Comparison:
    """As if a contender had said another token there."""
    one = comparison.measurements[name]
    tokens = list(one.result.token_ids)
    tokens[position] += 1
    other = replace(one, result=replace(one.result, token_ids=tokens))
    return Comparison({**comparison.measurements, name: other})


def test_the_first_differing_token_is_named(
    capsys: pytest.CaptureFixture[str],
    target: str,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, plain = measure.compare, {}

    def compare(engines: Mapping[str, Any], prompt: Any, *args: Any, **options: Any) -> Comparison:
        found = real(engines, prompt, *args, **options)
        plain[tuple(prompt)] = found.measurements["plain"].result.token_ids
        return changed(found, "recycle", 5) if len(plain) == 2 else found

    monkeypatch.setattr(measure, "compare", compare)
    out = tmp_path / "out.jsonl"
    args = bench_args(target, questions, "--drafters", "prompt-lookup,recycle", "--out", str(out))
    code, said, err = run(capsys, *args, "--json")
    token = list(plain.values())[1][5]
    line = (
        f"specrt: error: {questions}, line 3, temperature 0: NOT EQUAL: position 5 is token "
        f"{token + 1} by recycle, token {token} by plain decoding"
    )
    assert (code, err.splitlines()) == (1, [line])
    parting = [one["drafters"]["recycle"]["difference"] for one in json.loads(said)["prompts"]]
    assert parting == [None, None, {"position": 5, "plain": token, "other": token + 1}]
    # What is in the file is no better.
    assert run(capsys, *args)[::2] == (1, f"{line}\n")


def test_a_difference_may_be_an_end(target: str) -> None:
    engine = specrt.load(target, None, progress=False)
    found = measure.compare({"plain": engine, "a": engine}, PROMPT, SamplingParams(), repeats=1)
    one = found.measurements["a"]
    shorter = replace(one, result=replace(one.result, token_ids=one.result.token_ids[:-1]))
    last = one.result.token_ids[-1]
    for name, other, parting in (
        ("a", shorter, Difference(one.num_tokens - 1, last, None)),
        ("plain", shorter, Difference(one.num_tokens - 1, None, last)),
    ):
        assert Comparison({**found.measurements, name: other}).difference("a") == parting
    assert found.difference("a") is None


# --- names, prompts, options ----------------------------------------------------------------------


def test_one_drafter_under_two_names(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path, tmp_path: Path
) -> None:
    make_draft_checkpoint(Path(target), tmp_path / "mine")
    drafters = f"a={tmp_path}/mine,{tmp_path}/mine/,all,b=recycle"
    code, out, err = run(
        capsys, *bench_args(target, questions, "--drafters", drafters, "--limit", "1", "--json")
    )
    assert (code, err) == (0, "")
    names = [one["name"] for one in json.loads(out)["summaries"]]
    assert names == ["plain", "a", "mine", "prompt-lookup", "recycle", "b"]


def test_what_is_named_stands_before_what_all_has(tmp_path: Path) -> None:
    bundled = target_config("builtin")
    named = name_drafters(f"all,fspad={tmp_path}", bundled)
    assert named["fspad"] == str(tmp_path)
    assert named["recycle"] == "recycle" and named["eesd"] == "eesd"
    beside = f"{tmp_path}/+prompt-lookup"  # as a shell completes a directory
    assert name_drafters(beside, bundled) == {f"{tmp_path.name}+prompt-lookup": beside}
    for given, words in (
        ("a=recycle,a=prompt-lookup", "a comes twice; NAME=DIR"),
        ("plain=recycle", "plain is what plain decoding is called"),
        ("a=nobody", "expected none, auto"),
        ("a=auto+prompt-lookup", "of an FSPAD or EAGLE drafter, got 'auto'"),
    ):
        with pytest.raises(ValueError, match=words):
            name_drafters(given, bundled)


def test_turns_and_problems_are_said_to_models_that_chat(target: str, questions: Path) -> None:
    engine = specrt.load(target, None, progress=False)
    asked = read_prompts(None, str(questions), is_jsonl=False, is_chat=False)
    assert [one.category for one in asked] == ["qa", "qa", "rag"]
    said = [engine.encode([{"role": "user", "content": text}]) for text in TEXTS["qa"]]
    assert encode(engine, asked[:2]) == said
    (problem,) = prompts_or_bundled(None, 1, num_bundled=16, is_jsonl=False, is_chat=False)
    assert problem.prompt == f"Question: {problem.message}\nAnswer:"
    engine.tokenizer.inner.chat_template = None
    assert encode(engine, asked[:1]) == [engine.encode(PROMPT)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--drafter", "elsewhere/plain"), "drafter: plain is what plain decoding is called"),
        (("--json", "--markdown"), "json, markdown: expected one of them"),
        (("--restart",), "restart: goes with --out"),
        (("--limit", "0"), "num_prompts: expected at least 1, got 0"),
        (("--warmup", "-1"), "warmup: expected at least 0, got -1"),
        (("--temperature", "-1"), "temperature: "),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str],
    target: str,
    questions: Path,
    options: tuple[str, ...],
    words: str,
) -> None:
    expect_one_line(run(capsys, *bench_args(target, questions, *options)), words)
    own = bench_args(target, questions, "--out", str(questions))
    expect_one_line(run(capsys, *own), "out: expected a file of its own")


@pytest.mark.parametrize(
    "content",
    ['{"precious": 1}', '{"prompt": "of somebody\'s own"}', "[1, 2]\n", '{"prompt": "x"}\n{"a'],
)
def test_what_is_no_result_is_not_touched(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path, tmp_path: Path, content: str
) -> None:
    out = tmp_path / "mine.json"
    out.write_text(content)
    args = bench_args(target, questions, "--limit", "1", "--out", str(out))
    code, _, err = run(capsys, *args, "--drafters", "recycle")
    assert code == 2 and f"{out}, line 1: " in err
    assert out.read_text() == content


def test_a_refused_run_leaves_a_line_cut_short(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    args = bench_args(target, questions, "--limit", "1", "--out", str(out), "--drafters")
    assert run(capsys, *args, "recycle")[0] == 0
    whole = out.read_bytes()
    cut = whole + whole[:30]
    out.write_bytes(cut)
    assert run(capsys, *args, "nobody")[0] == 2 and out.read_bytes() == cut
    assert run(capsys, *args, "recycle")[0] == 0 and out.read_bytes() == whole
    out.write_bytes(whole[:-1])  # all but the line's end
    assert run(capsys, *args, "recycle")[0] == 0 and out.read_bytes() == whole
    line = json.loads(whole)
    out.write_text(json.dumps({**line, "contenders": {}}) + "\n")
    code, _, err = run(capsys, *args, "recycle")
    assert code == 2 and "expected a result of specrt bench" in err


def test_names_and_options_of_several(
    capsys: pytest.CaptureFixture[str], target: str, questions: Path
) -> None:
    args = bench_args(target, questions, "--limit", "1", "--json", "--drafters")
    code, out, _ = run(capsys, *args, "auto,mine=auto")
    names = [one["name"] for one in json.loads(out)["summaries"]]
    assert (code, names) == (0, ["plain", "prompt-lookup", "mine"])
    code, _, err = run(capsys, *args, "recycle", "--controller", "fixed-3")
    assert code == 2 and "controller: goes with --drafter, not with --drafters" in err
    code, _, err = run(capsys, *args, "recycle", "--out", "")
    assert code == 2 and "expected a file" in err
