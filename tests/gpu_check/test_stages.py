"""What is run on which machine, and how outcomes are judged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu_check import judge, machine, stages
from bench.gpu_check.judge import FAILED, OK, PARTIAL, SKIPPED, Verdict
from bench.gpu_check.stages import Command, Machine

H100 = {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
WITH_GPU = Machine("python3", H100, (), True, True, "/opt/compute-sanitizer", "/opt/ncu")
WITHOUT_GPU = Machine("python3", {}, (), False, False, None)


def commands(machine: Machine, stage: str) -> dict[str, Command]:
    return {one.name: one for one in stages.plan(machine, stage, Path("out"))}


def test_stages_by_name() -> None:
    assert stages.names_of("C, A,C") == ("C", "A")
    for text in ("", "A,E"):
        with pytest.raises(ValueError, match="--stages: expected some of A,B,C,D,shim"):
            stages.names_of(text)


def test_first_contact_asks_for_facts_then_correctness_then_figures() -> None:
    names = list(commands(WITH_GPU, "A"))
    assert names[:4] == ["device", "extension", "one of each", "probes"]
    order = ["memcheck", "gpu tests", "linear_rows", "small_kernels", "tree_attention"]
    assert [name for name in names if name in order] == order
    build = commands(WITH_GPU, "A")["extension"].environment
    assert (build["SPECRT_CUDA"], build["CMAKE_CUDA_ARCHITECTURES"]) == ("ON", "90a;80")
    ada = replace(WITH_GPU, gpu={"capability": "8.9"})
    archs = commands(ada, "A")["extension"].environment["CMAKE_CUDA_ARCHITECTURES"]
    assert archs == "89;80;90a"


def test_flashinfer_compiles_while_tests_run() -> None:
    found = commands(WITH_GPU, "A")
    assert found["flashinfer"].is_aside and found["tree_attention"].needs == "flashinfer"
    names = list(found)
    assert names.index("flashinfer") < names.index("gpu tests") < names.index("tree_attention")
    without = commands(replace(WITH_GPU, has_flashinfer=False), "A")["flashinfer"]
    assert "not installed" in without.skipped


def test_the_last_of_the_end_to_end_stage_takes_what_time_is_left() -> None:
    names = ["extension", "generate_cuda", "demo", "predicted", "fspad round", "eesd round"]
    names += ["eagle2 round", "round", "prefill"]
    names += ["end_to_end_cuda", "slow gpu tests", "racecheck"]
    assert list(commands(WITH_GPU, "C")) == names
    spare = [one.name for one in commands(WITH_GPU, "C").values() if one.is_spare]
    assert spare == ["slow gpu tests", "racecheck"]
    assert "bench.one_of_each" in commands(WITH_GPU, "C")["racecheck"].argv


def test_variants_of_linear_come_first() -> None:
    """Then what ``linear`` takes by the one in use, then other kernels."""
    found = commands(WITH_GPU, "B")
    names = ["extension", "flashinfer", "linear variants", "linear", "variants"]
    assert list(found)[:5] == names
    assert "bench.variants --kernel linear" in " ".join(found["linear variants"].argv)


def test_stages_fit_into_a_call() -> None:
    assert {name: stages.SECONDS[name] for name in stages.ON_A_GPU} == {
        "A": 480,
        "B": 540,
        "C": 420,
        "D": 540,
    }


def test_drafters_are_trained_on_the_problems_there_are(tmp_path: Path) -> None:
    """What is wrong would show in the figures too: the look at every token comes last."""
    names = ["extension", "train_cuda", "answers", "fspad", "eesd", "eagle2", "speed", "exact"]
    given = replace(WITH_GPU, problems=tmp_path / "data", target="/model", assistant="/small")
    found = commands(given, "D")
    assert list(found) == list(commands(WITH_GPU, "D")) == names
    must = [one for one in found.values() if one.name != "extension" and not one.is_spare]
    assert sum(one.seconds for one in must) <= stages.SECONDS["D"]
    for name in names[2:]:
        assert "no problems: --data FILE" in commands(WITH_GPU, "D")[name].skipped
        argv = " ".join(found[name].argv)
        assert f"bench.trained_cuda {name} --work {stages.WORK} --target /model" in argv
        assert f"--data {tmp_path}/data --assistant /small" in argv
    assert [one.name for one in found.values() if one.is_spare] == ["exact"]
    dry = commands(replace(WITH_GPU, is_dry=True), "D")["fspad"].argv
    assert "--data" not in dry and str(stages.WORK / "dry") in dry


def test_plan_without_a_gpu() -> None:
    found = commands(WITHOUT_GPU, "shim")
    assert found["extension"].environment["SPECRT_SIMT"] == "ON"
    assert list(found) == ["extension", "shim", "kernels"]
    assert "-n" not in found["shim"].argv
    bare = commands(replace(WITHOUT_GPU, absent=["pytest", "hypothesis"]), "shim")
    assert bare["shim"].skipped == "this Python lacks pytest, hypothesis"


def test_plan_without_tools() -> None:
    bare = replace(WITH_GPU, absent=["hypothesis"], sanitizer=None, profiler=None)
    assert commands(bare, "A")["gpu tests"].argv[-1] == "bench.one_of_each"
    assert "compute-sanitizer is neither" in commands(bare, "A")["memcheck"].skipped
    assert "ncu is neither" in commands(bare, "B")["profiles"].skipped


@pytest.mark.parametrize(("stage", "tool"), [("A", "memcheck"), ("C", "racecheck")])
def test_a_sanitizer_judges_our_kernels_alone(stage: str, tool: str) -> None:
    """Not what torch asks a driver in vain, as it does whenever it starts."""
    argv = " ".join(commands(WITH_GPU, stage)[tool].argv)
    assert "--report-api-errors no --kernel-name kns=specrt" in argv


@pytest.mark.parametrize("stage", stages.ON_A_GPU)
def test_a_dry_run_has_the_same_commands(stage: str) -> None:
    """Each says that it is dry, or is left out with the reason."""
    dry = commands(replace(WITH_GPU, is_dry=True), stage)
    assert list(dry) == list(commands(WITH_GPU, stage))
    for command in dry.values():
        is_told = "--dry" in command.argv or "--collect-only" in command.argv
        assert is_told != bool(command.skipped), command.name


def test_every_module_of_a_plan_exists() -> None:
    root = Path(__file__).parents[2]
    for stage in stages.ON_A_GPU:
        for command in commands(WITH_GPU, stage).values():
            parts = list(command.argv)
            module = parts[parts.index("-m") + 1] if "-m" in parts else "pytest"
            if module != "pytest":
                path = root / module.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_choosing_python() -> None:
    def chosen(**missing: Sequence[str]) -> str | None:
        return machine.choose_python(list(missing), lambda python: missing[python])

    assert chosen(system=[], venv=[]) == "system"
    assert chosen(system=["pytest"], venv=[]) == "venv"
    assert chosen(system=["pytest"], venv=["torch", "pytest"]) == "system"
    assert chosen(system=["torch"], venv=["pybind11"]) is None


def test_lacking_modules() -> None:
    assert machine.lacks(sys.executable, ("json", "no_such_module")) == ["no_such_module"]
    assert machine.lacks("/no/python", ("json",)) == ["json"]


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
        (-11, "..", (FAILED, "killed by signal 11: ..")),
    ],
)
def test_judging_pytest(code: int, output: str, verdict: Verdict) -> None:
    assert judge.tests(code, output) == verdict


def test_judging_a_collection() -> None:
    line = "394/3844 tests collected (3450 deselected) in 7.13s"
    assert judge.collected(0, line) == (OK, "394 tests would run")
    assert judge.collected(2, f"{line[:-9]}, 1 error in 7.13s")[0] == FAILED


@pytest.mark.parametrize(
    ("code", "lines", "verdict"),
    [
        (0, ["========= ERROR SUMMARY: 0 errors"], (OK, "ERROR SUMMARY: 0 errors")),
        (9, ["========= ERROR SUMMARY: 2 errors"], (FAILED, "ERROR SUMMARY: 2 errors")),
        (1, ["AssertionError: rms_norm"], (FAILED, "AssertionError: rms_norm")),
    ],
)
def test_judging_a_sanitizer(code: int, lines: list[str], verdict: Verdict) -> None:
    assert judge.sanitizer(code, "\n".join([judge.READY, *lines])) == verdict


def test_a_sanitizer_that_cannot_work_is_skipped() -> None:
    assert judge.sanitizer(1, "========= Error: Device not supported\n") == (
        SKIPPED,
        "the tool does not work here: ========= Error: Device not supported",
    )


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, 'a table\n{"rows": [1, 2]}\n', (OK, "2 rows")),
        (0, '{"rows": [1, 2]}\nleaked 3 instances!\n', (OK, "2 rows")),
        (0, "a table\n", (FAILED, "exit code 0: no JSON in the last line: a table")),
        (0, '{"rows": [1, ', (FAILED, 'exit code 0: no JSON in the last line: {"rows": [1,')),
        (0, '{"rows": 3}', (FAILED, 'exit code 0: no JSON in the last line: {"rows": 3}')),
        (1, "boom", (FAILED, "exit code 1: boom")),
        (-6, "", (FAILED, "killed by signal 6: no output")),
        (1, '{"rows": [1], "failed": ["P3: hung"]}', (FAILED, "1 rows; failed: P3: hung")),
    ],
)
def test_judging_benchmarks(code: int, output: str, verdict: Verdict) -> None:
    assert judge.bench(code, output) == verdict


def test_judging_the_rest() -> None:
    less = judge.without_tests("no pytest")
    assert (less(0, "")[0], less(1, "boom")[0]) == (PARTIAL, FAILED)
    assert judge.contender(1, "no nvcc") == (SKIPPED, "left out: no nvcc")
    assert judge.by_exit(0, "boom") == (OK, "")
    facts = '{"device": "H100", "driver": "580", "num_sms": 132}'
    assert judge.device(0, facts) == (OK, "device H100, driver 580")
    assert judge.device(0, "{}")[0] == FAILED
    assert judge.resources(0, '{"kernels": 9, "spills": []}') == (OK, "9 kernels, none spills")
    spilled = judge.resources(1, '{"kernels": 9, "spills": ["k (sm_90a): 8 bytes"]}')
    assert spilled == (FAILED, "1 kernels spill: k (sm_90a): 8 bytes")
    said_again = judge.resources(1, '{"kernels": 9, "spills": ["k: 8 bytes"]}\nk: 8 bytes\n')
    assert said_again == (FAILED, "1 kernels spill: k: 8 bytes")


def test_verdicts_on_a_demo() -> None:
    """By its last sum."""
    told = "equal: 64 of 64 tokens\nwords\nequal: {} of 224 tokens\ntau: mean\n"
    assert judge.demo(0, told.format(224)) == (OK, "equal: 224 of 224 tokens")
    for code, output in ((0, told.format(223)), (1, told.format(224)), (0, "")):
        assert judge.demo(code, output)[0] == FAILED
