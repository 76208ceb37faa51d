"""Where the CUDA toolkit's programs are, in the order in which the build looks for nvcc."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

USUAL_HOME = Path("/usr/local/cuda")


def find_tool(
    name: str, environ: Mapping[str, str] = os.environ, usual_home: Path = USUAL_HOME
) -> str | None:
    """``nvcc``, ``cuobjdump``, ``compute-sanitizer``, ...: the path of one that can be run.

    ``$CUDACXX`` is nvcc where it is set; else comes PATH, then ``$CUDA_HOME``, ``$CUDA_PATH`` and
    ``usual_home``, as in cmake/nvcc.cmake. Other programs are looked for on PATH, then in the
    toolkit of that nvcc, then in the same homes.

    Args:
        name: the program's.
        environ: the variables named above.
        usual_home: the toolkit that nobody names.
    """
    if name == "nvcc" and (asked := shlex.split(environ.get("CUDACXX", ""))):
        return _on_path(asked[0], environ)
    if found := _on_path(name, environ):
        return found
    paths = (folder / name for folder in _folders(name, environ, usual_home))
    return next((str(path) for path in paths if _is_program(path)), None)


def _folders(name: str, environ: Mapping[str, str], usual_home: Path) -> Iterator[Path]:
    homes = [Path(home) for key in ("CUDA_HOME", "CUDA_PATH") if (home := environ.get(key))]
    homes.append(usual_home)
    if name != "nvcc" and (nvcc := find_tool("nvcc", environ, usual_home)):
        # On PATH it may be a link; the toolkit is where it leads.
        homes.insert(0, Path(nvcc).resolve().parents[1])
    for home in homes:
        yield home / "bin"
        yield home / "compute-sanitizer"  # some toolkits have that program there alone


def _on_path(program: str, environ: Mapping[str, str]) -> str | None:
    return shutil.which(program, path=environ.get("PATH", ""))


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
