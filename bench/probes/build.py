"""The probes' program: built with nvcc, or found, and known to be made of the sources at hand."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.toolkit import find_tool

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "probes"
FOLDER = ROOT / "build/probes"
BROUGHT_ALONG = ROOT / "build/gpu-package/probes"
"""Where ``make gpu-package`` puts it."""
DEFAULT_ARCH = "90a"
"""The probes are Hopper's; for another GPU they leave out what only Hopper has."""
_SOURCES = ("bench/probes/*.cu", "bench/probes/*.cuh", "bench/probes/*.h", "csrc/core/*.h")
_MORE_SOURCES = ("csrc/core/*.cuh", "tests/simt/fused_sum.h")
_SHOWN_ERROR = 2000
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class BuildError(Exception):
    """The program cannot be had; the reason in a few lines."""


def source_digest() -> str:
    """Of all that the program is made of, names and contents; a short one."""
    digest = hashlib.sha256()
    for pattern in (*_SOURCES, *_MORE_SOURCES):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def found_arch() -> str | None:
    """The first GPU's architecture as nvcc spells it, from the driver; None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    asked = [
        driver.cuInit(0),
        driver.cuDeviceGetCount(ctypes.byref(count)),
        driver.cuDeviceGet(ctypes.byref(device), 0),
    ]
    if any(asked) or count.value == 0:
        return None
    arch = ""
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        arch += str(value.value)
    return "90a" if arch == "90" else arch


def compile_commands(nvcc: str, archs: Sequence[str], folder: Path) -> Iterator[list[str]]:
    """One for each source; the last links what they gave."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    common = [nvcc, "-std=c++17", "-O2", *targets]
    objects = []
    for source in sorted(ROOT.glob("bench/probes/*.cu")):
        objects.append(str(folder / f"{source.stem}.o"))
        define = f'-DPROBES_SOURCES="{source_digest()}"'
        include = [f"-I{ROOT}", f"-I{ROOT / 'csrc'}"]
        yield [*common, define, *include, "-c", str(source), "-o", objects[-1]]
    yield [*common, *objects, "-o", str(folder / PROGRAM)]


def build(folder: Path, archs: Sequence[str], seconds: float) -> Path:
    """The program, made in ``folder``, all sources at once.

    Args:
        folder: is made; objects stay in it.
        archs: ``90a``, ``80``, ...
        seconds: the most that it may take.

    Raises:
        BuildError: there is no nvcc, or it fails or is too slow.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise BuildError("no nvcc on PATH, in $CUDA_HOME, $CUDA_PATH or /usr/local/cuda")
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    *compiles, link = compile_commands(nvcc, archs, objects)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: _run(command, seconds), compiles))
    _run(link, seconds)
    (objects / PROGRAM).replace(folder / PROGRAM)
    return folder / PROGRAM


def _run(command: Sequence[str], seconds: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"nvcc takes more than {seconds:.0f} s: {command[-1]}") from None
    except OSError as error:
        raise BuildError(str(error)) from None
    if done.returncode != 0:
        raise BuildError(f"{command[-1]}: {(done.stderr + done.stdout)[-_SHOWN_ERROR:].strip()}")
