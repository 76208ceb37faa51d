"""Which sources a result says it comes from."""

from __future__ import annotations

import pytest

from bench import commit


def test_without_git_the_environment_says_which_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SPECRT_COMMIT", raising=False)
    monkeypatch.setattr(commit, "packed_commit", lambda manifest: None)
    assert commit.git_commit() is None
    monkeypatch.setattr(commit, "packed_commit", lambda manifest: "abc (of the package)")
    assert commit.git_commit() == "abc (of the package)"
    monkeypatch.setenv("SPECRT_COMMIT", "0123456789ab")
    assert commit.git_commit() == "0123456789ab"
