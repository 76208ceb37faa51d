"""Registers, shared memory and stack of every compiled CUDA kernel, as a table for docs/kernels.md.

Read from the built extension by ``cuobjdump`` where the CUDA toolkit has it. ``--compile`` asks the
compiler instead: it compiles every .cu file again, with the commands of the last build, and reads
what ptxas says. ``--check`` exits 1 if a kernel has a stack frame or local memory: a register that
went to memory, or an array indexed at run time. Its last line is JSON for other programs:
``{"kernels": 70, "spills": ["kernel<bf16> (sm_80): ..."]}``.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.extension import file_name
from bench.toolkit import find_tool

ROOT = Path(__file__).resolve().parents[1]
_TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture; a thread's registers and bytes, a block's shared bytes."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    local: int

    @property
    def name(self) -> str:
        """Without template arguments."""
        return self.kernel.split("<", 1)[0]


def parse_cuobjdump(text: str) -> list[Resources]:
    """The output of ``cuobjdump --dump-resource-usage``."""
    found, arch, kernel = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Resources(kernel, arch, registers, shared, stack, local))
    return found


def parse_ptxas(text: str) -> list[Resources]:
    """The output of ``nvcc -Xptxas=-v``; spill stores and loads count as local memory."""
    found, stack, local, kernel, arch = [], 0, 0, "", ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel, arch = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) \D+, (\d+) bytes spill", line):
            stack, *spills = map(int, match.groups())
            local = sum(spills)
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            size = int(shared[1]) if shared else 0
            found.append(Resources(kernel, arch, int(match[1]), size, stack, local))
            kernel = ""
    return found


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names, by c++filt of the host's compiler; as they are where that is missing."""
    if shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short_name(name: str) -> str:
    """``kernel<bf16, 128>``: no namespaces, no arguments, short types."""
    name = re.sub(r"\((?:anonymous namespace)\)::", "", name)
    name = re.sub(r"\(.*$", "", re.sub(r"\((?:int|bool|unsigned int)\)", "", name))
    name = re.sub(r"^void |specrt::", "", name)
    for long, short in _TYPES.items():
        name = name.replace(long, short)
    return name


def from_extension() -> list[Resources]:
    """Of the extension that is built in place.

    Raises:
        FileNotFoundError: it is not built, or there is no cuobjdump.
    """
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("no cuobjdump on PATH or in a CUDA toolkit; try --compile")
    extension = ROOT / "specrt" / file_name()  # another Python's may lie beside it
    if not extension.exists():
        raise FileNotFoundError(f"no specrt/{extension.name}: run `make ext`")
    command = [tool, "--dump-resource-usage", str(extension)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # It fails on a file without device code, in which no kernel needs anything.
    return _named(parse_cuobjdump(done.stdout))


def from_compiler() -> list[Resources]:
    """By compiling again what the last build compiled with nvcc.

    Raises:
        FileNotFoundError: no build has CUDA.
        RuntimeError: a file does not compile.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for command in last_build_commands():
            argv = [*without_output(command), "-Xptxas=-v", "-o", f"{folder}/out.o"]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{shlex.join(argv)}:\n{done.stderr}")
            found += parse_ptxas(done.stdout + done.stderr)
    return _named(found)


def last_build_commands() -> list[list[str]]:
    """How the last build with CUDA compiled each .cu file.

    Raises:
        FileNotFoundError: no build has CUDA.
    """
    files = (ROOT / "build").glob("*/*/compile_commands.json")
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if found := nvcc_commands(json.loads(file.read_text())):
            return found
    raise FileNotFoundError("no build has CUDA: run `SPECRT_CUDA=ON make ext`")


def nvcc_commands(entries: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Those of ``compile_commands.json``, without launchers such as ccache.

    The shim compiles .cu files too, as C++.
    """
    found = []
    for entry in entries:
        command = shlex.split(entry["command"])
        programs = [Path(word).name for word in command[:2]]
        if "nvcc" in programs:
            found.append(command[programs.index("nvcc") :])
    return found


def without_output(command: Sequence[str]) -> Iterator[str]:
    """The command's words but for those that say where its results go."""
    arguments = iter(command)
    for argument in arguments:
        if argument in ("-o", "-MF", "-MT"):
            next(arguments)
        elif argument != "-MD":
            yield argument


def _named(found: Sequence[Resources]) -> list[Resources]:
    names = map(short_name, demangled([one.kernel for one in found]))
    renamed = [
        Resources(name, one.arch, one.registers, one.shared, one.stack, one.local)
        for name, one in zip(names, found, strict=True)
    ]
    return sorted(renamed, key=lambda one: (one.kernel, one.arch))


def table(found: Sequence[Resources], *, is_detailed: bool = False) -> str:
    """Markdown; a kernel's template instances share a line unless ``is_detailed``."""
    groups: dict[tuple[str, str], list[Resources]] = {}
    for one in found:
        groups.setdefault((one.kernel if is_detailed else one.name, one.arch), []).append(one)
    lines = [
        "| kernel | architecture | instances | registers | static shared, bytes | stack | local |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, arch), group in groups.items():
        columns = [f"`{name}`", arch, str(len(group))]
        columns += [_range([getattr(one, column) for one in group]) for column in _COLUMNS]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


_COLUMNS = ("registers", "shared", "stack", "local")


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least}–{most}"


def in_memory(found: Sequence[Resources]) -> list[str]:
    """A line for each kernel with a stack frame or local memory."""
    return [
        f"{one.kernel} ({one.arch}): {one.stack} bytes of stack, {one.local} of local memory"
        for one in found
        if one.stack or one.local
    ]


def summary(found: Sequence[Resources]) -> str:
    """How many kernels there are, an architecture's each for itself, and those in memory: JSON."""
    return json.dumps({"kernels": len(found), "spills": in_memory(found)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="ask ptxas; takes minutes")
    parser.add_argument("--check", action="store_true", help="exit 1 on stack or local memory")
    parser.add_argument("--detailed", action="store_true", help="a line for each instance")
    args = parser.parse_args()
    try:
        found = from_compiler() if args.compile else from_extension()
    except (FileNotFoundError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    if not found:
        raise SystemExit("the extension has no CUDA kernels")
    print(table(found, is_detailed=args.detailed))
    if args.check:
        print(summary(found))
        raise SystemExit("\n".join(in_memory(found)) or 0)


if __name__ == "__main__":
    main()
