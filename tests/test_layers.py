"""Who may import whom (docs/design.md), and one name in five places."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    {"types", "_C", "builtin"},
    {"config", "json_lines", "option_hints", "reuse"},
    {"ops", "targets"},
    {"device"},
    {"sampling", "pages"},
    {"prefixes"},
    {"kv_cache"},
    {"cache", "tree", "accept"},
    {"models"},
    {"draft"},
    {"engine", "train"},
    {"loading"},
    {"lab"},
    {"serve"},
    {"cli", "__init__"},
    {"__main__"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
ONLY = {"device": {"ops", "reuse"}}
PUBLIC_API = {"cli", "serve", "train", "__main__"}  # may use `specrt.load` and its like

NO_KERNEL = {"core", "graph", "bindings"}
# In bench_small_kernels.py.
BENCHED_TOGETHER = {
    "rms_norm", "layer_norm", "rope_append", "activate", "scale_add", "kv_commit", "embed",
    "history_tail", "draft_pairs", "time_stamp",
}  # fmt: skip
PYTHON_HEADER = re.compile(r"^(pybind11/|torch/|ATen/|c10/|Python\.h)")


def imported_parts(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """The parts of specrt that a module of ``package`` names; ``__init__`` is the public API."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *filter(None, [node.module])])
            names += [f"{source}.{alias.name}" for alias in node.names]
    for top, _, rest in (name.partition(".") for name in names):
        part = rest.split(".")[0]
        if top == "specrt" and part != "__version__":
            yield part if part in RANK else "__init__"


def import_violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).with_suffix("").parts
        me = inside[0]
        if me not in RANK:
            found.append(f"{path}: `{me}` has no rank in test_layers.py")
            continue
        for other in imported_parts(ast.parse(path.read_text()), ("specrt", *inside[:-1])):
            if other == "_C":
                allowed = me == "ops"
            elif other == "__init__":
                allowed = me in PUBLIC_API
            else:
                allowed = other in ONLY.get(me, {other}) and RANK[other] < RANK[me]
            if not allowed and other != me:
                found.append(f"{path}: {me} imports {other}")
    return found


def include_violations(csrc: Path) -> list[str]:
    found = []
    folders = {path.name for path in csrc.iterdir() if path.is_dir()}
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        me = path.relative_to(csrc).parts[0]
        for header in re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.M):
            is_foreign = header.split("/")[0] in folders - {"core", me} or header.startswith("..")
            if me != "bindings" and (is_foreign or PYTHON_HEADER.match(header)):
                found.append(f"{path}: includes {header}")
    return found


def missing_places(root: Path) -> list[str]:
    table = root / "docs/kernels.md"
    rows = table.read_text() if table.exists() else ""
    missing = []
    for folder in sorted(path for path in (root / "csrc").iterdir() if path.is_dir()):
        kernel = folder.name
        if kernel in NO_KERNEL:
            continue
        bench = "small_kernels" if kernel in BENCHED_TOGETHER else kernel
        files = [
            f"specrt/ops/{kernel}.py",
            f"tests/ops/test_{kernel}.py",
            f"bench/bench_{bench}.py",
        ]
        missing += [f"{kernel}: no {file}" for file in files if not (root / file).exists()]
        if not re.search(rf"^\| *`{kernel}` *\|", rows, re.M):
            missing.append(f"{kernel}: no row in docs/kernels.md")
    return missing


def test_python_layers() -> None:
    assert import_violations(ROOT / "specrt") == []


def test_csrc_layers() -> None:
    assert include_violations(ROOT / "csrc") == []


def test_five_places() -> None:
    assert missing_places(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cache.py", "from specrt import _C"),
        ("cache.py", "import specrt._C as c"),
        ("cache.py", "from specrt.tree import chain"),
        ("models/model.py", "from specrt.draft.base import Drafter"),
        ("models/model.py", "from ..draft import base"),
        ("models/model.py", "from .. import engine"),
        ("draft/fspad/drafter.py", "def f():\n    from specrt.engine.engine import Engine"),
        ("graph.py", "from specrt.cache import KVCache"),
        ("graph.py", "import specrt.types"),
        ("train/loop/trainer.py", "from specrt import engine"),
        ("engine/engine.py", "import specrt.train.run"),
        ("engine/engine.py", "from specrt import load"),
        ("ops/linear.py", "from specrt.tree import chain"),
        ("helpers.py", ""),
    ],
)
def test_planted_import(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert len(import_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/linear.py", "from specrt import _C"),
        ("models/model.py", "from specrt.models.rope import rope_table"),
        ("models/model.py", "from . import rope\nfrom .rope import rope_table"),
        ("train/loop/trainer.py", "import torch\nfrom specrt import load, models"),
        (
            "engine/engine.py",
            "from specrt import __version__\nfrom specrt.draft.base import Drafter",
        ),
    ],
)
def test_allowed_import(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "line", "count"),
    [
        ("linear/linear.h", '#include "rms_norm/rms_norm.h"', 1),
        ("linear/linear.h", "#  include <rms_norm/rms_norm.h>", 1),
        ("linear/linear.h", '#include "../rms_norm/rms_norm.h"', 1),
        ("linear/linear.cu", "#include <pybind11/pybind11.h>", 1),
        ("core/check.h", "#include <torch/extension.h>", 1),
        ("core/check.h", '#include "linear/linear.h"', 1),
        ("graph/graph.h", '#include "bindings/tensor.h"', 1),
        ("linear/linear.h", '#include <vector>\n#include "core/check.h"\n#include "linear/a.h"', 0),
        ("bindings/linear.cpp", '#include <pybind11/pybind11.h>\n#include "linear/linear.h"', 0),
    ],
)
def test_planted_include(tmp_path: Path, file: str, line: str, count: int) -> None:
    for folder in ("core", "linear", "rms_norm", "graph", "bindings"):
        (tmp_path / folder).mkdir()
    (tmp_path / file).write_text(line)
    assert len(include_violations(tmp_path)) == count


def test_planted_missing_places(tmp_path: Path) -> None:
    for kernel in ("linear", "activate", "core", "graph", "bindings"):
        (tmp_path / "csrc" / kernel).mkdir(parents=True)
    assert len(missing_places(tmp_path)) == 8
    files = [f"specrt/ops/{kernel}.py" for kernel in ("linear", "activate")]
    files += [f"tests/ops/test_{kernel}.py" for kernel in ("linear", "activate")]
    files += ["bench/bench_linear.py", "bench/bench_small_kernels.py", "docs/kernels.md"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert [line.split(": ")[1] for line in missing_places(tmp_path)] == [
        "no row in docs/kernels.md",
        "no row in docs/kernels.md",
    ]
    (tmp_path / "docs/kernels.md").write_text("| `linear` | 1 |\n| `activate` | 2 |\n")
    assert missing_places(tmp_path) == []
