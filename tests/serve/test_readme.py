"""What the documentation shows runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.support import QUESTION, Running, load_small, running

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with load_small() as engine, running(engine, "builtin") as made:
        yield made


def block(file: str, heading: str, language: str) -> str:
    section = (ROOT / file).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    assert len(found) == 1
    return str(found[0])


def said(server: Running, **options: object) -> str:
    return str(server.engine.generate(QUESTION, max_new_tokens=24, **options).text)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_readmes_curl(server: Running) -> None:
    command = block("README.md", "Serve it", "bash")
    assert ADDRESS in command
    done = subprocess.run(
        ["bash", "-ec", command.replace(ADDRESS, server.url)], capture_output=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == said(server)


def test_the_readmes_client(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    code = block("README.md", "Serve it", "python")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, server.url), "README.md", "exec"), {})
    assert capsys.readouterr().out == said(server, seed=7, temperature=1.0)


def test_the_event_loop_of_the_documentation() -> None:
    code = block("docs/serving.md", "In an event loop of your own", "python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert len(done.stdout.splitlines()) >= 3  # the stream's text, and two results
