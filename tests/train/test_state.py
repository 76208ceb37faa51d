"""States on disk: a flipped bit is found, two writers never meet, a full disk spoils nothing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator

from specrt.train.loop.checksums import SUMS, check_sums, write_sums
from specrt.train.loop.lock import hold_directory, hold_file
from specrt.types import CheckpointError
from tests.train.support import curve, make_source, make_trainer, train

STATE = Path("state") / "step-00000002"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal stopped after two steps."""
    out = tmp_path_factory.mktemp("stopped")
    source = make_source()
    source.on_batch = lambda batch: signal.raise_signal(signal.SIGINT) if batch == 2 else None
    train(out, source=source)
    return out


@pytest.fixture
def out(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "out")
    return tmp_path / "out"


def flip(file: Path, place: float) -> None:
    """Flip one bit, at a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def files_of(state: Path) -> list[str]:
    return sorted(path.name for path in state.iterdir())


# --- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(out: Path) -> None:
    names = files_of(out / STATE)
    assert {"run.json", "model.safetensors", "optimizer.bin", SUMS} <= set(names)
    for name in names:
        file = out / STATE / name
        content = file.read_bytes()
        for place in (0.0, 0.1, 0.5, 0.9, 1.0):
            flip(file, place)
            with pytest.raises(CheckpointError, match=f"^{out / STATE}.*--restart") as refused:
                make_trainer(out)
            assert str(file) in str(refused.value) or name == SUMS
            file.write_bytes(content)
    make_trainer(out)


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "gone"])
def test_any_other_damage_is_named(out: Path, content: bytes | None) -> None:
    for name in files_of(out / STATE):
        file = out / STATE / name
        before = file.read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        if name == SUMS and content is None:  # a state of an earlier version
            make_trainer(out)
        elif name != "run.json" or content is not None:
            with pytest.raises(CheckpointError, match=f"{file}: .*; --restart begins anew"):
                make_trainer(out)
        file.write_bytes(before)


def test_a_state_without_checksums_goes_on(out: Path, tmp_path: Path) -> None:
    """As those of earlier versions."""
    (out / STATE / SUMS).unlink()
    assert curve(train(out)) == curve(train(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage"], ids=["empty", "garbage"])
def test_what_no_checksum_guards_is_refused_by_the_state(
    out: Path, name: str, content: bytes
) -> None:
    (out / STATE / SUMS).unlink()
    (out / STATE / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{out / STATE}: .* cannot be read: .+; --restart"):
        train(out)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ("{}", '"identity": expected an object, got NoneType'),
        ('{"identity": {}}', '"progress": expected an object'),
        ('{"identity": {}, "progress": {"steps": 1}}', "cannot be read: .*steps"),
    ],
)
def test_a_run_file_that_no_checksum_guards(out: Path, content: str, message: str) -> None:
    (out / STATE / SUMS).unlink()
    (out / STATE / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{out / STATE}.*{message}.*; --restart"):
        train(out)


def test_what_is_no_state_is_passed_over(out: Path) -> None:
    for name in ("step-x", "step-00000009"):
        (out / "state" / name).mkdir()
    (out / "state" / "step-x" / "run.json").touch()
    assert train(out).is_done


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"abc")
    write_sums(tmp_path)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (tmp_path / SUMS).read_text() == f"{digest}  inner/a\n"
    check_sums(tmp_path)
    (tmp_path / "more").touch()
    with pytest.raises(CheckpointError, match="more is not listed"):
        check_sums(tmp_path)


# --- two writers ----------------------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
from specrt.train.loop.lock import hold_directory
with hold_directory(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_directory_has_one_writer_until_its_process_ends(tmp_path: Path) -> None:
    held = tmp_path / "held"
    command = [sys.executable, "-c", HOLD, str(held)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            said = f"^{held}: process {holder.pid} on .+ is writing here; wait"
            with pytest.raises(ValueError, match=said), hold_directory(held):
                pass
            with hold_directory(tmp_path / "other"):
                pass
        finally:
            holder.kill()
    assert (held / ".lock").exists()
    with hold_directory(held):
        pass
    assert not (held / ".lock").exists()


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    with hold_directory(tmp_path / "a" / "b"):
        pass
    assert files_of(tmp_path / "a") == []
    with hold_directory(tmp_path / "a"), hold_file(tmp_path / "a" / "x"):
        (tmp_path / "a" / "x").touch()
        said = f"^{tmp_path / 'a' / 'x'}: process {os.getpid()} on"
        with pytest.raises(ValueError, match=said), hold_file(tmp_path / "a" / "x"):
            pass
    assert files_of(tmp_path / "a") == ["x"]
    with pytest.raises(FileNotFoundError) as missing, hold_file(tmp_path / "no" / "x"):
        pass
    assert missing.value.filename == str(tmp_path / "no" / "x")


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
def test_a_full_disk_names_the_file_and_keeps_the_older_state(
    out: Path, name: str, small_files: Callable[[int], None]
) -> None:
    """Whichever file it is that does not fit."""
    source, limit = make_source(), (out / STATE / name).stat().st_size - 1
    source.on_batch = lambda batch: small_files(limit)
    with pytest.raises(
        OSError, match="the state after step 8 is not saved; .*-00000002 is"
    ) as full:
        train(out, source=source)
    small_files(resource.RLIM_INFINITY)
    assert full.value.filename == str(out / "state" / "partial" / name)
    assert full.value.errno == errno.EFBIG
    assert files_of(out / "state") == ["step-00000002"]
    check_sums(out / STATE)
    assert train(out).is_done


def test_what_is_not_the_disks_fault_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(accelerator: object, folder: str) -> None:
        raise RuntimeError("a peer is gone")

    monkeypatch.setattr(Accelerator, "save_state", broken)
    with pytest.raises(RuntimeError, match="^a peer is gone$"):
        train(tmp_path)
    assert files_of(tmp_path / "state") == []
