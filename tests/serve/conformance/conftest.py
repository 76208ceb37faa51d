"""The server that is asked: any OpenAI-compatible one, by default ours with the bundled model.

Nothing here imports specrt, so that the folder can be run alone against another server (README).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

openai = pytest.importorskip("openai", reason="the official client is not installed")

START_SECONDS = 120.0
KEY = "conformance-key"
ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Endpoint:
    """A server and who asks it."""

    base_url: str
    """Of the OpenAI routes; ends with ``/v1``."""
    api_key: str
    model: str
    has_extensions: bool
    """Whether it is ours."""

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname or "localhost"

    @property
    def port(self) -> int:
        return urlsplit(self.base_url).port or 80


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--base-url", help="of the server to ask, e.g. http://localhost:8000/v1")
    group.addoption("--api-key", help="for it; default: none")
    group.addoption("--model", help="default: the first that it lists")


def pytest_configure(config: pytest.Config) -> None:
    # Here and not in pyproject.toml, which a copy of this folder does not have beside it.
    config.addinivalue_line("markers", "extension: what specrt's server has beyond OpenAI's")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    base_url = request.config.getoption("--base-url", default=None)
    if base_url:
        key = request.config.getoption("--api-key", default=None) or "none"
        model = request.config.getoption("--model", default=None)
        yield described(base_url.rstrip("/"), key, model)
        return
    for needed in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(needed, reason="the server's libraries are not installed")
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "specrt", "serve", "builtin", "--port", str(port)]
        process = subprocess.Popen(
            command, env={**os.environ, "SPECRT_API_KEY": KEY}, stdout=log, stderr=log
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield described(f"http://127.0.0.1:{port}/v1", KEY, None)
        except TimeoutError as error:
            log.seek(0)
            pytest.fail(f"{error}\n{log.read()[-3000:].decode(errors='replace')}")
        finally:
            process.terminate()
            assert process.wait(30) == 0, "the server did not end well at SIGTERM"


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers.

    Raises:
        TimeoutError: it ended, or time ran out.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise TimeoutError("specrt serve did not start")


def described(base_url: str, key: str, model: str | None) -> Endpoint:
    """An endpoint, with what its list of models says of it."""
    with openai.OpenAI(base_url=base_url, api_key=key) as client:
        listed = client.models.list().data
    chosen = next((one for one in listed if one.id == model), listed[0])
    return Endpoint(base_url, key, chosen.id, chosen.owned_by == "specrt")


@pytest.fixture(autouse=True)
def _skip_extensions(request: pytest.FixtureRequest, server: Endpoint) -> None:
    if request.node.get_closest_marker("extension") and not server.has_extensions:
        pytest.skip("an extension of specrt's server")


@pytest.fixture(scope="session")
def client(server: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=ANSWER_SECONDS
    ) as made:
        yield made


@pytest.fixture
def make_async_client(server: Endpoint) -> Callable[[], openai.AsyncOpenAI]:
    def made() -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=ANSWER_SECONDS
        )

    return made


@pytest.fixture(scope="session")
def model(server: Endpoint) -> str:
    return server.model
