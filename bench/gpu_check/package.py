"""``make gpu-package``: what a machine with a GPU and no network needs beside the checkout.

One archive of what git does not hold: the extension built for that machine's Python, the probes'
program, and wheels of packages it lacks. `make gpu-check` there takes it from build/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import extension
from bench.commit import git_commit
from bench.gpu_check.judge import last_line

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = "build/gpu-package.tar.gz"
FOLDER = "build/gpu-package"
PYTHON = "3.12"
"""The GPU machine's."""
WHEELS = (
    "flashinfer-python==0.5.3",
    "apache-tvm-ffi==0.1.15.post2",
    "tabulate==0.10.0",
    "accelerate==1.15.0",
    "psutil==7.2.2",
)
"""What machines with torch often lack: a baseline, and what it and training need beside torch.
(FlashInfer names cuDNN's frontend too, 12 MB, and does without: none of its kernels here asks.)"""
MOST_BYTES = 26_000_000
"""Of the archive."""
MOST_WITH_CHECKOUT = 62 << 20
"""Of the archive and the tracked files together, of 64 MiB that a machine takes."""
_MANIFEST = "manifest.json"
_PROBLEMS = "problems.jsonl"
_BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")
_GLIBC = (17, 24, 27, 28, 31, 34)


@dataclass(frozen=True)
class Manifest:
    """What an archive holds."""

    commit: str | None
    python: str
    extension: str
    """File name; empty if none was built."""
    sources: str
    """``bench.extension.source_digest`` of the sources it was made of."""
    wheels: Sequence[str]
    """File names."""


# --- making it --------------------------------------------------------------------------------


def make(root: Path, python: str | None, problems: Path | None = None) -> Path:
    """Build, fetch and pack; the archive's path.

    Args:
        root: of the checkout.
        python: an interpreter of version ``PYTHON``; None looks for one.
        problems: a file for stage D; None brings none.

    Raises:
        SystemExit: something cannot be had or built, or the archive is too large.
    """
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    tools = _venv(root, _chosen(python))
    built = _built_extension(root, tools)
    shutil.copy2(built, folder)
    _probes(root, tools, folder / "probes")
    if problems is not None:
        shutil.copy2(problems, folder / _PROBLEMS)
    wheels = _wheels(folder / "wheels")
    sources = extension.stamped_sources(built)
    manifest = Manifest(git_commit(), PYTHON, built.name, sources, wheels)
    (folder / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    archive = root / ARCHIVE
    _pack(folder, archive)
    check_sizes(archive.stat().st_size, tracked_bytes(root))
    return archive


def _chosen(asked: str | None) -> str:
    """An interpreter of the GPU machine's version, which has its headers."""
    for candidate in (asked,) if asked else _interpreters():
        if _version(candidate) == PYTHON:
            return candidate
    what = f"{asked} is not" if asked else "there is no"
    raise SystemExit(f"gpu-package: {what} Python {PYTHON}: GPU_PYTHON=/path/to/python{PYTHON}")


def _interpreters() -> Iterator[str]:
    yield sys.executable
    if found := shutil.which(f"python{PYTHON}"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob(f"versions/{PYTHON}*/bin/python")))


def _version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _venv(root: Path, python: str) -> str:
    """An interpreter with what a build needs, kept from one call to the next."""
    folder = root / f"build/gpu-package-python{PYTHON}"
    tools = folder / "bin/python"
    if not tools.exists():
        _run([python, "-m", "venv", str(folder)], "a virtual environment cannot be made")
    pins = ["-c", str(root / "constraints.txt")]
    _run(
        [str(tools), "-m", "pip", "install", "-q", *pins, *_BUILD_TOOLS],
        "what builds need cannot be installed",
    )
    return str(tools)


def _built_extension(root: Path, python: str) -> Path:
    environment = {"SPECRT_CUDA": "ON", "SPECRT_SIMT": "OFF", "SPECRT_WERROR": "OFF"}
    code = "from bench import extension; extension.build(); print(extension.file_name())"
    output = _run([python, "-c", code], "the extension does not build", root, environment)
    return root / "specrt" / last_line(output)


def _probes(root: Path, python: str, folder: Path) -> None:
    command = [python, "-m", "bench.probes", "--build-only", str(folder)]
    _run(command, "the probes do not build", root)
    shutil.rmtree(folder / "objects", ignore_errors=True)


def _wheels(folder: Path) -> list[str]:
    """For the GPU machine, whatever this one is."""
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in _GLIBC]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    command += [*platforms, "--platform=manylinux2014_x86_64", *WHEELS]
    _run(command, "wheels cannot be downloaded")
    return sorted(path.name for path in folder.glob("*.whl"))


def _pack(folder: Path, archive: Path) -> None:
    whole = archive.with_name(archive.name + ".new")
    with tarfile.open(whole, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder).as_posix())
    whole.replace(archive)


def tracked_bytes(root: Path) -> int:
    """Of the files that a checkout has; 0 outside of one."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    paths = [root / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_sizes(archive: int, checkout: int) -> None:
    """What travels must fit.

    Raises:
        SystemExit: it does not; with the numbers.
    """
    if archive > MOST_BYTES:
        raise SystemExit(f"gpu-package: {archive:,} bytes, at most {MOST_BYTES:,} may be")
    if archive + checkout > MOST_WITH_CHECKOUT:
        raise SystemExit(
            f"gpu-package: with {checkout:,} bytes of tracked files {archive + checkout:,}, "
            f"at most {MOST_WITH_CHECKOUT:,} may be"
        )


def _run(
    command: Sequence[str],
    what: str,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(f"gpu-package: {what}: {last_line(done.stderr)}")
    return done.stdout


# --- taking it --------------------------------------------------------------------------------


def unpack(root: Path) -> list[str]:
    """Put what was brought along in its place, as far as it fits; what became of it, in lines.

    An extension of other sources or for another Python is left out, and so built; a package that
    does not install is done without.
    """
    archive = root / ARCHIVE
    if not archive.exists():
        return []
    folder = root / FOLDER
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        manifest = Manifest(**json.loads((folder / _MANIFEST).read_text()))
    except (OSError, tarfile.TarError, zlib.error, EOFError, ValueError, TypeError) as error:
        return [f"{ARCHIVE} is not used: {error}"]
    try:
        placed = _place_extension(root, folder, manifest)
    except OSError as error:
        placed = f"{manifest.extension} is not used: {error}"
    return [placed, _install(root, folder, manifest)]


def _place_extension(root: Path, folder: Path, manifest: Manifest) -> str:
    name = manifest.extension
    if name != extension.file_name():
        return f"{name} is not for this Python: the extension is built here"
    if manifest.sources != extension.source_digest(root):
        return f"{name} is made of other sources ({manifest.commit}): the extension is built here"
    to = root / "specrt" / name
    new = to.with_name(name + ".new")
    shutil.copy2(folder / name, new)
    new.replace(to)
    extension.write_stamp(to, manifest.sources)
    return f"{name} is from {ARCHIVE}"


def _install(root: Path, folder: Path, manifest: Manifest) -> str:
    site = _site(root)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
    command += [str(folder / "wheels" / name) for name in manifest.wheels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"wheels are not used: {last_line(done.stderr)}"
    return f"{len(manifest.wheels)} wheels are installed in {site.relative_to(root)}"


def problems(root: Path) -> Path | None:
    """What was brought along to train on and to measure with, if anything was."""
    file = root / FOLDER / _PROBLEMS
    return file if file.exists() else None


def _site(root: Path) -> Path:
    return root / FOLDER / "site"


def search_path(root: Path) -> list[str]:
    """``PYTHONPATH``'s parts, with the packages that were brought along."""
    mine = [str(_site(root))] if _site(root).is_dir() else []
    return [*mine, *filter(None, [os.environ.get("PYTHONPATH")])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu-package", description=__doc__)
    parser.add_argument("--python", help=f"of version {PYTHON}; default: one that is found")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="problems for stage D, as GSM8K's training set"
    )
    args = parser.parse_args()
    if args.data and not args.data.is_file():
        raise SystemExit(f"gpu-package: --data: there is no {args.data}")
    archive = make(ROOT, args.python, args.data)
    size, checkout = archive.stat().st_size, tracked_bytes(ROOT)
    print(f"{archive.relative_to(ROOT)}: {size:,} bytes, {size + checkout:,} with the checkout")


if __name__ == "__main__":
    main()
