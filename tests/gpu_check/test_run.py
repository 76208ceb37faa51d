"""Running a stage: whatever a device does to its commands, the report is whole and readable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import goals
from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import judge, machine, report, stages
from bench.gpu_check import run as runs
from bench.gpu_check.judge import CUT, FAILED, OK, PARTIAL, SKIPPED
from bench.gpu_check.report import Report, passed_before
from bench.gpu_check.run import run_stage
from bench.gpu_check.stages import Command, Machine
from tests.gpu_check.test_stages import WITH_GPU, WITHOUT_GPU
from tests.processes import ends

ROOT = Path(__file__).parents[2]


def python(name: str, code: str, seconds: float = 60, **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), judge.by_exit, seconds, **options)


def report_of(tmp_path: Path, commands: list[Command]) -> Report:
    order = [command.name for command in commands]
    head = {"commit": "abc", "date": "2000"}
    return Report(tmp_path / "out/gpu_check_A.json", head, order, tmp_path / "logs")


def run(tmp_path: Path, commands: list[Command], seconds: float = 60) -> Report:
    one = report_of(tmp_path, commands)
    run_stage(commands, seconds, one, one.logs)
    return one


def statuses(one: Report) -> dict[str, str]:
    return {row["command"]: row["status"] for row in one.all_rows}


def test_a_command_that_fails_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        python("a", "print('why'); raise SystemExit(3)"),
        python("b", "import os; assert os.environ['SET'] == '1'", environment={"SET": "1"}),
        Command("c", (), judge.by_exit, 0, skipped="no tool"),
        Command("d", ("/no/such/program",), judge.by_exit, 60),
    ]
    one = run(tmp_path, commands)
    saved = json.loads(one.path.read_text())
    assert [row["status"] for row in saved["commands"]] == [FAILED, OK, SKIPPED, FAILED]
    assert (saved["commit"], saved["outcome"]) == ("abc", "FAILED")
    assert saved["left_out"] == ["c: no tool"]
    assert (tmp_path / "logs/a.log").read_text() == "why\n"
    assert "why" in capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in one.table().splitlines()[1:]] == [
        ["a", "failed"],
        ["b", "ok"],
        ["c", "skipped"],
        ["d", "failed"],
    ]


def test_a_command_that_overruns_is_cut(tmp_path: Path) -> None:
    """With its children; what comes after has the rest of the time."""
    child = tmp_path / "child"
    code = f"import subprocess as s; p = s.Popen(['sleep', '60']); open({str(child)!r}, 'w')"
    code += ".write(str(p.pid)); p.wait()"
    one = run(tmp_path, [python("slow", code, 5.2), python("quick", "pass")])
    assert statuses(one) == {"slow": CUT, "quick": OK}
    assert one.rows[0]["detail"] == "stopped after 5 s"
    assert not one.has_passed
    assert ends(int(child.read_text()))


def test_a_stage_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    commands = [python("a", "pass"), python("spare", "pass", is_spare=True)]
    one = run(tmp_path, commands, seconds=1)
    assert statuses(one) == {"a": CUT, "spare": PARTIAL}
    assert one.left_out == ["a: no time was left"]


def test_what_takes_the_rest_of_the_time_may_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_LEAST", 0.1)
    one = run(tmp_path, [python("spare", "import time; time.sleep(60)", 0.2, is_spare=True)])
    assert statuses(one) == {"spare": PARTIAL}
    assert (one.outcome, one.has_passed) == ("PARTIAL", True)


def test_an_aside_runs_beside_and_is_waited_for_by_those_that_need_it(tmp_path: Path) -> None:
    """``first`` ends only when ``second`` has begun, ``third`` begins when ``first`` has ended."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    wait = "import time, pathlib\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.02)\n"
    touch = "import pathlib; pathlib.Path({!r}).touch()\n"
    first = wait.format(str(begun)) + touch.format(str(ended))
    third = f"import pathlib; assert pathlib.Path({str(ended)!r}).exists()"
    commands = [
        python("first", first, is_aside=True),
        python("second", touch.format(str(begun))),
        python("third", third, needs="first"),
        python("last", "pass", is_aside=True),
    ]
    one = run(tmp_path, commands)
    assert statuses(one) == dict.fromkeys(["first", "second", "third", "last"], OK)
    assert [row["command"] for row in one.rows] == ["second", "first", "third", "last"]


def test_a_benchmark_is_told_its_budget(tmp_path: Path) -> None:
    code = "import sys; print(sys.argv[1])"
    argv = (sys.executable, "-c", code, stages.BUDGET)
    run(tmp_path, [Command("b", argv, judge.by_exit, 60)], seconds=100)
    assert (tmp_path / "logs/b.log").read_text() == "45\n"


# --- a device that fails at each point --------------------------------------------------------

FAULTS = {
    "traceback": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "silence": "pass",
    "half a result": "print('{\"rows\": [{\"us\": 1.', end='')",
    "noise": "import sys; sys.stdout.buffer.write(bytes(range(256)))",
    "refusal": "raise SystemExit('the device does not answer')",
}


@pytest.mark.parametrize("stage", stages.ON_A_GPU)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_device_may_fail_at_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, fault: str
) -> None:
    """All commands of a stage meet the fault: each is told in a line, none hides the next."""
    planned = stages.plan(WITH_GPU, stage, tmp_path)
    argv = (sys.executable, "-ISc", FAULTS[fault])  # starts in a hundredth of a second
    one = run(tmp_path, [replace(command, argv=argv) for command in planned])
    found = statuses(one)
    assert list(found) == [command.name for command in planned]
    trusting = {judge.by_last_line, judge.contender} if fault in ("silence", "noise") else set()
    for command in planned:
        if command.judge not in trusting and fault != "half a result":
            assert found[command.name] in (FAILED, SKIPPED), (command.name, one.rows)
    assert one.outcome == "FAILED"
    shown = one.table()
    assert "Traceback" not in shown and len(shown.splitlines()) == len(planned) + 1
    assert all(line.isprintable() for line in shown.splitlines())
    printed = capsys.readouterr().out
    assert judge.printable(printed) == printed


def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is one, too
    monkeypatch.setattr(machine, "_listed_gpus", lambda: "GPU 0: NVIDIA H100")
    with pytest.raises(SystemExit, match="sees no GPU, nvidia-smi sees GPU 0: NVIDIA H100"):
        machine.find(sys.executable)


@pytest.mark.parametrize("code", [FAULTS["traceback"], FAULTS["signal"], FAULTS["silence"]])
def test_a_gpu_without_facts_is_told_in_a_line(tmp_path: Path, code: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    with pytest.raises(SystemExit) as left:
        machine.find(str(fake))
    assert "bench.gpu failed: " in str(left.value.code) and "\n" not in str(left.value.code)


# --- results ----------------------------------------------------------------------------------


def main(monkeypatch: pytest.MonkeyPatch, *args: str, found: Machine = WITHOUT_GPU) -> int:
    monkeypatch.setattr(machine, "find", lambda python, is_dry: replace(found, is_dry=is_dry))
    monkeypatch.setattr(sys, "argv", ["gpu_check", *args])
    monkeypatch.setenv("PYTHONPATH", "")
    try:
        gpu_check.main()
    except SystemExit as left:
        if isinstance(left.code, str):
            raise
        return int(left.code or 0)
    return 0


def test_results_that_cannot_be_written_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    touch = [python("a", f"open({str(ran)!r}, 'w')")]
    monkeypatch.setattr(stages, "plan", lambda *_: touch)
    (tmp_path / "file").touch()
    for option in ("--save", "--logs", "--archive"):
        others = ["--save", str(tmp_path), "--logs", str(tmp_path)]
        others += ["--archive", str(tmp_path / "r.tar.gz")]
        with pytest.raises(SystemExit, match="cannot write there"):
            main(monkeypatch, *others, option, str(tmp_path / "file/x"))
    assert not ran.exists()


def test_only_what_failed_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what the others need; the summary is of both runs."""
    flag, ran = tmp_path / "mended", tmp_path / "ran"
    note = f"open({str(ran)!r}, 'a').write('{{}} ')\n"
    commands = [
        python("extension", note.format("extension")),
        python("aside", note.format("aside"), is_aside=True),
        python("good", note.format("good")),
        python("bad", note.format("bad") + f"open({str(flag)!r})", needs="aside"),
    ]
    monkeypatch.setattr(stages, "plan", lambda *_: commands)
    options = ["--save", str(tmp_path), "--logs", str(tmp_path / "logs")]
    options += ["--archive", str(tmp_path / "all.tar.gz")]
    with pytest.raises(SystemExit, match="--only-failed: no earlier run in"):
        main(monkeypatch, *options, "--only-failed")
    assert main(monkeypatch, *options) == 1
    flag.touch(), ran.unlink()
    assert main(monkeypatch, *options, "--only-failed") == 0
    assert sorted(ran.read_text().split()) == ["aside", "bad", "extension"]
    last = capsys.readouterr().out.splitlines()
    assert last[-1].startswith("gpu-check shim: passed")
    assert any(line.startswith("good") and "(earlier run, " in line for line in last)
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {"gpu_check_shim.json", "good.log", "bad.log"} <= names
    rows = passed_before(tmp_path / "gpu_check_shim.json", None)
    assert [row["command"] for row in rows] == ["extension", "aside", "good", "bad"]
    assert rows[2]["earlier"]["date"] <= rows[3]["earlier"]["date"]
    (tmp_path / "gpu_check_shim.json").write_text("{")
    with pytest.raises(SystemExit, match="is no summary"):
        main(monkeypatch, *options, "--only-failed")


def start_three(tmp_path: Path) -> subprocess.Popen[str]:
    """gpu-check in its second command of three; ``tmp_path/ready`` has that one's process id."""
    code = f"""
import sys
from pathlib import Path
from bench.gpu_check import __main__ as gpu_check, judge, machine, stages
def command(name, code):
    return stages.Command(name, (sys.executable, "-c", code), judge.by_exit, 60)
path = Path({str(tmp_path)!r})
wait = "import os, pathlib, time; new = pathlib.Path('{tmp_path}/new'); "
wait += "new.write_text(str(os.getpid())); new.replace('{tmp_path}/ready'); time.sleep(60)"
stages.plan = lambda *_: [command("a", "pass"), command("b", wait), command("c", "pass")]
machine.find = lambda python, is_dry: stages.Machine(python, {{}}, (), False, False, None)
sys.argv = ["gpu_check", "--save", str(path), "--logs", str(path / "logs")]
sys.argv += ["--archive", str(path / "all.tar.gz")]
gpu_check.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    return process


def test_an_interruption_leaves_the_summary_and_the_archive(tmp_path: Path) -> None:
    process = start_three(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    saved = json.loads((tmp_path / "gpu_check_shim.json").read_text())
    assert process.returncode == 1
    assert saved["outcome"] == "INTERRUPTED"
    assert [row["command"] for row in saved["commands"]] == ["a"]
    assert saved["left_out"] == ["b: interrupted", "c: not reached"]
    assert "gpu-check shim: INTERRUPTED" in output
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert any(name.endswith("b.log") for name in tar.getnames())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_a_kill_leaves_what_was_known_and_no_command(tmp_path: Path) -> None:
    process = start_three(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    saved = json.loads((tmp_path / "gpu_check_shim.json").read_text())
    assert [row["command"] for row in saved["commands"]] == ["a"]
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert any(name.endswith("a.log") for name in tar.getnames())
    assert ends(int((tmp_path / "ready").read_text()))


def test_only_a_gpu_writes_results_that_are_kept() -> None:
    def folder(found: Machine, *args: str) -> Path:
        return gpu_check.save_folder(gpu_check.arguments().parse_args(args), found)

    kept = ROOT / "bench/results"
    assert folder(WITH_GPU) == kept
    assert folder(WITHOUT_GPU) == kept / "local"
    assert folder(replace(WITH_GPU, is_dry=True)).parts[-3:] == ("build", "gpu_check", "dry")
    assert folder(WITHOUT_GPU, "--save", "/out") == Path("/out")


def test_listing_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--list", "--save", str(tmp_path / "new")) == 0
    shown = capsys.readouterr().out
    assert "GPU: torch sees none" in shown
    assert "python3 setup.py -q build_ext --inplace" in shown
    assert not (tmp_path / "new").exists()


def test_a_gpus_stage_is_listed_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "--list", "--stages", "A") == 0
    shown = capsys.readouterr().out
    assert "CMAKE_CUDA_ARCHITECTURES='90a;80'" in shown and "--dry" not in shown


def test_a_dry_run_leaves_a_real_ones_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_BUILD", tmp_path)
    monkeypatch.setattr(stages, "plan", lambda *_: [python("a", "pass")])
    assert main(monkeypatch, "--save", str(tmp_path / "real")) == 0
    real = (tmp_path / "results.tar.gz").read_bytes()
    assert main(monkeypatch, "--dry", "--stages", "A", found=WITH_GPU) == 0
    assert (tmp_path / "results.tar.gz").read_bytes() == real
    assert (tmp_path / "dry/results.tar.gz").exists()


def test_a_stage_that_needs_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="stage B needs a GPU, and torch sees none; try --dry"):
        main(monkeypatch, "--stages", "B")


def test_packing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text("{}")
    archive = tmp_path / "in/all.tar.gz"
    report.pack(archive, [tmp_path / "in", tmp_path / "none"])
    before = archive.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="no space"):
        report.pack(archive, [tmp_path / "in"])
    assert archive.read_bytes() == before


def test_of_a_long_log_the_end_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_PACKED_BYTES", 3)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.log").write_text("0123456789")
    report.pack(tmp_path / "all.tar.gz", [tmp_path / "in"])
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        packed = tar.extractfile("in/a.log")
        assert packed is not None and packed.read() == b"789"


def test_a_disk_that_fills_up_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Report) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Report, "write", full)
    one = run(tmp_path, [python("a", "print('x' * 9999); raise SystemExit(1)"), python("b", "1")])
    assert statuses(one) == {"a": FAILED, "b": OK}
    assert "the results are not written: no space left" in capsys.readouterr().out
    assert len(one.rows[0]["detail"]) < 9999


def test_what_passed_on_another_gpu_does_not_count(tmp_path: Path) -> None:
    """And a row keeps the commit at which it passed, however often others are run again."""
    path = tmp_path / "gpu_check_A.json"
    row = {"command": "a", "status": OK, "seconds": 1.0, "detail": ""}
    older = row | {"earlier": {"commit": "aaa", "date": "2000"}}
    summary = {"commit": "bbb", "date": "2001", "gpu": {"device": "H100"}, "commands": [row, older]}
    path.write_text(json.dumps(summary))
    found = [row["earlier"]["commit"] for row in passed_before(path, "H100")]
    assert found == ["bbb", "aaa"]
    with pytest.raises(SystemExit, match="is of H100, this is H200"):
        passed_before(path, "H200")


def test_the_archive_has_the_logs_of_all_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "plan", lambda *_: [python("a", "pass")])
    options = ["--save", str(tmp_path), "--logs", str(tmp_path / "logs")]
    options += ["--archive", str(tmp_path / "all.tar.gz"), "--stages", "A,C"]
    assert main(monkeypatch, *options, found=WITH_GPU) == 0
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert {"A/a.log", "C/a.log"} <= set(tar.getnames())


def test_facts_of_this_run_are_told(tmp_path: Path) -> None:
    probes = {"environment": {"date": "2020-01-02"}, "facts": ["P1: one sum of sixteen"]}
    (tmp_path / "probes_h100.json").write_text(json.dumps(probes))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"rows": []}')
    assert report.facts_found(tmp_path, "2020-01-01") == ["P1: one sum of sixteen"]
    assert report.facts_found(tmp_path, "2020-01-03") == []


def test_goals(tmp_path: Path) -> None:
    rows = [
        {"model": "Llama-3-8B", "batch": 1, "prefix": 2048, "nodes": 60, "us": 8.0, "sdpa/ours": 2},
        {"model": "Llama-3-8B", "batch": 4, "prefix": 8192, "nodes": 60, "us": 5.0},
    ]
    result: dict[str, Any] = {"environment": {"date": "2020-01-02"}, "rows": rows}
    path = tmp_path / "tree_attention_cuda.json"
    path.write_text(json.dumps(result | {"summary": {"bytes_per_s": 2.15e12}}))
    assert goals.lines(tmp_path, "2020-01-01") == [
        "Llama-3-8B 1 2048 60: us 8, goal <= 12 (6 at an H200's 4.3 TB/s): reached",
        "Llama-3-8B 1 2048 60: sdpa/ours 2, goal >= 3: missed",
    ]
    path.write_text(json.dumps(result | {"summary": {}}))
    assert "goal <= 6 (6 at" in goals.lines(tmp_path, "2020-01-01")[0]
    assert goals.lines(tmp_path, "2020-01-03") == []
