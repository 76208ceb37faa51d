"""Names of the Hub's repositories: what is fetched, from where, and what is said when it is not.

There is no Hub here. Its package is asked through a stand-in for ``snapshot_download``, a cache
folder made by hand, and a server on this machine (``HF_ENDPOINT``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import specrt
from specrt.cli.engine_options import target_directory
from specrt.config import ModelConfig
from specrt.config.hub import HubName, hub_name, local_path
from specrt.draft.kinds import drafter_directory
from specrt.types import CheckpointError
from tests.checkpoints import make_checkpoint, store_as_bin
from tests.cli.test_cli import run, write_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("org/model", HubName("org/model")),
        ("org/model@v1", HubName("org/model", "v1")),
        ("org/model@refs/pr/3", HubName("org/model", "refs/pr/3")),
        ("org/model:m-Q4_1.gguf", HubName("org/model", None, "m-Q4_1.gguf")),
        ("org/model@main:sub/m.gguf", HubName("org/model", "main", "sub/m.gguf")),
        ("model", None),
        ("/org/model", None),
        ("./org/model", None),
        ("a/b/c", None),
        ("org/model.gguf", None),
        ("org/model:weights.bin", None),
        ("", None),
        (Path("org/model"), None),
    ],
)
def test_names(name: str, meant: HubName | None) -> None:
    assert hub_name(name) == meant
    assert meant is None or str(meant) == name


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert local_path("org/model") == Path("org/model")


class Repository:
    """Stands in for ``snapshot_download``: copies what is asked for, and writes down the calls."""

    def __init__(self, files: Path, place: Path) -> None:
        self.files, self.place, self.calls = files, place, list[dict[str, Any]]()

    def __call__(self, repository: str, **options: Any) -> str:
        self.calls.append({"repository": repository, **options})
        self.place.mkdir(exist_ok=True)
        for file in self.files.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in options["allow_patterns"]):
                (self.place / file.name).write_bytes(file.read_bytes())
        return str(self.place)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    make_checkpoint("llama", tmp_path / "files")
    write_tokenizer(tmp_path / "files")
    for name in ("model-Q4_1.gguf", "original.pth", "rust_model.ot", "consolidated.safetensors"):
        (tmp_path / "files" / name).write_bytes(b"GGUF")
    (tmp_path / "files/pytorch_model.bin").touch()
    made = Repository(tmp_path / "files", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["a.gguf"])
    return made


def test_only_what_is_read_is_fetched(repository: Repository) -> None:
    engine = specrt.load("org/model@v2", progress=False, local_files_only=True)
    assert engine.generate([1, 5], max_new_tokens=3).token_ids
    (call,) = repository.calls
    assert (call["repository"], call["revision"]) == ("org/model", "v2")
    assert call["local_files_only"]
    names = {file.name for file in repository.place.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".gguf", ".pth", ".bin", ".ot"))}
    assert "consolidated.safetensors" not in names


def test_every_place_that_takes_a_path(
    repository: Repository, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = ModelConfig.from_directory(local_path("org/model"))
    assert drafter_directory("org/model", target) == repository.place
    assert target_directory("org/model") == (repository.place, "model")
    specrt.load("org/model", "org/model", progress=False)
    code, out, err = run(capsys, "info", "org/model", "--json")
    assert code == 0, err
    assert json.loads(out)["target"]["name"] == "model"
    assert {call["repository"] for call in repository.calls} == {"org/model"}


def test_pytorch_weights_where_there_are_no_others(repository: Repository) -> None:
    (repository.files / "consolidated.safetensors").unlink()
    store_as_bin(repository.files)
    assert (local_path("org/model") / "pytorch_model.bin").is_file()
    assert len(repository.calls) == 2


def test_a_gguf_file_is_fetched_by_its_name(repository: Repository) -> None:
    assert local_path("org/model:model-Q4_1.gguf") == repository.place / "model-Q4_1.gguf"
    assert [file.name for file in repository.place.iterdir()] == ["model-Q4_1.gguf"]
    with pytest.raises(CheckpointError, match=r"org/model:b.gguf: no such file; .*: a.gguf"):
        local_path("org/model:b.gguf")


def test_files_of_gguf_are_named_where_there_is_nothing_else(repository: Repository) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (repository.files / name).unlink()
    with pytest.raises(CheckpointError, match=r"org/model: no weights .*org/model:FILE: a.gguf"):
        local_path("org/model")


def _answer(code: int) -> Any:
    return SimpleNamespace(status_code=code, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("x", response=_answer(403)), "a gated repository: accept its terms"),
        (errors.RepositoryNotFoundError("x", response=_answer(404)), "no such directory, and no"),
        (errors.RevisionNotFoundError("x", response=_answer(404)), "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), "not complete in the Hub's cache (the Hub cannot"),
        (OSError(28, "No space left\non device"), "OSError: [Errno 28] No space left"),
        (errors.HFValidationError("bad\nname"), "HFValidationError: bad"),
    ],
)
def test_one_line_for_each_fault(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as caught:
        specrt.load("org/model@v9")
    message = str(caught.value)
    assert message.startswith("org/model@v9: ") and words in message and "\n" not in message


# --- the package itself -------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the package's, and no way out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cache_is_read_offline(cache: Path) -> None:
    folder = cache / "models--org--model"
    snapshot = folder / "snapshots" / COMMIT
    make_checkpoint("llama", snapshot)
    write_tokenizer(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    for name in ("org/model", f"org/model@{COMMIT}"):
        assert local_path(name) == snapshot
    assert specrt.load("org/model", progress=False).generate([1], max_new_tokens=2).token_ids
    with pytest.raises(CheckpointError, match=r"org/model@v1: .*cache \(HF_HUB_OFFLINE is set\)"):
        local_path("org/model@v1")
    with pytest.raises(CheckpointError, match=r"org/other: .*cache \(local_files_only\)"):
        specrt.load("org/other", local_files_only=True)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="org/model: no weights in the cache"):
        local_path("org/model")


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for; files of ``directory``."""

    directory: Path

    def do_HEAD(self) -> None:
        self._serve(has_body=False)

    def do_GET(self) -> None:
        self._serve(has_body=True)

    def _serve(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(file.name for file in self.directory.iterdir())
        if path.startswith("/api/models/org/model/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": (self.directory / name).stat().st_size,
                    "oid": f"{number:040x}",
                }
                for number, name in enumerate(files)
            ]
            return self._send(json.dumps(entries).encode(), has_body)
        if path.startswith("/api/models/org/model"):
            info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            return self._send(json.dumps(info).encode(), has_body)
        name = path.rpartition("/")[2]
        if path.startswith("/org/model/resolve/") and name in files:
            return self._send((self.directory / name).read_bytes(), has_body, files.index(name))
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, has_body: bool, number: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{number:040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    make_checkpoint("llama", tmp_path / "files")
    (tmp_path / "files/model-Q4_1.gguf").write_bytes(b"GGUF")
    handler = type("Handler", (_Hub,), {"directory": tmp_path / "files"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_server_of_the_hub_s_kind(endpoint: str, tmp_path: Path) -> None:
    """In a process of its own, as the package reads ``HF_ENDPOINT`` when it is imported."""
    program = """
import sys
from specrt.config.hub import local_path
from specrt.types import CheckpointError
assert "huggingface_hub" not in sys.modules
print(*sorted(file.name for file in local_path("org/model").iterdir()))
print(local_path("org/model", local_files_only=True).name)
try:
    local_path("org/unknown")
except CheckpointError as error:
    print(error)
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=kept, capture_output=True, text=True, timeout=120
    )
    lines = told.stdout.splitlines()
    assert lines[:2] == ["config.json generation_config.json model.safetensors", COMMIT], told
    assert lines[2].startswith("org/unknown: no such directory, and no such repository")
