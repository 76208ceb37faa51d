"""What ``make gpu-check`` runs on which machine, in which order, and for how long at the most.

Stage A is first contact, B measures variants and ``linear``, C whole rounds and end to end, D
trains drafters and measures them; each is one command that fits into a call of some minutes. Where
there is no GPU, ``shim`` builds and runs the tests of the CUDA sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check import judge
from bench.gpu_check.judge import Judge

ON_A_GPU = ("A", "B", "C", "D")
WITHOUT_GPU = "shim"
SECONDS: Mapping[str, float] = {"A": 480, "B": 540, "C": 420, "D": 540, WITHOUT_GPU: 1800}
"""The most that a stage takes."""
DRAFTERS: Mapping[str, float] = {"fspad": 60, "eesd": 45, "eagle2": 45}
"""Whose rounds are measured, and for how long at the most."""
PREPARES = "extension"
"""The command that others need: it runs again whatever became of it before."""
WORK = Path(__file__).resolve().parents[2] / "build/gpu_check/trained"
"""Of stage D: answers and drafters."""
BUDGET = "{budget}"
"""In a command: replaced by the seconds it should plan for."""
_NOTHING_TO_WATCH = "a dry run launches no kernel"
_DEFAULT_ARCHS = ("80", "90a")  # CMakeLists.txt's


@dataclass(frozen=True)
class Machine:
    """What was found."""

    python: str
    gpu: Mapping[str, Any]
    """``bench.gpu.facts``; empty without a GPU."""
    absent: Sequence[str]
    """Modules for tests that this Python lacks."""
    has_xdist: bool
    has_flashinfer: bool
    sanitizer: str | None
    """Path of compute-sanitizer."""
    profiler: str | None = None
    """Path of ncu."""
    is_dry: bool = False
    """Whether the GPU is made up: commands run through all of their code on the CPU."""
    problems: Path | None = None
    """JSONL to train on and to measure with."""
    target: str = "builtin"
    """That drafters are trained for: a directory, or the bundled one."""
    assistant: str | None = None
    """Directory of a smaller model, for transformers' assisted generation."""

    @property
    def arch(self) -> str:
        """The GPU's, as CMake spells it; sm_90 with its own instructions."""
        arch = str(self.gpu["capability"]).replace(".", "")
        return "90a" if arch == "90" else arch


@dataclass(frozen=True)
class Command:
    """One process of a stage, or the reason why it is left out."""

    name: str
    argv: Sequence[str]
    judge: Judge
    seconds: float
    """The most it takes; less where the stage's time runs out."""
    environment: Mapping[str, str] = field(default_factory=dict)
    is_aside: bool = False
    """Runs beside those that follow, until one needs it or the stage ends."""
    needs: str = ""
    """An aside that must have ended before."""
    is_spare: bool = False
    """Takes what time there is: when that ends, what it found still counts."""
    skipped: str = ""


def names_of(text: str) -> tuple[str, ...]:
    """``"A,C"`` in the order given.

    Raises:
        ValueError: a name is unknown.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    known = (*ON_A_GPU, WITHOUT_GPU)
    if not names or set(names) - set(known):
        raise ValueError(f"--stages: expected some of {','.join(known)}, got {text!r}")
    return tuple(dict.fromkeys(names))


def plan(machine: Machine, stage: str, save: Path) -> list[Command]:
    """The commands of a stage; benchmarks write their JSON into ``save``."""
    makers: dict[str, Callable[[Machine, Path], list[Command]]] = {
        "A": _first_contact,
        "B": _variants,
        "C": _end_to_end,
        "D": _trained,
        WITHOUT_GPU: _shim,
    }
    return makers[stage](machine, save)


# --- the stages -------------------------------------------------------------------------------


def _first_contact(machine: Machine, save: Path) -> list[Command]:
    """Facts first, then correctness, then figures: what is cut at the end matters least."""
    return [
        _python(machine, "device", "bench.gpu", judge.device, 30),
        _extension(machine),
        _python(machine, "one of each", "bench.one_of_each", judge.by_last_line, 60),
        _probes(machine, save),
        _flashinfer(machine),
        _sanitizer(machine, "memcheck", 75),
        _gpu_tests(machine, 130),
        _bench(machine, "linear_rows", save, 45),
        _resources(machine),
        _bench(machine, "bench_small_kernels", save, 50, "--device", "cuda", "--quick"),
        _bench(machine, "bench_tree_attention", save, 80, "--device", "cuda", "--quick"),
    ]


def _variants(machine: Machine, save: Path) -> list[Command]:
    return [
        _extension(machine),
        _flashinfer(machine),
        _bench(machine, "variants", save, 110, "--kernel", "linear", name="linear variants"),
        _bench(machine, "bench_linear", save, 100, "--device", "cuda"),
        _bench(machine, "variants", save, 150),
        _profiles(machine, save),
        _bench(machine, "bench_small_kernels", save, 60, "--device", "cuda"),
        _bench(machine, "bench_tree_attention", save, 120, "--device", "cuda"),
    ]


def _end_to_end(machine: Machine, save: Path) -> list[Command]:
    return [
        _extension(machine),
        _bench(machine, "generate_cuda", save, 90),
        _demo(machine),
        _python(machine, "predicted", "bench.bench_round", judge.bench, 30, *_predict(save)),
        *(_drafted_rounds(machine, save, name, most) for name, most in DRAFTERS.items()),
        _bench(machine, "bench_round", save, 100, "--device", "cuda"),
        _bench(machine, "bench_prefill", save, 40, "--device", "cuda"),
        _bench(machine, "end_to_end_cuda", save, 90),
        _slow_gpu_tests(machine, 100),
        _sanitizer(machine, "racecheck", 200, is_spare=True),
    ]


def _trained(machine: Machine, save: Path) -> list[Command]:
    """Answers, drafters, figures; whether a token differs takes what time is left, as one that did
    would have been seen among the figures."""
    return [
        _extension(machine),
        _bench(machine, "train_cuda", save, 50),
        _step(machine, "answers", save, 70),
        _step(machine, "fspad", save, 90),
        _step(machine, "eesd", save, 80),
        _step(machine, "eagle2", save, 75),
        _step(machine, "speed", save, 170),
        _step(machine, "exact", save, 120, is_spare=True),
    ]


def _shim(machine: Machine, save: Path) -> list[Command]:
    build = (machine.python, "setup.py", "-q", "build_ext", "--inplace")
    environment = {"SPECRT_CUDA": "AUTO", "SPECRT_SIMT": "ON"}
    commands = [Command(PREPARES, build, judge.by_exit, 900, environment)]
    if machine.absent:
        lack = f"this Python lacks {', '.join(machine.absent)}"
        return [*commands, _left_out("shim", lack)]
    pytest, settings = _pytest(machine, 2)
    return [
        *commands,
        Command("shim", (*pytest, "tests/simt"), judge.tests, 600, settings),
        Command("kernels", (*pytest, "-k", "simt", "tests/ops"), judge.tests, 600, settings),
    ]


# --- their commands ---------------------------------------------------------------------------


def _left_out(name: str, reason: str) -> Command:
    return Command(name, (), judge.by_exit, 0, skipped=reason)


def _python(
    machine: Machine, name: str, module: str, verdict: Judge, seconds: float, *arguments: str
) -> Command:
    dry = ("--dry",) if machine.is_dry else ()
    return Command(name, (machine.python, "-m", module, *arguments, *dry), verdict, seconds)


def _extension(machine: Machine) -> Command:
    archs = ";".join(dict.fromkeys((machine.arch, *_DEFAULT_ARCHS)))
    environment = {
        "SPECRT_CUDA": "ON",
        "SPECRT_SIMT": "OFF",
        "CMAKE_CUDA_ARCHITECTURES": archs,
        # This machine's compilers may be newer than those that lint.
        "SPECRT_WERROR": "OFF",
    }
    command = _python(machine, PREPARES, "bench.extension", judge.by_last_line, 240)
    return Command(PREPARES, command.argv, command.judge, command.seconds, environment)


def _probes(machine: Machine, save: Path) -> Command:
    arguments = ("--save", str(save), "--budget", BUDGET)
    return _python(machine, "probes", "bench.probes", judge.bench, 90, *arguments)


def _flashinfer(machine: Machine) -> Command:
    """Its kernels compile while tests run."""
    if machine.is_dry:
        return _left_out("flashinfer", "a dry run has no GPU to compile for")
    if not machine.has_flashinfer:
        return _left_out("flashinfer", "not installed: the benchmarks go without it")
    argv = (machine.python, "-m", "bench.flashinfer_contender")
    # ninja would take all cores, and the tests beside it want half of them.
    return Command("flashinfer", argv, judge.contender, 240, {"MAX_JOBS": "8"}, is_aside=True)


def _sanitizer(machine: Machine, tool: str, seconds: float, *, is_spare: bool = False) -> Command:
    if machine.is_dry:
        return _left_out(tool, _NOTHING_TO_WATCH)
    if machine.sanitizer is None:
        return _left_out(tool, "compute-sanitizer is neither on PATH nor beside nvcc")
    argv = (machine.sanitizer, "--tool", tool, "--error-exitcode", "9")
    # torch and its libraries ask the driver for more than it has, which is no fault of a kernel's;
    # a launch of ours that fails raises.
    argv += ("--report-api-errors", "no", "--kernel-name", "kns=specrt")
    argv += (machine.python, "-m", "bench.one_of_each")
    # Else a whole pool is one allocation, and what lies beyond a tensor is within bounds.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Command(tool, argv, judge.sanitizer, seconds, environment, is_spare=is_spare)


def _pytest(machine: Machine, workers: int) -> tuple[tuple[str, ...], dict[str, str]]:
    argv = (machine.python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # A module that this machine cannot import leaves the others.
    argv += ("--continue-on-collection-errors",)
    if machine.has_xdist:
        argv += ("-n", str(workers), "--dist", "loadfile")
    return argv, {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _gpu_tests(machine: Machine, seconds: float) -> Command:
    if machine.absent:
        verdict = judge.without_tests(f"this Python lacks {', '.join(machine.absent)}")
        return _python(machine, "gpu tests", "bench.one_of_each", verdict, seconds)
    return _tests_marked(machine, "gpu tests", "gpu and not slow", seconds)


def _slow_gpu_tests(machine: Machine, seconds: float) -> Command:
    """More of the same: seeds, loads, drafters."""
    name = "slow gpu tests"
    if machine.absent:
        return _left_out(name, f"this Python lacks {', '.join(machine.absent)}")
    return _tests_marked(machine, name, "gpu and slow", seconds, is_spare=True)


def _tests_marked(
    machine: Machine, name: str, marks: str, seconds: float, *, is_spare: bool = False
) -> Command:
    pytest, environment = _pytest(machine, 8)
    verdict = judge.tests
    if machine.is_dry:
        pytest = (machine.python, "-m", "pytest", "-q", "--collect-only")
        verdict = judge.collected
    # The shim's own tests need the shim, which is not built there.
    argv = (*pytest, "-m", marks, "tests", "--ignore", "tests/simt")
    return Command(name, argv, verdict, seconds, environment, is_spare=is_spare)


def _resources(machine: Machine) -> Command:
    if machine.is_dry:
        return _left_out("resources", "a dry run builds nothing")
    return _python(machine, "resources", "bench.resources", judge.resources, 30, "--check")


def _predict(save: Path) -> tuple[str, ...]:
    """What a round should take, beside what it does."""
    return "--predict", "--save", str(save)


def _demo(machine: Machine) -> Command:
    """As a user sees it, in its log."""
    if machine.is_dry:
        return _left_out("demo", "a dry run has no GPU to show")
    argv = (machine.python, "-m", "specrt", "demo", "--device", "cuda")
    return Command("demo", argv, judge.demo, 35)


def _drafted_rounds(machine: Machine, save: Path, drafter: str, seconds: float) -> Command:
    options = ("--device", "cuda", "--drafter", drafter)
    return _bench(machine, "bench_round", save, seconds, *options, name=f"{drafter} round")


def _bench(
    machine: Machine, module: str, save: Path, seconds: float, *options: str, name: str = ""
) -> Command:
    arguments = [*options, "--save", str(save), "--budget", BUDGET]
    if machine.is_dry and "--quick" not in options:
        arguments.append("--quick")
    name = name or module.removeprefix("bench_")
    command = _python(machine, name, f"bench.{module}", judge.bench, seconds, *arguments)
    needs = "flashinfer" if name == "tree_attention" else ""
    return Command(name, command.argv, command.judge, seconds, needs=needs)


def _step(
    machine: Machine, step: str, save: Path, seconds: float, *, is_spare: bool = False
) -> Command:
    """Of drafters that are trained here; the steps share a folder."""
    if machine.problems is None and not machine.is_dry:
        return _left_out(step, "no problems: --data FILE, or a package that brought one")
    work = WORK / "dry" if machine.is_dry else WORK
    arguments = [step, "--work", str(work), "--target", machine.target]
    arguments += ["--data", str(machine.problems)] if machine.problems else []
    arguments += ["--assistant", machine.assistant] if machine.assistant else []
    arguments += ["--save", str(save), "--budget", BUDGET]
    module = "bench.trained_cuda"
    found = _python(machine, step, module, judge.bench, seconds, *arguments)
    return Command(step, found.argv, found.judge, seconds, is_spare=is_spare)


def _profiles(machine: Machine, save: Path) -> Command:
    if machine.is_dry:
        return _left_out("profiles", _NOTHING_TO_WATCH)
    if machine.profiler is None:
        return _left_out("profiles", "ncu is neither on PATH nor beside nvcc")
    arguments = ("--ncu", machine.profiler, "--save", str(save))
    command = _python(machine, "profiles", "bench.profiles", judge.by_last_line, 70, *arguments)
    return Command("profiles", command.argv, command.judge, 70, is_spare=True)
