"""What of ``make gpu-check`` needs no GPU: the commands for a machine, budgets, the summary."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import check_stages, goals, gpu_check
from bench.check_stages import CUT, FAILED, OK, PARTIAL, SKIPPED, STAGES, Command, Machine, Stage

ROOT = Path(__file__).parents[1]
H100 = {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
WITH_GPU = Machine("python3", H100, (), True, False, "/opt/compute-sanitizer")
WITHOUT_GPU = Machine("python3", {}, (), False, False, None)


def commands(
    machine: Machine, *names: str, is_essential: bool = False
) -> dict[str, dict[str, Command]]:
    stages = check_stages.plan(machine, names or STAGES, is_essential, Path("out"))
    return {stage.name: {one.name: one for one in stage.commands} for stage in stages}


# --- stages -----------------------------------------------------------------------------------


def test_stages_are_run_in_their_order() -> None:
    assert check_stages.parse_stages("bench, build") == ("build", "bench")
    for text in ("", "build,all"):
        with pytest.raises(ValueError, match="--stages: expected some of build,tests"):
            check_stages.parse_stages(text)


def test_plan_on_a_gpu() -> None:
    full = commands(WITH_GPU)
    build = full["build"]["extension"].environment
    assert (build["SPECRT_CUDA"], build["CMAKE_CUDA_ARCHITECTURES"]) == ("ON", "90a;80")
    assert list(full["sanitize"]) == ["memcheck", "racecheck"]
    assert "bench.one_of_each" in full["sanitize"]["racecheck"].argv
    assert full["tests"]["gpu"].argv[-5:-2] == ("-m", "gpu", "tests/ops")
    assert list(full["bench"]) == ["small_kernels", "tree_attention"]
    assert check_stages.choose_limits(WITH_GPU, is_essential=False).total < 9 * 60


def test_plan_of_the_essentials() -> None:
    quick = commands(WITH_GPU, is_essential=True)
    assert quick["build"]["extension"].environment["CMAKE_CUDA_ARCHITECTURES"] == "90a"
    assert list(quick["sanitize"]) == ["memcheck"]
    assert all("--quick" in one.argv for one in quick["bench"].values())
    assert check_stages.choose_limits(WITH_GPU, is_essential=True).total < 4 * 60


def test_plan_for_another_architecture() -> None:
    ada = replace(WITH_GPU, gpu={"capability": "8.9"})
    archs = commands(ada, "build")["build"]["extension"].environment["CMAKE_CUDA_ARCHITECTURES"]
    assert archs == "89;80;90a"


def test_plan_without_a_gpu() -> None:
    stages = check_stages.plan(WITHOUT_GPU, STAGES, True, Path("out"))
    assert [(stage.name, stage.skipped) for stage in stages if stage.skipped] == [
        ("sanitize", "no GPU"),
        ("bench", "no GPU"),
    ]
    found = commands(WITHOUT_GPU)
    assert found["build"]["extension"].environment["SPECRT_SIMT"] == "ON"
    assert list(found["tests"]) == ["shim", "kernels"]
    assert "-n" not in found["tests"]["shim"].argv


def test_plan_without_tools() -> None:
    bare = replace(WITH_GPU, absent=["hypothesis"], sanitizer=None)
    assert commands(bare)["tests"]["kernels"].argv[-1] == "bench.one_of_each"
    stages = check_stages.plan(bare, ("sanitize",), False, Path("out"))
    assert "compute-sanitizer is neither" in stages[0].skipped
    bare = replace(WITHOUT_GPU, absent=["pytest", "hypothesis"])
    stages = check_stages.plan(bare, ("tests",), False, Path("out"))
    assert stages[0].skipped == "this Python lacks pytest, hypothesis"


def test_flashinfer_is_compiled_before_the_benchmarks() -> None:
    machine = replace(WITH_GPU, has_flashinfer=True)
    assert next(iter(commands(machine)["bench"])) == "flashinfer"
    assert "flashinfer" not in commands(machine, is_essential=True)["bench"]


def test_choosing_python() -> None:
    def chosen(**missing: Sequence[str]) -> str | None:
        return check_stages.choose_python(list(missing), lambda python: missing[python])

    assert chosen(system=[], venv=[]) == "system"
    assert chosen(system=["pytest"], venv=[]) == "venv"
    assert chosen(system=["pytest"], venv=["torch", "pytest"]) == "system"
    assert chosen(system=["torch"], venv=["pybind11"]) is None


def test_lacking_modules() -> None:
    assert gpu_check.lacks(sys.executable, ("json", "no_such_module")) == ["no_such_module"]
    assert gpu_check.lacks("/no/python", ("json",)) == ["json"]


# --- judging ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "..\n12 passed, 3 skipped in 1.2s\n", (OK, "12 passed, 3 skipped")),
        (1, "1 failed, 12 passed in 1.2s", (FAILED, "exit code 1: 12 passed, 1 failed")),
        (0, "15 skipped in 1.2s", (FAILED, "exit code 0: 15 skipped")),
        (0, "12 passed in 61.20s (0:01:01)\nException ignored in: 1 socket", (OK, "12 passed")),
        (5, "40 deselected in 0.1s", (FAILED, "exit code 5: 40 deselected in 0.1s")),
        (4, "", (FAILED, "exit code 4: no output")),
    ],
)
def test_judging_pytest(code: int, output: str, verdict: tuple[str, str]) -> None:
    assert check_stages.judge_pytest(code, output) == verdict


@pytest.mark.parametrize(
    ("code", "lines", "verdict"),
    [
        (0, ["========= ERROR SUMMARY: 0 errors"], (OK, "ERROR SUMMARY: 0 errors")),
        (9, ["========= ERROR SUMMARY: 2 errors"], (FAILED, "ERROR SUMMARY: 2 errors")),
        (1, ["AssertionError: rms_norm"], (FAILED, "AssertionError: rms_norm")),
    ],
)
def test_judging_a_sanitizer(code: int, lines: list[str], verdict: tuple[str, str]) -> None:
    output = "\n".join([check_stages.READY, *lines])
    assert check_stages.judge_sanitizer(code, output) == verdict


def test_a_sanitizer_that_cannot_work_is_skipped() -> None:
    verdict = check_stages.judge_sanitizer(1, "========= Error: Device not supported\n")
    assert verdict == (
        SKIPPED,
        "the tool does not work here: ========= Error: Device not supported",
    )


def test_judging_benchmarks_and_the_rest() -> None:
    assert check_stages.judge_bench(0, 'a table\n{"rows": [1, 2]}\n') == (OK, "2 rows")
    assert check_stages.judge_bench(0, "a table\n")[0] == FAILED
    assert check_stages.judge_bench(1, "boom") == (FAILED, "exit code 1: boom")
    less = check_stages.judge_without_tests("no pytest")
    assert (less(0, "")[0], less(1, "boom")[0]) == (PARTIAL, FAILED)
    assert check_stages.judge_contender(1, "no nvcc") == (SKIPPED, "left out: no nvcc")
    assert check_stages.judge_exit(0, "boom") == (OK, "")


# --- running ----------------------------------------------------------------------------------


def python(name: str, code: str, **environment: str) -> Command:
    return Command(name, (sys.executable, "-c", code), check_stages.judge_exit, environment)


def report(tmp_path: Path) -> gpu_check.Report:
    return gpu_check.Report(tmp_path / "gpu_check.json", {"commit": "abc", "date": "2000"})


def limits_of(total: float, **stages: float) -> check_stages.Limits:
    return check_stages.Limits(total, stages)


def test_a_failing_stage_does_not_stop_the_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages = [
        Stage("build", [python("a", "print('why'); raise SystemExit(3)")]),
        Stage("tests", [python("b", "import os; assert os.environ['SET'] == '1'", SET="1")]),
        Stage("bench", skipped="no GPU"),
    ]
    with pytest.raises(SystemExit) as left:
        gpu_check.check(
            stages, limits_of(60, build=30, tests=30, bench=30), report(tmp_path), tmp_path
        )
    assert left.value.code == 1
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["status"] for row in saved["commands"]] == [FAILED, OK, SKIPPED]
    assert (saved["commit"], saved["passed"], saved["interrupted"]) == ("abc", False, False)
    assert (tmp_path / "build-a.log").read_text() == "why\n"
    lines = capfd.readouterr().out.splitlines()
    assert "why" in lines
    assert lines[-1].startswith("gpu-check: FAILED")
    assert [line.split()[:3] for line in lines[-5:-3]] == [
        ["build", "a", "failed"],
        ["tests", "b", "ok"],
    ]


def test_a_stage_that_overruns_is_cut(tmp_path: Path) -> None:
    """With the children of its command; what comes after has the rest of the time."""
    child = tmp_path / "child"
    code = f"import subprocess as s; p = s.Popen(['sleep', '60']); open({str(child)!r}, 'w')"
    code += ".write(str(p.pid)); p.wait()"
    stages = [
        Stage("build", [python("slow", code)]),
        Stage("tests", [python("quick", "pass")]),
        Stage("bench", [python("late", "pass")]),
    ]
    one = report(tmp_path)
    gpu_check.run_stages(stages, limits_of(30, build=3.2, tests=20, bench=0), one, tmp_path)
    assert [row["status"] for row in one.commands] == [CUT, OK, CUT]
    assert one.commands[0]["detail"] == "stopped after 3 s"
    assert one.commands[2]["detail"] == "no time was left"
    assert not one.has_passed
    assert _has_ended(int(child.read_text()))


def _has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody in this container collects."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_benchmark_is_told_its_budget(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1])"
    command = Command(
        "b", (sys.executable, "-c", code, check_stages.BUDGET), check_stages.judge_exit
    )
    assert gpu_check.run_command(command, 60, tmp_path / "log") == (OK, "")
    assert (tmp_path / "log").read_text() == "45\n"


def test_a_command_that_does_not_exist_has_failed(tmp_path: Path) -> None:
    command = Command("b", ("/no/such/program",), check_stages.judge_exit)
    assert gpu_check.run_command(command, 60, tmp_path / "log")[0] == FAILED


def test_results_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    stages = [Stage("build", [python("a", f"open({str(tmp_path / 'ran')!r}, 'w')")])]
    (tmp_path / "file").touch()
    one = gpu_check.Report(tmp_path / "file/gpu_check.json", {})
    with pytest.raises(SystemExit, match="cannot write there"):
        gpu_check.check(stages, limits_of(30, build=30), one, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_interruption_leaves_the_summary(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from bench import check_stages, gpu_check
def stage(name, command, code):
    argv = (sys.executable, "-c", code)
    return check_stages.Stage(name, [check_stages.Command(command, argv, check_stages.judge_exit)])
path = Path({str(tmp_path)!r})
wait = f"import time; open({{str(path / 'ready')!r}}, 'w'); time.sleep(60)"
stages = [stage("build", "a", "pass"), stage("tests", "b", wait)]
report = gpu_check.Report(path / "gpu_check.json", {{"date": "2000"}})
gpu_check.check(stages, check_stages.Limits(60, {{"build": 30, "tests": 30}}), report, path)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert process.returncode == 1
    assert (saved["interrupted"], saved["passed"]) == (True, False)
    assert [row["command"] for row in saved["commands"]] == ["a"]
    assert "gpu-check: INTERRUPTED" in output


def test_only_a_gpu_writes_results_that_are_kept() -> None:
    kept = ROOT / "bench/results"
    assert gpu_check.save_folder(None, WITH_GPU) == kept
    assert gpu_check.save_folder(None, WITHOUT_GPU) == kept / "local"
    assert gpu_check.save_folder(Path("/out"), WITHOUT_GPU) == Path("/out")


def test_listing_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "find_machine", lambda python: WITHOUT_GPU)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--list", "--save", str(tmp_path / "new")])
    gpu_check.main()
    shown = capsys.readouterr().out
    assert "GPU: torch sees none" in shown
    assert "python3 setup.py -q build_ext --inplace" in shown
    assert not (tmp_path / "new").exists()


def test_goals(tmp_path: Path) -> None:
    rows = [
        {"model": "Llama-3-8B", "batch": 1, "prefix": 2048, "nodes": 60, "us": 5.0, "sdpa/ours": 2},
        {"model": "Llama-3-8B", "batch": 4, "prefix": 8192, "nodes": 60, "us": 5.0},
    ]
    result: dict[str, Any] = {"environment": {"date": "2020-01-02"}, "rows": rows}
    (tmp_path / "tree_attention_cuda.json").write_text(json.dumps(result))
    assert goals.lines(tmp_path, "2020-01-01") == [
        "Llama-3-8B 1 2048 60: us 5, goal <= 6: reached",
        "Llama-3-8B 1 2048 60: sdpa/ours 2, goal >= 3: missed",
    ]
    assert goals.lines(tmp_path, "2020-01-03") == []
