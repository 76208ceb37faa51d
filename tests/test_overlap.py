"""Every kernel may overlap with the launch before it: ``csrc/core/launch.cuh`` has the rules.

That each thread waits, and leaves alone until then what it has to, is seen where kernels run
(``tests/simt``). Here only that no kernel and no launch is left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTION = re.compile(r"(\w+)\(const [^;{}]*\) \{\n(.*?)^\}", re.M | re.S)
KERNEL = re.compile(r"^__global__ void [^;{}]*?" + FUNCTION.pattern, re.M | re.S)
OVERLAPS = re.compile("kOverlaps|= element_shape")
RIGHT = """
__global__ void __launch_bounds__(kBlock, 2)
    add_rows(const AddParams p, const bool is_whole) {
    ptx::let_next_start();
    if (p.width > 1) {
        count(p);
    }
    ptx::wait_for_previous();
}

void start(const AddParams& p) {
    const LaunchShape shape{dim3(1), dim3(32), 0, kOverlaps};
    SPECRT_LAUNCH(add_rows, shape, p);
}
"""


def waits(body: str, functions: dict[str, str]) -> bool:
    """The body does, or a function of its folder that it calls, or one that this calls."""
    if "ptx::wait_for_previous();" in body:
        return True
    called = {name for name in re.findall(r"\w+", body) if name in functions}
    others = {name: text for name, text in functions.items() if name not in called}
    return any(waits(functions[name], others) for name in called)


def violations(csrc: Path) -> list[str]:
    found = []
    for folder in sorted(path for path in csrc.iterdir() if path.name != "core"):
        sources = {path.name: path.read_text() for path in sorted(folder.glob("*.cu*"))}
        functions = dict(FUNCTION.findall("\n".join(sources.values())))
        for name, text in sources.items():
            kernels = KERNEL.findall(text)
            if len(kernels) != text.count("__global__"):
                found.append(f"{name}: a kernel that is written otherwise than they all are")
            for kernel, body in kernels:
                if not body.startswith("    ptx::let_next_start();\n"):
                    found.append(f"{name}: {kernel} does not begin with let_next_start()")
                if not waits(body, functions):
                    found.append(f"{name}: {kernel} never calls wait_for_previous()")
            if text.count("LaunchShape") != len(OVERLAPS.findall(text)):
                found.append(f"{name}: a launch without kOverlaps")
    return found


def test_no_kernel_is_left_out() -> None:
    assert violations(ROOT / "csrc") == []
    assert "kOverlaps" in (ROOT / "csrc/core/elements.cuh").read_text()  # what element_shape has


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ("", "", ""),
        ("    ptx::let_next_start();\n", "", "add_rows does not begin with let_next_start"),
        ("    ptx::wait_for_previous();\n", "", "add_rows never calls wait_for_previous"),
        (", 0, kOverlaps", "", "a launch without kOverlaps"),
        ("const AddParams p, const bool", "AddParams p, bool", "written otherwise"),
        ("    ptx::wait_for_previous();\n", "    wait_apart(p);\n", ""),
    ],
)
def test_planted(tmp_path: Path, line: str, instead: str, words: str) -> None:
    (tmp_path / "add").mkdir()
    helper = "void wait_apart(const AddParams& p) {\n    ptx::wait_for_previous();\n}\n"
    (tmp_path / "add/parts.cuh").write_text(helper)
    (tmp_path / "add/add.cu").write_text(RIGHT.replace(line, instead) if line else RIGHT)
    found = violations(tmp_path)
    assert len(found) == bool(words) and words in "".join(found)
