"""Every benchmark runs and reports; what it measures is not judged here."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    bench_control,
    bench_draft_window,
    bench_drafters,
    bench_generate,
    bench_serving,
    contenders,
    harness,
)
from bench.cpu_models import TINY
from bench.draft_contenders import PLAIN, Contender, Tree, Variant
from bench.draft_contenders import Run as MadeRun
from bench.memory import Probe
from specrt import Engine, builtin
from specrt.config import ModelConfig
from specrt.draft.kinds import named_kinds
from specrt.engine.results import GenerationResult
from specrt.models.loader import load_weights
from specrt.types import Proposal, RoundStats
from tests.checkpoints import make_draft_checkpoint
from tools.export_checkpoint import export, state_dict

ROOT = Path(__file__).parents[1]
END_TO_END = {
    "bench_generate", "bench_drafters", "bench_draft_window", "bench_control", "bench_arrivals",
    "bench_load", "bench_chain",
    "bench_serving",
}  # fmt: skip
ON_A_GPU = {"bench_round"}
BENCHES = {file.stem for file in (ROOT / "bench").glob("bench_*.py")}
KERNELS = sorted(BENCHES - END_TO_END - ON_A_GPU)
QUICK = ("--quick", "--threads", "1")
TARGET = builtin.target_path()
Run = Callable[..., dict[str, Any]]
needs_target = pytest.mark.skipif(
    not (TARGET / "config.json").is_file(), reason="the bundled target is not here"
)


def as_a_command(name: str, *options: str) -> dict[str, Any]:
    """A quick run's JSON, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *QUICK, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return last_line(done.stdout)


def last_line(output: str) -> dict[str, Any]:
    result = json.loads(output.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Gives a quick run's JSON, made in this process: to start one takes longer than most. What
    the harness times runs once and counts as a second."""
    num_threads = torch.get_num_threads()

    def once(fn: Callable[[], object], repeats: int) -> float:
        fn()
        return 1.0

    monkeypatch.setattr(harness, "_time", once)
    monkeypatch.setattr(harness, "_SETTLE", 0.0)

    def main(name: str, *options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *QUICK, *options])
        importlib.import_module(f"bench.{name}").main()
        return last_line(capsys.readouterr().out)

    yield main
    torch.set_num_threads(num_threads)


def test_a_command() -> None:
    result = as_a_command("bench_matrix_pack")
    assert result["command"].startswith("python -m bench.bench_matrix_pack --quick")


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_bench(name: str, run: Run, tmp_path: Path) -> None:
    result = run(name, "--save", str(tmp_path))
    ratios = [row.get("torch/ours", row.get("ratio")) for row in result["rows"]]
    assert any(isinstance(ratio, float) and ratio > 0 for ratio in ratios)
    assert result["environment"]["cpu_flags"] is not None
    (saved,) = tmp_path.iterdir()
    assert json.loads(saved.read_text()) == result


@needs_target
def test_chain_bench(run: Run) -> None:
    rows = run("bench_chain", "--target", str(TARGET), "--kinds", "own", "int8")["rows"]
    assert [(row["kind"], row["nodes"]) for row in rows] == [
        ("own", 1), ("own", 4), ("int8", 1), ("int8", 4)
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in rows)
    assert rows[0]["cost"] == rows[2]["cost"] == 1


@pytest.mark.slow
@needs_target
@pytest.mark.parametrize("text", ["problems", "own"])
def test_draft_window_bench(text: str, run: Run) -> None:
    rows = run("bench_draft_window", "--text", text)["rows"]
    assert [row["window"] for row in rows] == ["all", "8+2"]
    assert all(1 <= row[length] <= 9 for row in rows for length in ("16", "40"))


def test_a_tree_is_followed_along_a_text() -> None:
    tree = Proposal(
        torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[-1, 0, 0, 2, 3]]), torch.tensor([4])
    )
    for said, length in (([6, 8], 1), ([7, 8, 9], 2), ([8], 0), ([], 0)):
        assert bench_draft_window.accepted(tree, said) == length


def test_arrivals_bench(run: Run) -> None:
    options = ["--target", "random", "--layers", "2", "--hidden", "256", "--chunks", "512"]
    result = run("bench_arrivals", *options, "--drafters", "prompt-lookup")
    assert [row["drafter"] for row in result["rows"]] == ["none", "prompt-lookup"]
    assert all(row["differs"] == 0 and row["ratio"] > 0 for row in result["rows"])
    assert result["summary"]["wait"]["512"] > 0


@pytest.mark.slow
@needs_target
def test_serving_bench(run: Run) -> None:
    result = run("bench_serving", "--modes", "off", "--seconds", "2")
    assert [row["streams"] for row in result["rows"]] == [1, 4]
    assert all(row["tokens/s"] > 0 and row["stepped"] > 0 for row in result["rows"])
    assert result["summary"]["first_ms"]["ratio"] > 0


def test_serving_bench_compares_within_a_repeat() -> None:
    """Ratios are of one repeat, so that a machine that slows down slows both."""

    def made(rate: float, gaps: list[float]) -> bench_serving.Load:
        load = bench_serving.Load(0.0, 1.0, num_tokens=round(rate), gaps=gaps, cpu=1.0)
        return load

    def pairs(*rates: float) -> list[bench_serving.Pair]:
        return [(made(rate, [0.01] * 98 + [0.04] * 2), made(2 * rate, [0.01])) for rate in rates]

    found = {
        (1, "auto"): pairs(10, 20, 40),
        (32, "auto"): pairs(30, 80, 120),
        (32, "off"): pairs(60, 80, 60),
        (32, "on"): pairs(10, 160, 60),
    }
    one, many, *_ = bench_serving.rows_of(found)
    assert (one["tokens/s"], many["tokens/s"], many["to one"]) == (20, 80, 3.0)
    assert (many["cost %"], many["p99/p50"]) == (100.0, pytest.approx(4.0))
    assert bench_serving.auto_over_best(found, lambda pair: pair[0].rate) == {"32": 0.5}
    by_cpu = bench_serving.auto_over_best(found, lambda pair: 1 / pair[1].cpu_ms)
    assert by_cpu == {"32": pytest.approx(0.5)}


@needs_target
def test_generate_bench(run: Run) -> None:
    result = run("bench_generate", "--drafters", "prompt-lookup", "--peers", "transformers")
    rows = {row["contender"]: row for row in result["rows"]}
    assert set(rows) == {"transformers", "ours plain", "ours prompt-lookup"}
    assert all(row["vs plain"] > 0 and row["vs transformers"] > 0 for row in rows.values())
    assert rows["ours prompt-lookup"]["differs plain"] == 0
    assert result["summary"]["float32"]["share_of_streaming"] > 0


def test_generate_bench_of_a_file_in_several_forms(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from bench.random_gguf import write_gguf

    write_gguf(TINY, "q8_0", tmp_path / "tiny.gguf")
    options = ["--gguf", str(tmp_path / "tiny.gguf"), "--drafters", "recycle", "--cpu-time"]
    forms = ["--forms", "file", "int8", "float32", "--peers", "transformers"]
    result = run("bench_generate", *options, *forms)
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == [
        "ours plain", "ours recycle", "ours int8", "ours float32",
        "transformers float32", "transformers bfloat16",
    ]  # fmt: skip
    assert [row["differs plain"] for row in rows.values()] == [0, 0, None, None, None, None]
    assert rows["ours float32"]["MB/token"] > 3 * rows["ours plain"]["MB/token"]
    assert all("vs transformers float32" in row for row in rows.values())
    assert result["summary"]["time"] == "CPU"


@needs_target
def test_generate_bench_knows_the_bundled_drafters() -> None:
    untrained = [kind.name for kind in named_kinds()]
    bundled = [*untrained, *builtin.drafter_paths()]
    assert bench_generate.drafters("all", "builtin") == {name: name for name in bundled}
    assert list(bench_generate.drafters("all", str(TARGET))) == untrained
    assert bench_generate.drafters("fspad,a/b", "builtin") == {"fspad": "fspad", "b": "a/b"}


@needs_target
def test_drafters_bench(run: Run, tmp_path: Path) -> None:
    for seed in range(2):
        make_draft_checkpoint(TARGET, tmp_path / str(seed), seed=seed)
    bundled = list(builtin.drafter_paths())[:1]
    seeds = f"random={tmp_path / '0'},{tmp_path / '1'}"
    result = run("bench_drafters", "--drafters", "prompt-lookup", *bundled, "--seeds-of", seeds)
    lines = [(row["drafter"], row["tree"], row["temperature"]) for row in result["rows"]]
    for drafter in [*bundled, "random"]:
        for tree in ("8 (4, 3)", "auto"):
            assert lines.count((drafter, tree, 0)) == 1 and lines.count((drafter, tree, 1)) == 2
    assert {drafter for drafter, _, _ in lines} == {"plain", "prompt-lookup", *bundled, "random"}
    for row in result["rows"]:
        assert row["differs"] == 0 and row["tau"] >= 1 and row["speed-up"] > 0
        assert row["drafter"] != "random" or row["least"] <= row["tau"] <= row["greatest"]
    assert result["command"].endswith("--seeds-of random=0,1")
    assert [one["checkpoint"] for one in result["summary"]["drafters"]["random"]] == ["0", "1"]


@needs_target
def test_control_bench(run: Run) -> None:
    result = run("bench_control", "--controllers", "fixed-2", "cost-aware", "--branches", "2")
    rows = {row["controller"]: row for row in result["rows"]}
    trees = [f"tree {depth} x 2" for depth in (2, 3, 4)]
    assert list(rows) == ["plain", "fixed-2", "cost-aware", *trees]
    assert all(row["differing"] == 0 and row["tokens/s"] > 0 for row in rows.values())
    assert rows["plain"]["vs plain"] == rows["fixed-2"]["vs best K"] == 1.0
    assert rows["fixed-2"]["drafted"] > 1
    assert rows["fixed-2"]["tau"] == 1 + rows["fixed-2"]["accepted"]


def test_control_bench_sums_the_kinds() -> None:
    """Sums of medians over repeats; the best fixed length is the one that took least."""

    def made_runs(seconds: list[float], accepted: int) -> bench_control.Runs:
        stats = RoundStats()
        stats.record(3, accepted, 2)
        one = GenerationResult("", [1] * (accepted + 1), [], "stop", None, 0, stats)
        return bench_control.Runs([seconds], [one])

    slow, fast = made_runs([4.0, 5.0, 9.0], 0), made_runs([1.0, 2.0, 3.0], 2)
    part = {"plain": slow, "fixed-1": slow, "fixed-2": fast, "beta-ts": slow}
    rows = bench_control.rows_of("all", "float32", bench_control.together([part, part]))
    beta, fixed = rows[3], rows[2]
    assert (fixed["vs plain"], fixed["vs best K"], beta["vs best K"]) == (2.5, 1.0, 0.4)
    assert (fixed["tau"], fixed["drafted"], fixed["tokens/s"]) == (3.0, 2.0, 1.5)
    assert fixed["differing"] == 2


@needs_target
def test_control_bench_fails_where_text_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"controller": "beta-ts", "differing": 1}]
    monkeypatch.setattr(bench_control, "bench", lambda args, dtype: rows)
    monkeypatch.setattr(sys, "argv", ["bench_control", "--quick"])
    with pytest.raises(SystemExit, match="not lossless: beta-ts"):
        bench_control.main()


def contender(name: str, *, is_coupled: bool = False) -> Contender:
    """One whose runs are made up."""
    return Contender(Variant(name, Tree.of_size(8), is_coupled), Engine.__new__(Engine))


def made_up(seconds: float, accepted: list[int], token_ids: list[int]) -> MadeRun:
    """A run whose rounds accepted so much of trees two levels deep."""
    stats = RoundStats()
    for length in accepted:
        stats.record(4, length, 2)
    return MadeRun(token_ids, seconds, stats)


def test_drafters_figures() -> None:
    """Rates are medians over repeats, then prompts, then seeds; tau counts rounds."""
    slow, fast, right = [0, 0], [2, 0], [7, 8]
    results: bench_drafters.Results = {
        contender(PLAIN): [[made_up(2.0, slow, right)] * 2, [made_up(4.0, slow, right)] * 2],
        contender("a"): [[made_up(1.0, fast, right)] * 2, [made_up(1.0, slow, right)] * 2],
        contender("a", is_coupled=True): [[made_up(0.5, fast, right)] * 2] * 2,
        contender("b"): [[made_up(1.0, fast, right), made_up(1.0, fast, [7])]] * 2,
    }
    second_seed = contender("a")
    results[second_seed] = [[made_up(2.0, fast, right)] * 2] * 2
    rows = bench_drafters.rows_of(results, 1.0, has_times=True)
    by_name = {(row["drafter"], row["coupled"]): row for row in rows}
    assert len(rows) == len(by_name) == 4
    a = by_name["a", "no"]
    assert (a["tau"], a["least"], a["greatest"], a["differs"]) == (1.75, 1.5, 2.0, 0)
    assert a["speed-up"] == pytest.approx((3.0 + 1.5) / 2)
    assert a["tokens/s"] == pytest.approx(1.5)
    assert a["reached"] == "0.38 0.38"
    assert by_name["a", "yes"]["coupling"] == "+14.3%"
    assert by_name["b", "no"]["differs"] == 2


@needs_target
def test_drafters_bench_fails_where_text_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"drafter": "b", "tree": "8 (4, 3)", "differs": 2}]
    monkeypatch.setattr(bench_drafters, "bench", lambda args, families: (rows, {}))
    monkeypatch.setattr(sys, "argv", ["bench_drafters", "--quick"])
    with pytest.raises(SystemExit, match="not lossless: b 8"):
        bench_drafters.main()


def test_drafters_bench_trees() -> None:
    assert [str(tree) for tree in bench_drafters.parse_trees(["8", "60", "auto"], None, None)] == [
        "auto",
        "8 (4, 3)",
        "60 (6, 10)",
    ]
    swept = bench_drafters.parse_trees(["32"], [1, 14], [2, 10])
    assert [(tree.depth, tree.top_k) for tree in swept] == [(1, 2), (1, 10), (14, 2)]
    with pytest.raises(ValueError, match="--trees: expected 2..128 or auto, got '129'"):
        bench_drafters.parse_trees(["129"], None, None)
    with pytest.raises(ValueError, match="expected depth <= 16"):
        bench_drafters.parse_trees(["32"], [14, 17], [10])


@pytest.mark.parametrize(
    ("names", "seeds_of", "message"),
    [
        ([], ["a"], "--seeds-of: expected NAME=DIR"),
        ([], ["a=x,,y"], "--seeds-of: expected NAME=DIR"),
        ([], ["plain=x"], "--seeds-of: expected NAME=DIR"),
        (["x/a", "y/a"], [], "--drafters: expected different names"),
        (["plain"], [], "--drafters: expected different names"),
    ],
)
def test_drafters_bench_names(names: list[str], seeds_of: list[str], message: str) -> None:
    families = bench_drafters.parse_families(["x/a", "b"], ["b=c,d"])
    assert families == {"a": ["x/a"], "b": ["c", "d"]}
    with pytest.raises(ValueError, match=message):
        bench_drafters.parse_families(names, seeds_of)


@needs_target
def test_llama_cpp_may_be_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_generate, "has_llama_cpp", lambda: False)
    args = argparse.Namespace(peers={contenders.LLAMA_CPP}, gguf=None, make_gguf=True)
    config = ModelConfig.from_directory(TARGET)
    blank = Probe("ours", "builtin", "float32", 1, None, None, [], 0, [])
    assert bench_generate._llama_cpp(args, config, "float32", tmp_path, blank) == {}
    assert "not installed" in capsys.readouterr().out


@needs_target
def test_export_keeps_every_weight(tmp_path: Path) -> None:
    """The exported directory loads as a plain checkpoint, to the bit."""
    export("builtin", tmp_path, "float32")
    states = []
    for directory in (TARGET, tmp_path):
        config = ModelConfig.from_directory(directory)
        states.append(state_dict(config, load_weights(directory, config, torch.float32)))
    assert config.float8_scale_suffix is None
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
