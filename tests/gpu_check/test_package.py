"""What a GPU's machine without a network is brought: taken as far as it fits, never trusted."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import extension
from bench.commit import packed_commit
from bench.gpu_check import package
from bench.gpu_check.package import Manifest


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Sources of an extension, and an archive with one made of them."""
    for name in ("CMakeLists.txt", "setup.py", "specrt/__init__.py", "csrc/a/a.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "build").mkdir()
    sources = extension.source_digest(tmp_path)
    pack(tmp_path, Manifest("abc", "3.12", extension.file_name(), sources, []))
    return tmp_path


def pack(root: Path, manifest: Manifest) -> None:
    folder = root / "packed"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    (folder / manifest.extension).write_bytes(b"machine code")
    with tarfile.open(root / package.ARCHIVE, "w:gz") as tar:
        for path in folder.iterdir():
            tar.add(path, path.name)


def test_without_an_archive_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert package.unpack(tmp_path) == []


def test_an_extension_of_these_sources_is_taken(checkout: Path) -> None:
    assert package.unpack(checkout)[0] == f"{extension.file_name()} is from {package.ARCHIVE}"
    assert (checkout / "specrt" / extension.file_name()).read_bytes() == b"machine code"
    assert "does not import" in extension.misfit(checkout)


def test_results_outside_a_checkout_name_the_packages_commit(checkout: Path) -> None:
    manifest = checkout / package.FOLDER / "manifest.json"
    assert packed_commit(manifest) is None
    package.unpack(checkout)
    assert packed_commit(manifest) == "abc (of the package)"


def test_an_extension_of_other_sources_is_not(checkout: Path) -> None:
    (checkout / "csrc/a/a.cpp").write_text("changed")
    assert "is made of other sources (abc)" in package.unpack(checkout)[0]
    assert extension.misfit(checkout) == "none is there"


def test_nor_one_for_another_python(checkout: Path) -> None:
    pack(checkout, Manifest("abc", "3.9", "_C.cpython-39-x.so", "", []))
    assert "is not for this Python" in package.unpack(checkout)[0]


@pytest.mark.parametrize("kept", [0, 1, 40, 200])
def test_a_truncated_archive_is_not_used(checkout: Path, kept: int) -> None:
    archive = checkout / package.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:kept])
    (line,) = package.unpack(checkout)
    assert line.startswith(f"{package.ARCHIVE} is not used: ")


def test_a_damaged_archive_does_not_raise(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_install", lambda *_: "")
    archive = checkout / package.ARCHIVE
    whole = archive.read_bytes()
    for at in range(12, len(whole), 7):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        assert package.unpack(checkout), at


def test_an_archive_without_the_extension_it_names(checkout: Path) -> None:
    (checkout / "packed" / extension.file_name()).unlink()
    with tarfile.open(checkout / package.ARCHIVE, "w:gz") as tar:
        tar.add(checkout / "packed/manifest.json", "manifest.json")
    assert f"{extension.file_name()} is not used: " in package.unpack(checkout)[0]


def test_an_archive_writes_nowhere_else(checkout: Path) -> None:
    with tarfile.open(checkout / package.ARCHIVE, "w:gz") as tar:
        tar.add(checkout / "packed/manifest.json", "../../escaped")
    assert "is not used: " in package.unpack(checkout)[0]
    assert not list(checkout.rglob("escaped"))


def test_an_archive_without_its_manifest_is_not_used(checkout: Path) -> None:
    with tarfile.open(checkout / package.ARCHIVE, "w:gz") as tar:
        tar.add(checkout / "setup.py", "setup.py")
    assert "is not used: " in package.unpack(checkout)[0]


def test_wheels_that_do_not_install_are_done_without(checkout: Path) -> None:
    manifest = Manifest("abc", "3.12", extension.file_name(), "", ["no-1-py3-none-any.whl"])
    pack(checkout, manifest)
    assert package.unpack(checkout)[1].startswith("wheels are not used: ")


def test_what_was_made_of_what_is_known_only_by_its_stamp(checkout: Path) -> None:
    path = checkout / "specrt" / extension.file_name()
    path.write_bytes(b"of unknown origin")
    assert extension.misfit(checkout) == "what it was made of is not known"
    extension.write_stamp(path, extension.source_digest(checkout))
    assert "does not import" in extension.misfit(checkout)
    path.write_bytes(b"replaced")
    assert extension.misfit(checkout) == "what it was made of is not known"
    extension.write_stamp(path, extension.source_digest(checkout))
    (checkout / "csrc/a/new.cu").touch()
    assert extension.misfit(checkout) == "it was made of other sources"


def test_sizes_that_do_not_fit_are_refused() -> None:
    package.check_sizes(package.MOST_BYTES, 30_000_000)
    with pytest.raises(SystemExit, match="26,000,001 bytes, at most 26,000,000 may be"):
        package.check_sizes(package.MOST_BYTES + 1, 0)
    with pytest.raises(SystemExit, match="with 60,000,000 bytes of tracked files 65,011,713"):
        package.check_sizes(5_011_713, 60_000_000)


def test_the_checkout_leaves_room_for_a_package() -> None:
    """Else no package could travel with it, however small."""
    checkout = package.tracked_bytes(package.ROOT)
    package.check_sizes(package.MOST_BYTES, checkout)


def test_a_python_of_another_version_is_refused() -> None:
    with pytest.raises(SystemExit, match="/no/python is not Python 3.12"):
        package._chosen("/no/python")


def test_a_step_that_fails_is_named() -> None:
    with pytest.raises(SystemExit, match="gpu-package: it broke: why"):
        package._run([sys.executable, "-c", "raise SystemExit('why')"], "it broke")


def test_brought_packages_come_first(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert package.search_path(checkout) == ["/mine"]
    site = checkout / package.FOLDER / "site"
    site.mkdir(parents=True)
    assert package.search_path(checkout) == [str(site), "/mine"]


def test_tracked_files_are_counted(checkout: Path) -> None:
    assert package.tracked_bytes(checkout) == 0
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    subprocess.run(["git", "add", "setup.py"], cwd=checkout, check=True)
    assert package.tracked_bytes(checkout) == len("setup.py")


def test_problems_that_were_brought_along(checkout: Path) -> None:
    assert package.problems(checkout) is None
    file = checkout / package.FOLDER / "problems.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    assert package.problems(checkout) == file
