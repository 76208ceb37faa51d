"""The command, on a program that is a script: it answers, crashes, hangs, or talks nonsense."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.probes import __main__ as command
from bench.probes import build
from bench.probes.catalogue import PROBES
from bench.probes.report import file_name, table
from bench.probes.run import run_probe
from tests.probes import measured
from tests.processes import ends

ROOT = Path(__file__).resolve().parents[2]
DEVICE = {"device": "NVIDIA H100 80GB HBM3", "num_sms": 132, "has_hopper": True}
PROGRAM = """#!{python}
import json, os, signal, sys, time
probe, rows, ways = sys.argv[1], {rows!r}, {ways!r}
way = ways.get(probe, "answers")
if way == "lacks its driver":
    sys.exit("device: cudaGetDeviceCount(&count): no CUDA-capable device is detected")
for i, row in enumerate(rows[probe]):
    text = json.dumps(dict(row, probe=probe))
    if i == 1 and way != "answers":
        if way == "half a line":
            sys.stdout.write(text[: len(text) // 2])
            sys.stdout.flush()
            os._exit(0)
        sys.stdout.flush()
        if way == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if way == "hangs":
            time.sleep(60)
        if way == "fails":
            sys.exit("p: cudaMalloc(&data_, bytes): out of memory")
        if way == "nonsense":
            sys.stdout.buffer.write(b"\\xff\\x00{{'a': 1}}\\n[1, 2]\\n17\\n{{}}\\nnull\\n\\n")
            sys.stdout.flush()
            sys.exit(0)
    print(text)
print(json.dumps({{"probe": probe, "done": True, "seconds": 0.1}}))
"""
WAYS = {
    "crashes": "killed by signal 11",
    "hangs": "stopped after 1 s",
    "fails": "exit code 1: p: cudaMalloc(&data_, bytes): out of memory",
    "half a line": "it ended without saying that it is done",
    "nonsense": "it ended without saying that it is done",
}


def make_program(folder: Path, ways: Mapping[str, str] | None = None) -> Path:
    """It answers, but for the probes named, which do otherwise after a row."""
    device = DEVICE | {"sources": build.source_digest()}
    rows = {"device": [device], **measured.ALL}
    program = folder / build.PROGRAM
    program.write_text(PROGRAM.format(python=sys.executable, rows=rows, ways=dict(ways or {})))
    program.chmod(0o755)
    return program


def call(*options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["probes", *options])
    with pytest.raises(SystemExit) as ended:
        command.main()
    if isinstance(ended.value.code, str):
        print(ended.value.code)
        return 1
    return ended.value.code or 0


def result_of(printed: str) -> dict[str, Any]:
    result = json.loads(printed.splitlines()[-1])
    assert isinstance(result, dict) and list(result) == ["rows", "facts", "failed"]
    assert "Traceback" not in printed
    return result


# --- the command ------------------------------------------------------------------------------


def test_all_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--binary", str(make_program(tmp_path)), "--save", str(tmp_path / "kept")]
    assert call(*options, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    result = result_of(printed)
    assert len(result["facts"]) == 7 and result["failed"] == []
    assert all(" -> " in fact and fact in printed for fact in result["facts"])
    assert len(result["rows"]) == sum(map(len, measured.ALL.values()))
    kept = json.loads((tmp_path / "kept/probes_h100_80gb_hbm3.json").read_text())
    assert {key: kept[key] for key in result} == result
    assert kept["command"] == "python -m bench.probes --binary probes --save kept"
    assert kept["environment"]["gpu"]["num_sms"] == 132 and kept["environment"]["date"]
    assert "other sources" not in printed


@pytest.mark.parametrize("crashing", [["p4"], [probe.name for probe in PROBES]])
def test_one_that_crashes_leaves_the_others(
    crashing: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = make_program(tmp_path, dict.fromkeys(crashing, "crashes"))
    assert call("--binary", str(program), monkeypatch=monkeypatch) == 1
    result = result_of(capsys.readouterr().out)
    assert result["failed"] == [f"{probe}: killed by signal 11" for probe in crashing]
    assert len(result["facts"]) == 7
    for probe, fact in zip(PROBES, result["facts"], strict=True):
        assert fact.startswith(f"{probe.name.upper()}: ")
        assert ("FAILED, killed by signal 11; until then: " in fact) == (probe.name in crashing)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_fail(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = make_program(tmp_path, {"p3": way})
    options = ["--binary", str(program), "--only", "p3", "--budget", "1.3"]
    assert call(*options, monkeypatch=monkeypatch) == 1
    result = result_of(capsys.readouterr().out)
    assert result["failed"] == [f"p3: {WAYS[way]}"]
    assert [row["variant"] for row in result["rows"]] == ["copy"]
    assert "until then: no answer: not measured: any read" in result["facts"][0]


def test_a_spent_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--binary", str(make_program(tmp_path)), "--budget", "0.5", "--only", "p2,p1"]
    assert call(*options, monkeypatch=monkeypatch) == 1
    result = result_of(capsys.readouterr().out)
    assert result["failed"] == ["p1: no time was left", "p2: no time was left"]


def test_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "found_arch", lambda: None)
    program = make_program(tmp_path, {"device": "lacks its driver"})
    monkeypatch.setattr(command, "_FOLDERS", (tmp_path / "none", tmp_path))
    for options in ([], ["--binary", str(program)], ["--binary", str(tmp_path / "none")]):
        assert call(*options, monkeypatch=monkeypatch) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("probes: no GPU: the driver is not there or sees none")
    assert line.endswith("none: not there")


def test_dry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["probes", "--dry", "--budget", "50"])
    command.main()
    printed = capsys.readouterr().out
    assert printed.startswith("7 probes, at most 50 s in all\n") and "p7 at most " in printed
    result = result_of(printed)
    assert result["facts"][6] == "P7: not run on a GPU" and result["failed"] == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--only", "p1,p8"], "--only: expected some of p1,p2,p3,p4,p5,p6,p7, got p8"),
        (["--budget", "0"], "--budget: expected seconds above 0, got 0"),
        (["--archs", "hopper"], "--archs: expected names such as 90a or 80, got 'hopper'"),
    ],
)
def test_misused(
    options: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(*options, monkeypatch=monkeypatch) == 2
    assert complaint in capsys.readouterr().err


# --- the program ------------------------------------------------------------------------------


def test_a_program_of_other_sources_is_built_anew_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_program(tmp_path)
    monkeypatch.setattr(command, "_FOLDERS", (tmp_path,))
    monkeypatch.setattr(build, "found_arch", lambda: "90a")
    monkeypatch.setattr(build, "source_digest", lambda: "changed")
    built = tmp_path / "built"
    built.mkdir()
    monkeypatch.setattr(build, "build", lambda *_: make_program(built))
    assert call("--only", "p5", monkeypatch=monkeypatch) == 0
    assert f"program: {built}" in capsys.readouterr().out

    def refuse(*_: object) -> Path:
        raise build.BuildError("no nvcc")

    monkeypatch.setattr(build, "build", refuse)
    make_program(tmp_path).write_text(
        (tmp_path / build.PROGRAM)
        .read_text()
        .replace('"changed"', '"older"')
        .replace("'changed'", "'older'")
    )
    assert call("--only", "p5", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "made of other sources" in printed and result_of(printed)["failed"] == []


def test_a_program_without_hoppers_instructions_is_not_used_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = make_program(tmp_path)
    text = program.read_text().replace("'has_hopper': True", "'capability': '9.0'")
    program.write_text(text)
    monkeypatch.setattr(build, "found_arch", lambda: None)
    assert call("--binary", str(program), monkeypatch=monkeypatch) == 1
    assert "probes: built without sm_90a" in capsys.readouterr().out


def test_results_that_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = make_program(tmp_path)
    options = ["--binary", str(program), "--save", str(program)]
    assert call(*options, monkeypatch=monkeypatch) == 1
    assert "probes: --save: " in capsys.readouterr().out


def test_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_FOLDERS", (tmp_path,))
    monkeypatch.setattr(build, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(build, "found_arch", lambda: "90a")
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    assert call(monkeypatch=monkeypatch) == 1
    assert "probes: no program: no nvcc on PATH" in capsys.readouterr().out
    monkeypatch.setattr(build, "find_tool", lambda name: "/bin/false")
    assert call(monkeypatch=monkeypatch) == 1
    assert "probes: no program: " in capsys.readouterr().out


def test_programs_that_do_not_start(tmp_path: Path) -> None:
    program = tmp_path / "text"
    program.write_text("no program")
    for path in (program, tmp_path / "none"):
        assert run_probe([str(path)], "p1", 5).failure.startswith("does not start: ")


def test_what_a_probe_started_is_stopped_with_it(tmp_path: Path) -> None:
    program, note = tmp_path / "forks", tmp_path / "pid"
    script = "import os, time\nif pid := os.fork():\n"
    script += f"    open({str(note)!r}, 'w').write(str(pid))\ntime.sleep(60)"
    program.write_text(f"#!{sys.executable} -IS\n{script}\n")
    program.chmod(0o755)
    assert run_probe([str(program)], "p1", 1).failure == "stopped after 1 s"
    assert ends(int(note.read_text()))


# --- the report -------------------------------------------------------------------------------


def test_files_are_named_after_the_card() -> None:
    assert file_name("probes", "NVIDIA H200") == "probes_h200"
    assert file_name("probes", "") == "probes_unknown"


def test_rows_with_other_keys_have_a_table_of_their_own() -> None:
    rows = [{"probe": "p1", "a": 1.23456, "b": "x" * 50}, {"probe": "p1", "c": True}]
    assert table(rows) == ["    a" + " " * 41 + "b", f"1.235  {'x' * 39}…", "   c", "True"]


def test_who_is_stopped_stops_its_probe(tmp_path: Path) -> None:
    """Else it would go on beside what is measured next."""
    program, note = make_program(tmp_path), tmp_path / "pid"
    text = program.read_text().splitlines(keepends=True)
    wait = f"if probe == 'p1':\n    open({str(note)!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
    at = next(i for i, line in enumerate(text) if line.startswith("for "))
    program.write_text("".join([*text[:at], wait, "    time.sleep(60)\n", *text[at:]]))
    argv = [sys.executable, "-m", "bench.probes", "--binary", str(program), "--only", "p1"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == b"probes: stopped\n"
    assert ends(int(note.read_text()))
