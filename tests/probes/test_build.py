"""The probes' program compiles, within a time, with Hopper's instructions and without."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from bench.probes import build

MOST_SECONDS = 15.0
"""Of CPU, for one source and architecture."""
needs_nvcc = pytest.mark.skipif(build.find_tool("nvcc") is None, reason="needs nvcc")


def test_commands() -> None:
    *compiles, link = build.compile_commands("nvcc", ["90a", "80"], Path("out"))
    sources = [command[command.index("-c") + 1] for command in compiles]
    assert [Path(source).name for source in sources] == [
        *("device.cu", "main.cu", "p1_sums.cu", "p2_placement.cu", "p3_streams.cu"),
        *("p4_pieces.cu", "p5_nodes.cu", "p6_merges.cu", "p7_conditional.cu"),
    ]
    for command in (*compiles, link):
        assert "-gencode=arch=compute_90a,code=sm_90a" in command
        assert "-gencode=arch=compute_80,code=sm_80" in command
    assert link[-1] == "out/probes" and set(link) >= {command[-1] for command in compiles}


def test_the_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    folder = tmp_path / "bench/probes"
    folder.mkdir(parents=True)
    digests = {build.source_digest()}
    for name, text in (("p1.cu", "1"), ("p1.cu", "2"), ("p2.cu", "2")):
        (folder / name).write_text(text)
        digests.add(build.source_digest())
    (folder / "p1.py").write_text("3")
    assert build.source_digest() in digests and len(digests) == 4


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["90a", "80"])
def test_it_compiles(arch: str, tmp_path: Path) -> None:
    *compiles, link = build.compile_commands(build.find_tool("nvcc") or "", [arch], tmp_path)
    for command in compiles:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "-Werror", "all-warnings"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert took < MOST_SECONDS, command[-3]
    subprocess.run(link, check=True)
    done = subprocess.run([link[-1], "p8"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: " in done.stderr
