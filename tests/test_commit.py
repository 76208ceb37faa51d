"""Which sources a result says it comes from."""

from __future__ import annotations

import pytest

from bench import commit


def test_without_git_the_environment_says_which_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SPECRT_COMMIT", raising=False)
    assert commit.git_commit() is None
    monkeypatch.setenv("SPECRT_COMMIT", "0123456789ab")
    assert commit.git_commit() == "0123456789ab"
