"""Which shapes are profiled, and what becomes of a profiler that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import attention_variants, profiles
from bench.fake_gpu import FakeGpu


def row(share: float, nodes: int = 60, prefix: int = 2048) -> dict[str, object]:
    return {
        "model": "Llama-3-8B",
        "batch": 1,
        "prefix": prefix,
        "nodes": nodes,
        "% of limit": share,
    }


def test_the_furthest_from_their_limit() -> None:
    rows = [row(50), row(20, prefix=512), row(30, nodes=1), row(90, nodes=8)]
    assert profiles.furthest(rows) == [row(20, prefix=512), row(30, nodes=1)]


def test_cases_are_known_by_the_same_name() -> None:
    case = next(attention_variants.cases(True, FakeGpu()))
    assert profiles.case_name(row(1)) == str(case)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('counters')", "profile_Llama_3_8B_batch_1_prefix_2048_nodes_60.txt\n"),
        ("raise SystemExit(3)", "nodes_60.txt: ncu failed\n"),
        (None, "No such file or directory"),
    ],
)
def test_profiling(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str | None,
    expected: str,
) -> None:
    ncu = tmp_path / "ncu"
    if code:
        ncu.write_text(f"#!{sys.executable} -S\n{code}\n")
        ncu.chmod(0o755)
    argv = ["profiles", "--ncu", str(ncu), "--save", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="no variants_"):
        profiles.main()
    (tmp_path / "variants_H100.json").write_text(json.dumps({"rows": [row(40)]}))
    profiles.main()
    assert expected in capsys.readouterr().out
