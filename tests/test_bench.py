"""Every benchmark runs and reports; what it measures is not judged here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_generate, contenders
from bench.memory import Probe
from specrt import builtin
from specrt.config import ModelConfig
from specrt.models.loader import load_weights
from tools.export_checkpoint import export, state_dict

ROOT = Path(__file__).parents[1]
NAMES = sorted(file.stem for file in (ROOT / "bench").glob("bench_*.py"))
TARGET = builtin.target_path()
needs_target = pytest.mark.skipif(
    not (TARGET / "config.json").is_file(), reason="the bundled target is not here"
)


def run(name: str, *options: str) -> dict[str, Any]:
    """A quick run's JSON."""
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--quick", "--threads", "1", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bench_generate"])
def test_kernel_bench(name: str, tmp_path: Path) -> None:
    result = run(name, "--save", str(tmp_path))
    ratios = [row.get("torch/ours", row.get("ratio")) for row in result["rows"]]
    assert any(isinstance(ratio, float) and ratio > 0 for ratio in ratios)
    assert result["environment"]["cpu_flags"] is not None
    (saved,) = tmp_path.iterdir()
    assert json.loads(saved.read_text()) == result


@needs_target
def test_generate_bench() -> None:
    result = run("bench_generate", "--drafters", "prompt-lookup", "--peers", "transformers")
    rows = {row["contender"]: row for row in result["rows"]}
    assert set(rows) == {"transformers", "ours plain", "ours prompt-lookup"}
    assert all(row["vs plain"] > 0 and row["vs transformers"] > 0 for row in rows.values())
    assert rows["ours prompt-lookup"]["differs plain"] == 0
    assert result["summary"]["float32"]["share_of_streaming"] > 0


@needs_target
def test_llama_cpp_may_be_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_generate, "has_llama_cpp", lambda: False)
    args = argparse.Namespace(peers={contenders.LLAMA_CPP}, gguf=None, make_gguf=True)
    config = ModelConfig.from_directory(TARGET)
    blank = Probe("ours", "builtin", "float32", 1, None, None, [], 0, [])
    assert bench_generate._llama_cpp(args, config, "float32", tmp_path, blank) == {}
    assert "not installed" in capsys.readouterr().out


@needs_target
def test_export_keeps_every_weight(tmp_path: Path) -> None:
    """The exported directory loads as a plain checkpoint, to the bit."""
    export("builtin", tmp_path, "float32")
    states = []
    for directory in (TARGET, tmp_path):
        config = ModelConfig.from_directory(directory)
        states.append(state_dict(config, load_weights(directory, config, torch.float32)))
    assert config.float8_scale_suffix is None
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
