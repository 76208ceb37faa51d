"""Which nvcc a build takes, and what it says when that one cannot compile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bench import build_times
from bench.resources import last_build_commands
from bench.toolkit import find_tool

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
SCRIPT = """
cmake_minimum_required(VERSION 3.22)
include("{module}")
specrt_choose_nvcc("80;90a" nvcc reason)
message(STATUS "nvcc=${{nvcc}}=")
if(NOT reason STREQUAL "")
  specrt_say_no_cuda("${{MODE}}" "${{reason}}")
endif()
"""
WORKS = "exit 0"
# What is special to CMake, too: semicolons, brackets, dollars.
BROKEN = 'for i in 1 2 3 4 5 6 7; do echo "error $i; [x] \\${y}" >&2; done; exit 2'


def make_tool(folder: Path, body: str = WORKS, name: str = "nvcc") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments\n{body}\n')
    path.chmod(0o755)
    return str(path)


def configure(tmp_path: Path, mode: str = "AUTO", **environ: str) -> tuple[int, str]:
    """Exit status and output of the choice alone; the usual toolkit is ``tmp_path/usual``."""
    if CMAKE is None:
        pytest.skip("no cmake")
    script = tmp_path / "choose.cmake"
    script.write_text(SCRIPT.format(module=ROOT / "cmake/nvcc.cmake"))
    argv = [CMAKE, f"-DMODE={mode}", f"-DSPECRT_USUAL_CUDA={tmp_path}/usual", "-P", str(script)]
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env={"PATH": "/nowhere", "LC_ALL": "C", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_nvcc_is_looked_for_outside_of_path_too(tmp_path: Path) -> None:
    """CMake and Python in the same order: each place is taken away once it was found."""
    places = [("CUDACXX", "own"), ("PATH", "path"), ("CUDA_HOME", "home"), ("CUDA_PATH", "other")]
    environ = {"PATH": "/nowhere"}
    for variable, folder in places:
        environ[variable] = str(tmp_path / folder)
        make_tool(tmp_path / folder / ("bin" if variable.startswith("CUDA_") else ""))
    environ["CUDACXX"] = f"{tmp_path}/own/nvcc -O1"
    make_tool(tmp_path / "usual/bin")
    for variable, folder in [*places, ("", "usual")]:
        code, output = configure(tmp_path, **environ)
        found = find_tool("nvcc", environ, tmp_path / "usual")
        assert found is not None and Path(found).is_relative_to(tmp_path / folder)
        assert code == 0 and f"nvcc={found}=" in output and "CPU" not in output
        environ.pop(variable, None)
    shutil.rmtree(tmp_path / "usual")
    assert find_tool("nvcc", environ, tmp_path / "usual") is None
    code, output = configure(tmp_path, **environ)
    assert code == 0 and "nvcc==" in output
    assert f"CPU backend only: no nvcc was found on PATH or in {tmp_path}/usual/bin" in output


def test_an_nvcc_that_was_asked_for_is_not_replaced(tmp_path: Path) -> None:
    make_tool(tmp_path / "usual/bin")
    environ = {"CUDACXX": f"{tmp_path}/gone/nvcc"}
    _, output = configure(tmp_path, **environ)
    assert f"CPU backend only: CUDACXX names {tmp_path}/gone/nvcc, which is not there" in output
    assert find_tool("nvcc", environ, tmp_path / "usual") is None


def test_why_nvcc_cannot_compile_is_said(tmp_path: Path) -> None:
    nvcc = make_tool(tmp_path / "usual/bin", BROKEN)
    code, output = configure(tmp_path)
    lines = [f"-- specrt:   error {i}; [x] ${{y}}" for i in range(3, 8)]
    said = "\n".join([f"-- specrt: CPU backend only: {nvcc} cannot compile:", *lines])
    assert code == 0 and output.endswith(f"-- nvcc==\n{said}\n")
    code, output = configure(tmp_path, "ON")
    assert code != 0 and "SPECRT_CUDA=ON, but" in output and nvcc in output
    assert "error 7; [x] ${y}" in output


def test_a_silent_nvcc_is_told_by_its_status(tmp_path: Path) -> None:
    make_tool(tmp_path / "usual/bin", "exit 7")
    assert "it printed nothing and gave: 7" in configure(tmp_path)[1]


def test_nvcc_is_tried_for_the_architectures_and_host_compiler(tmp_path: Path) -> None:
    make_tool(tmp_path / "usual/bin")
    asked = f"{tmp_path}/usual/bin/nvcc -allow-unsupported-compiler"
    configure(tmp_path, CUDACXX=asked, CUDAFLAGS="-DX='a b'", CUDAHOSTCXX="/opt/c++")
    arguments = (tmp_path / "usual/bin/arguments").read_text()
    for flag in ("arch=compute_80,code=sm_80", "code=sm_90a", "-ccbin /opt/c++", "-DX=a b"):
        assert flag in arguments
    assert "-allow-unsupported-compiler" in arguments


def test_a_blank_variable_names_no_nvcc(tmp_path: Path) -> None:
    nvcc = make_tool(tmp_path / "usual/bin")
    code, output = configure(tmp_path, CUDACXX=" ")
    assert code == 0 and f"nvcc={nvcc}=" in output
    assert find_tool("nvcc", {"PATH": "/nowhere", "CUDACXX": " "}, tmp_path / "usual") == nvcc


def test_other_tools_come_from_the_toolkit_that_nvcc_belongs_to(tmp_path: Path) -> None:
    make_tool(tmp_path / "toolkit/bin")
    beside = make_tool(tmp_path / "toolkit/bin", name="cuobjdump")
    sanitizer = make_tool(tmp_path / "toolkit/compute-sanitizer", name="compute-sanitizer")
    make_tool(tmp_path / "home/bin", name="cuobjdump")
    (tmp_path / "path").mkdir()
    os.symlink(tmp_path / "toolkit/bin/nvcc", tmp_path / "path/nvcc")
    environ = {"PATH": str(tmp_path / "path"), "CUDA_HOME": str(tmp_path / "home")}
    assert find_tool("cuobjdump", environ) == beside
    assert find_tool("compute-sanitizer", environ) == sanitizer
    on_path = make_tool(tmp_path / "path", name="cuobjdump")
    assert find_tool("cuobjdump", environ) == on_path


def test_a_build_is_timed_architecture_by_architecture() -> None:
    flags = [f"--generate-code=arch=compute_{a},code=[compute_{a},sm_{a}]" for a in ("80", "90a")]
    command = ["nvcc", "-O3", *flags, "--threads=0", "-c", "/x/csrc/a/a.cu", "-o", "a.o"]
    found = build_times.compilations([command])
    assert [(one.source, one.arch) for one in found] == [("a/a.cu", "sm_80"), ("a/a.cu", "sm_90a")]
    assert found[1].argv == ("nvcc", "-O3", "-c", "/x/csrc/a/a.cu", flags[1])
    assert build_times.for_arch(found[0], "sm_90a") == found[1]


def test_what_takes_too_long_is_named() -> None:
    one = build_times.Compilation("a/a.cu", "sm_80", ())
    assert build_times.too_long([(one, 15.1), (one, 14.9)], 15.0) == [
        "a/a.cu (sm_80): 15.1 s of nvcc, at most 15 were to be"
    ]


NO_GPU = "echo NVIDIA-SMI 9.0 has failed; exit 9"


@pytest.mark.parametrize(
    ("smi", "asked", "archs"),
    [
        (NO_GPU, {}, "80"),
        ("printf '9.0\\n9.0\\n'", {}, "90a"),
        ("printf '9.0\\n8.6\\n12.0\\n'", {}, "80;90a"),
        (NO_GPU, {"CMAKE_CUDA_ARCHITECTURES": "80;90a"}, "80;90a"),
    ],
)
def test_make_builds_for_the_gpus_that_are_here(
    tmp_path: Path, smi: str, asked: dict[str, str], archs: str
) -> None:
    make_tool(tmp_path, smi, name="nvidia-smi")
    environ = {key: os.environ[key] for key in os.environ if key != "CMAKE_CUDA_ARCHITECTURES"}
    environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", **asked}
    argv = ["make", "-n", "ext", "PYTHON=false"]
    done = subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert f"CMAKE_CUDA_ARCHITECTURES='{archs}' .venv/bin/python setup.py" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_source_compiles_for_the_architectures_that_make_left_out(tmp_path: Path) -> None:
    """With the build's own flags, under which a register that spills is an error."""
    try:
        built = build_times.compilations(last_build_commands())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for arch in {"sm_80", "sm_90a"} - {one.arch for one in built}:
        for one in {one.source: one for one in built}.values():
            argv = [*build_times.for_arch(one, arch).argv, "-o", tmp_path / "out.o"]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{one.source} ({arch}): {done.stderr}"


@pytest.mark.parametrize(
    ("mode", "reason"), [("OFF", "SPECRT_CUDA=OFF"), ("AUTO", "nvcc cannot compile")]
)
def test_a_machine_without_cuda_configures(tmp_path: Path, mode: str, reason: str) -> None:
    pybind11 = pytest.importorskip("pybind11")
    if CMAKE is None:
        pytest.skip("no cmake")
    argv = [CMAKE, "-S", ROOT, "-B", tmp_path / "build", f"-DSPECRT_CUDA={mode}"]
    argv += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    environ = {**os.environ, "CUDACXX": make_tool(tmp_path, BROKEN)}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"-- specrt: CPU backend only: .*{reason}", done.stdout)
