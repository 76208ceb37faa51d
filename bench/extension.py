"""The extension for this machine's GPU: the one that is there if it fits, else built.

It fits if it was made of these very sources, imports, and has CUDA kernels. A build takes minutes;
one that was brought along (`make gpu-package`) takes none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from bench.gpu_check.judge import last_line

ROOT = Path(__file__).resolve().parents[1]
_SOURCES = ("CMakeLists.txt", "setup.py", "specrt/__init__.py", "csrc/**/*", "cmake/**/*")


def source_digest(root: Path = ROOT) -> str:
    """Of all that the extension is made of, names and contents."""
    digest = hashlib.sha256()
    for path in _source_files(root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _source_files(root: Path) -> Iterator[Path]:
    for pattern in _SOURCES:
        yield from (path for path in sorted(root.glob(pattern)) if path.is_file())


def file_name() -> str:
    """Of this Python's extension."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def stamp_path(extension: Path) -> Path:
    """Beside it, ignored by git as it is."""
    return extension.with_suffix(".so.json")


def write_stamp(extension: Path, digest: str) -> None:
    """Note what ``extension`` is made of."""
    of = hashlib.sha256(extension.read_bytes()).hexdigest()
    stamp_path(extension).write_text(json.dumps({"sources": digest, "extension": of}))


def stamped_sources(extension: Path) -> str:
    """The digest of what ``extension`` is made of; empty if that is not known."""
    try:
        stamp = json.loads(stamp_path(extension).read_text())
        of, sources = stamp["extension"], str(stamp["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return sources if of == hashlib.sha256(extension.read_bytes()).hexdigest() else ""


def misfit(root: Path = ROOT) -> str:
    """Why the extension that is there does not do; empty if it does."""
    extension = root / "specrt" / file_name()
    if not extension.exists():
        return "none is there"
    sources = stamped_sources(extension)
    if not sources:
        return "what it was made of is not known"
    if sources != source_digest(root):
        return "it was made of other sources"
    return _import_error(root)


def _import_error(root: Path) -> str:
    code = "from specrt.ops.build import build_info; print(build_info().cuda)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return f"it does not import: {last_line(done.stderr)}"
    return "it has no CUDA kernels" if last_line(done.stdout) == "None" else ""


def build(root: Path = ROOT) -> None:
    """In place, as the environment says (``setup.py`` has the variables); its output is shown.

    Raises:
        SystemExit: it does not build.
    """
    digest = source_digest(root)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code = subprocess.run(command, cwd=root, check=False).returncode
    if code != 0:
        raise SystemExit(f"the extension does not build: setup.py ended with exit code {code}")
    write_stamp(root / "specrt" / file_name(), digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="only say what would be done")
    is_dry = parser.parse_args().dry
    reason = misfit()
    if not reason:
        print(f"{file_name()} is there and made of these sources")
        return
    if is_dry:
        print(f"{file_name()} would be built: {reason}")
        return
    print(f"building {file_name()}: {reason}", flush=True)
    start = time.monotonic()
    build()
    if reason := _import_error(ROOT):
        raise SystemExit(f"the extension was built, but {reason}")
    print(f"{file_name()} built in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
