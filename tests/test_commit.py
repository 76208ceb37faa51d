"""Which sources a result says it comes from."""

from __future__ import annotations

import pytest

from bench import commit


def test_who_says_which_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECRT_COMMIT", "0123456789ab")  # before git
    assert commit.git_commit() == "0123456789ab"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("SPECRT_COMMIT")
    monkeypatch.setattr(commit, "packed_commit", lambda manifest: None)
    assert commit.git_commit() is None
    monkeypatch.setattr(commit, "packed_commit", lambda manifest: "abc (of the package)")
    assert commit.git_commit() == "abc (of the package)"
