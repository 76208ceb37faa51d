"""``--drafter``: whom the contract (``test_contract.py``) is held against, in place of ours."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--drafter",
        help="package.module:factory (a Kind, or what takes a DrafterRequest and gives a drafter), "
        "or as for specrt.load: a name or a directory",
    )
    parser.addoption(
        "--drafter-target",
        help="the directory of the target it drafts for, or 'builtin'; default: a tiny random one, "
        "for a bundled drafter the bundled one",
    )
