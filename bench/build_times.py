"""CPU seconds of nvcc for each .cu file and architecture: compiles again what the last build did.

``--check`` exits 1 if one takes longer than ``--limit``: a file is one job of the build, and no
build is quicker than its longest. Seconds are of all of nvcc's programs together, on one core, so a
busy machine lengthens them by little.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.resources import last_build_commands, without_output

LIMIT_S = 15.0
_ARCH_FLAG = "--generate-code="  # CMake's spelling


@dataclass(frozen=True)
class Compilation:
    """One source for one architecture."""

    source: str
    arch: str
    """``sm_90a``."""
    argv: tuple[str, ...]
    """Without outputs; the architecture's flag is last."""


def compilations(commands: Sequence[Sequence[str]]) -> list[Compilation]:
    """Each architecture of each nvcc command by itself."""
    found = []
    for command in commands:
        words = list(without_output(command))
        flags = [word for word in words if word.startswith(_ARCH_FLAG)]
        rest = [word for word in words if not word.startswith((_ARCH_FLAG, "--threads"))]
        source = "/".join(Path(rest[-1]).parts[-2:])
        for flag in flags:
            arch = "sm_" + flag.partition("compute_")[2].partition(",")[0]
            found.append(Compilation(source, arch, (*rest, flag)))
    return found


def for_arch(one: Compilation, arch: str) -> Compilation:
    """The same source, with the same flags, for another architecture (``sm_90a``)."""
    number = arch.removeprefix("sm_")
    flag = f"{_ARCH_FLAG}arch=compute_{number},code=[compute_{number},{arch}]"
    return replace(one, arch=arch, argv=(*one.argv[:-1], flag))


def seconds(one: Compilation, folder: str) -> float:
    """CPU seconds of compiling it.

    Raises:
        RuntimeError: it does not compile.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [*one.argv, "-o", f"{folder}/out.o"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def too_long(times: Sequence[tuple[Compilation, float]], limit_s: float) -> list[str]:
    """A line for each that takes longer."""
    return [
        f"{one.source} ({one.arch}): {took:.1f} s of nvcc, at most {limit_s:g} were to be"
        for one, took in times
        if took > limit_s
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if one takes too long")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds; default 15")
    args = parser.parse_args()
    times = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for one in compilations(last_build_commands()):
                times.append((one, seconds(one, folder)))
    except (FileNotFoundError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    print("| source | architecture | CPU, s |\n|---|---|---|")
    for one, took in sorted(times, key=lambda pair: -pair[1]):
        print(f"| `{one.source}` | {one.arch} | {took:.1f} |")
    print(f"\n{len(times)} compilations, {sum(took for _, took in times):.0f} s")
    if args.check:
        raise SystemExit("\n".join(too_long(times, args.limit)) or 0)


if __name__ == "__main__":
    main()
