"""Every family that is run, against transformers; every other one refused for what it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrt.config.families import FAMILIES
from tests.engine.support import make_model
from tests.families import build, compare, refusal, speculated
from tests.family_cases import CASES, VARIANTS, Case

RUN = [case for case in (*CASES, *VARIANTS) if case.is_run]
REFUSED = [case for case in CASES if not case.is_run]
# One of each thing that trees and caches see: windows, windows beside layers without rotary
# embedding, learned positions, parallel layers. The others differ inside of a layer.
SPECULATED = {"mistral", "gemma3_text", "cohere2", "gpt2", "gpt_neox", "smollm3"}


def label(case: Case) -> str:
    return case.label


@pytest.mark.parametrize("case", RUN, ids=label)
def test_logits_and_greedy_tokens_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    theirs = build(case, tmp_path)
    model = make_model(tmp_path)
    came, tokens = compare(theirs, model)
    assert came.state == "equal", came
    if case.model_type in SPECULATED:
        for name, text in speculated(model, tokens).items():
            assert text == tokens, name


@pytest.mark.slow
@pytest.mark.parametrize("case", RUN, ids=label)
def test_speculation_is_plain_decoding(case: Case, tmp_path: Path) -> None:
    theirs = build(case, tmp_path)
    model = make_model(tmp_path)
    _, tokens = compare(theirs, model)
    for name, text in speculated(model, tokens).items():
        assert text == tokens, name


@pytest.mark.parametrize("case", REFUSED, ids=label)
def test_others_are_refused_for_what_they_have(case: Case) -> None:
    message = refusal(case)
    assert message is not None
    assert message.startswith(f"model_type {case.model_type!r} is not supported: it has ")


def test_each_family_is_asked() -> None:
    asked = {case.model_type for case in RUN}
    assert {name for name in FAMILIES if not name.endswith("_vl_text")} == asked
    assert len(CASES) == 82
