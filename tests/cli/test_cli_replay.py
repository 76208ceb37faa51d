"""``specrt replay``: tables, JSON and pictures of given traces, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import specrt
from specrt.cli.app import main
from specrt.config import ModelConfig, config_fingerprint
from specrt.draft.length.control import CONTROLLERS, ControlOptions
from specrt.draft.length.costs import DraftCosts
from specrt.lab.replay import ALL_TASKS, PLAIN, compare, simulate
from specrt.lab.trace import (
    Trace,
    TraceHeader,
    TraceModels,
    TraceSequence,
    read_trace,
    write_trace,
)
from tests.cli.test_cli import expect_one_line, write_tokenizer
from tests.engine.exits import EXIT_LAYER, make_exit_pair

MAX_DRAFT = 5
MODELS = TraceModels("a-target", "t0", "an-exit", "d0", 3, "float32", MAX_DRAFT)
COSTS = DraftCosts(fixed=0.1, step=0.2, lower=0.2, verify=1.5, row=0.1)
HEADER = TraceHeader(MODELS, 0.0, 0, 1.0, 0.0, COSTS, (0.5, 0.5))


def sequence(task: str, index: int, chance: float) -> TraceSequence:
    """Forty tokens, of which drafts guess each with this chance."""
    rng = np.random.default_rng([index, int(100 * chance)])
    count = 40
    lengths = np.minimum(MAX_DRAFT, count - 1 - np.arange(count))
    is_drafted = np.arange(MAX_DRAFT) < lengths[:, None]
    is_right = rng.random((count, MAX_DRAFT)) < chance
    score = np.where(is_drafted, np.log(chance), np.nan).astype(np.float32)
    return TraceSequence(
        task=task,
        index=index,
        seed=index,
        prompt_len=4,
        max_len=4 + count,
        token_ids=(7,) * count,
        overrun_ids=(),
        draft_tokens=np.where(is_drafted, np.where(is_right, 7, 8), -1).astype(np.int32),
        scores=score,
        evidence=np.where(is_drafted, 0.0, np.nan).astype(np.float32),
    )


EASY = Trace(HEADER, tuple(sequence("easy", index, 0.9) for index in range(4)))
HARD = Trace(HEADER, tuple(sequence("hard", index, 0.3) for index in range(3)))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    write_trace(tmp_path / "easy.jsonl", EASY)
    write_trace(tmp_path / "hard.jsonl.gz", HARD)
    return [str(tmp_path / "easy.jsonl"), str(tmp_path / "hard.jsonl.gz")]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["replay", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- results --------------------------------------------------------------------------------------


def test_json_is_the_replay(capsys: pytest.CaptureFixture[str], files: list[str]) -> None:
    code, out, err = run(capsys, *files, "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["models"]["target"] == "a-target" and data["models"]["max_draft"] == MAX_DRAFT
    assert [one["file"] for one in data["traces"]] == files
    assert data["traces"][0]["costs"]["verify"] == 1.5
    assert set(data["tasks"]) == {"easy", "hard", ALL_TASKS}
    fixed = [f"fixed-{length}" for length in range(1, MAX_DRAFT + 1)]
    easy = data["tasks"]["easy"]
    assert easy["num_tokens"] == 160
    assert list(easy["controllers"]) == [PLAIN, *fixed, *CONTROLLERS[1:]]
    result = compare([EASY, HARD], {"beta-ts": ControlOptions("beta-ts", MAX_DRAFT)})
    for task, told in data["tasks"].items():
        assert told["best_fixed"] == result.best_fixed(task)
        row, outcome = told["controllers"]["beta-ts"], result.outcomes["beta-ts"][task]
        assert row["num_rounds"] == outcome.num_rounds
        assert row["num_drafted"] == outcome.num_drafted
        assert row["tau"] == outcome.tau
        assert row["regret"] == result.regret_share("beta-ts", task)


def test_tables_show_what_was_asked_for_and_what_it_is_measured_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, *files, "--controller", "fixed-2", "--controller", "threshold")
    assert (code, err) == (0, "")
    result = compare([EASY, HARD], {"threshold": ControlOptions("threshold", MAX_DRAFT)})
    bests = {task: result.best_fixed(task) for task in ("easy", "hard", ALL_TASKS)}
    assert len(set(bests.values())) > 1, "the tasks do not differ"
    tables = out.split("\n\n")
    for table, task in zip(tables, bests, strict=False):
        head, columns, *rows = table.splitlines()
        assert head == f"{task}, {result.num_tokens(task)} tokens"
        assert columns.split()[:2] == ["rounds", "tau"]
        names = {row.split()[0] for row in rows}
        assert names == {PLAIN, "fixed-2", "threshold", *bests.values()}
        starred = [row.split()[0] for row in rows if " * " in row]
        assert starred == [bests[task]]
        (told,) = [row.split() for row in rows if row.startswith("threshold")]
        outcome = result.outcomes["threshold"][task]
        assert told[1:3] == [str(outcome.num_rounds), f"{outcome.tau:.2f}"]
        assert told[-1] == f"{result.regret_share('threshold', task):+.1%}"
    for said in ("a-target (float32) with an-exit", "verify 1.500", "tau:", "regret:"):
        assert said in tables[-1]


def test_one_task_has_one_table(capsys: pytest.CaptureFixture[str], files: list[str]) -> None:
    code, out, _ = run(capsys, files[0])
    assert run(capsys, files[0], files[0]) == (code, out, "")  # a file named twice counts once
    assert code == 0
    assert ALL_TASKS not in out and "hard" not in out.split("\n\n")[0]


def test_draws_have_a_mean_and_a_spread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    args = (files[0], "--controller", "beta-ts", "--controller", "fixed-2", "--draws", "4")
    _, out, _ = run(capsys, *args, "--json")
    shares = json.loads(out)["tasks"]["easy"]["controllers"]["beta-ts"]["regret_draws"]
    code, out, _ = run(capsys, *args)
    assert (code, len(shares)) == (0, 4)
    rows = {line.split()[0]: line for line in out.split("\n\n")[0].splitlines()}
    spread = f"{np.mean(shares):+.1%} ±{100 * np.std(shares, ddof=1):.1f}"
    assert rows["beta-ts"].endswith(spread)
    assert rows["fixed-2"].rstrip().endswith("%")
    assert rows["rounds"].rstrip().endswith(" 4 draws")


def test_needs_no_torch_to_be_described() -> None:
    code = (
        "import sys; from specrt.cli import main; code = main(['replay', '--help']);"
        "assert code == 0 and 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--controller" in done.stdout


# --- recording ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    target, drafter = make_exit_pair(tmp_path_factory.mktemp("models"))
    write_tokenizer(target)
    return ["--target", str(target), "--drafter", str(drafter)]


@pytest.fixture
def letters(tmp_path: Path) -> str:
    file = tmp_path / "letters.jsonl"
    texts = ["to be or not", "a b c d e f g"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(file)


def test_records_then_replays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: list[str], letters: str
) -> None:
    file, warm = str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")
    sizes = ("--max-draft", "4", "--max-new-tokens", "30", "--prompts", letters)
    code, out, err = run(capsys, *models, *sizes, "--record", file, "--json")
    assert (code, err) == (0, "")
    # Replayed again, without the models, it is the same.
    assert run(capsys, file, "--json") == (code, out, err)
    trace = read_trace(file)
    assert trace.header.models.target_fingerprint == config_fingerprint(
        ModelConfig.from_directory(models[1])
    )
    made_by = trace.header.models
    assert (made_by.target, made_by.drafter, made_by.exit_layer) == ("target", "exit", EXIT_LAYER)
    assert (made_by.dtype, made_by.max_draft) == ("float32", 4)
    assert [(one.task, one.index, one.seed) for one in trace.sequences] == [
        ("letters", 0, 0),
        ("letters", 1, 0),
    ]
    engine = specrt.load(models[1], dtype="float32", progress=False)
    for sequence, prompt in zip(trace.sequences, ("to be or not", "a b c d e f g"), strict=True):
        plain = engine.generate(prompt, specrt.SamplingParams(max_new_tokens=30))
        assert list(sequence.token_ids) == plain.token_ids
    # Another recording joins what is there.
    options = ("--temperature", "0.8", "--seed", "3", "--num-prompts", "1", "--task", "warm")
    code, out, err = run(capsys, *models, *sizes, *options, "--record", warm, file, "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["tasks"]) == {"letters", "warm at 0.8", ALL_TASKS}
    (sequence,) = read_trace(warm).sequences
    assert sequence.seed == 3


def test_without_a_trace_one_is_recorded_for_now(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    models: list[str],
    letters: str,
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    sizes = ("--max-draft", "3", "--max-new-tokens", "20", "--prompts", letters)
    code, out, err = run(capsys, *models, *sizes)
    assert code == 0 and "letters, " in out and "fixed-3" in out and "recorded now: " in out
    assert err.startswith("specrt: no trace given: recording") and err.count("\n") == 1
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_cannot_be_recorded_for_now_is_one_line(
    capsys: pytest.CaptureFixture[str], models: list[str]
) -> None:
    expect_one_line(run(capsys, *models[:2], "--drafter", "nowhere"), "got 'nowhere'")


def test_only_eesd_can_be_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, models: list[str], letters: str
) -> None:
    given = (*models[:2], "--drafter", "prompt-lookup", "--prompts", letters)
    done = run(capsys, *given, "--record", str(tmp_path / "a.jsonl"))
    expect_one_line(done, "drafter: expected a bundled EESD drafter or")
    assert not (tmp_path / "a.jsonl").exists()


# --- controllers ----------------------------------------------------------------------------------


def test_a_controller_drafts_as_far_as_the_trace(
    capsys: pytest.CaptureFixture[str], files: list[str]
) -> None:
    _, out, _ = run(capsys, files[0], "--json", "--controller", "threshold")
    told = json.loads(out)["tasks"]["easy"]["controllers"]["threshold"]
    rounds = simulate([EASY], ControlOptions("threshold", MAX_DRAFT))
    assert told["num_drafted"] == sum(int(one.drafted.sum()) for one in rounds)


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml")])
def test_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, files: list[str], name: str, magic: bytes
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / name
    code, out, err = run(capsys, *files, "--plot", str(picture), "--controller", "beta-ts")
    assert (code, err) == (0, "")
    assert "beta-ts" in out
    assert picture.read_bytes().startswith(magic)
    if name.endswith(".svg"):  # one set of axes for each task, and the bars
        assert picture.read_text().count('id="axes_') == 3


def test_a_picture_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    monkeypatch.setattr("specrt.cli.replay_plot.find_spec", lambda name: None)
    expect_one_line(run(capsys, *files, "--plot", "a.png"), "pip install 'specrt[plot]'")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--controller", "magic"), "controller: expected one of fixed-1"),
        (("--controller", "fixed-9"), "expected at most the traces' fixed-5, got fixed-9"),
        (("--draws", "0"), "draws: expected at least 1, got 0"),
        (("--plot", "a.pdf"), "plot: expected a name in .png or .svg, got 'a.pdf'"),
        (("--plot", "no/such/folder/a.svg"), "plot: expected a folder to write into"),
        (("nowhere.jsonl",), "nowhere.jsonl: No such file"),
        (("--record", "no/such/folder/a.gz"), "record: expected a folder to write into"),
        (("--record", "."), "record: expected a file to write, got '.'"),
        (("--record", ""), "record: expected a file to write, got ''"),
        (("--record", "new.jsonl", "--controller", "fixed-9"), "fixed-8, got fixed-9"),
        (("--record", "new.jsonl", "none.jsonl"), "none.jsonl: No such file"),
        (("--record", "new.jsonl", "--num-prompts", "999"), "num_prompts: expected 1..473"),
        (("--record", "new.jsonl", "--max-draft", "0"), "max_draft: expected an int in 1..62"),
        (("--record", "new.jsonl", "--num-prompts", "0"), "num_prompts: expected at least 1"),
        (("--record", "new.jsonl", "--temperature", "-1"), "temperature: expected"),
        (("--record", "new.jsonl", "--prompts", "none.txt"), "none.txt: No such file"),
        (("--record", "new.jsonl", "--drafter", "oracle"), "oracle"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: list[str],
    args: tuple[str, ...],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    expect_one_line(run(capsys, *files, *args), named)
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "truncated or damaged gzip"),
        (
            lambda file: write_trace(
                file, replace(HARD, header=replace(HEADER, models=replace(MODELS, drafter="b")))
            ),
            "\"drafter\": expected 'an-exit', got 'b'",
        ),
    ],
    ids=["truncated", "another drafter's"],
)
def test_a_bad_trace_is_one_line(
    capsys: pytest.CaptureFixture[str],
    files: list[str],
    damage: Callable[[Path], object],
    named: str,
) -> None:
    damage(Path(files[1]))
    done = run(capsys, *files)
    expect_one_line(done, named)
    assert files[1] in done[2]
