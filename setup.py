"""Builds ``specrt._C`` with CMake; everything else is in pyproject.toml.

Environment: SPECRT_CUDA=AUTO|ON|OFF, CMAKE_CUDA_ARCHITECTURES (default 80;90a),
CUDACXX, CUDA_HOME, CUDA_PATH (where nvcc is: cmake/nvcc.cmake),
SPECRT_WERROR=ON|OFF (default OFF: a newer compiler's new warning must not stop an installation),
SPECRT_SIMT=ON (also builds tests/simt/_simt, which runs the CUDA sources on the CPU),
CMAKE_ARGS (more flags).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str | None:
    """The first ``name`` that runs: on PATH, else in this venv, which need not be active."""
    for candidate in (shutil.which(name), shutil.which(name, path=sysconfig.get_path("scripts"))):
        if candidate is None:
            continue
        probe = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        if probe.returncode == 0:
            return candidate
    return None


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt once; the extension lands where setuptools wants it."""

    def run(self) -> None:
        # Kept, because setuptools clears it while extensions are built, and copies them afterwards.
        self._is_in_place = bool(self.inplace)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake")
        if cmake is None:
            raise RuntimeError("specrt needs cmake >= 3.22 to build: pip install cmake ninja")
        ninja = find_tool("ninja")
        cuda = os.environ.get("SPECRT_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise ValueError(f"SPECRT_CUDA: expected AUTO, ON or OFF, got {cuda!r}")
        # In place, the build folder outlives this command (pip's own does not), and so the next
        # build compiles only what changed. Generator and CUDA mode are CMake's to cache.
        is_kept = self._is_in_place
        base = ROOT / "build" / "inplace" if is_kept else Path(self.build_temp).resolve()
        folder = base / f"{sys.implementation.cache_tag}-{'ninja' if ninja else 'make'}-{cuda}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent

        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SPECRT_CUDA": cuda,
            "SPECRT_VERSION": self.distribution.get_version(),
            "SPECRT_WERROR": os.environ.get("SPECRT_WERROR", "OFF"),
        }
        if ninja:
            # Said anew each time: the one of an isolated build is gone by the next.
            defines["CMAKE_MAKE_PROGRAM"] = ninja
        if archs := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            defines["CMAKE_CUDA_ARCHITECTURES"] = archs
        has_simt = os.environ.get("SPECRT_SIMT", "OFF").upper() == "ON"
        if has_simt:
            # Never set to OFF: CMake would remove what was compiled for it.
            defines["SPECRT_SIMT"] = "ON"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder)]
        configure += ["-G", "Ninja" if ninja else "Unix Makefiles"]
        # Not this one: what one build asked for would stay for those that ask for nothing.
        configure += ["-UCMAKE_CUDA_ARCHITECTURES"]
        configure += [f"-D{key}={value}" for key, value in defines.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)

        build = [cmake, "--build", str(folder), "--target", "_C", *(["_simt"] if has_simt else [])]
        if "CMAKE_BUILD_PARALLEL_LEVEL" not in os.environ:
            build += ["--parallel", str(os.cpu_count() or 1)]
        subprocess.run(build, check=True)


setup(ext_modules=[Extension("specrt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
