"""Structured output: of the form asked for, and the same whoever drafts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="structured output needs llguidance")

import specrt
from specrt import SamplingParams, StructuredOutput
from specrt.builtin import heldout_prompts
from specrt.draft.base import Budget, Drafter, DraftParams, EmptyDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.length.costs import RoundCost
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine.engine import Engine
from specrt.engine.grammar import Grammars
from specrt.models.tokenizer import Tokenizer
from specrt.types import Proposal, SequenceState
from tests.text_tokenizers import byte_level, llama

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
NUMBER = r"(the sum|the rest) is -?\d{1,4}\.\d{2}"
CHOICES = ["yes", "no", 'may"be', "yes and no", "\u00e9t\u00e9"]
PAIRS = 'start: "(" pair ("," pair){0,2} ")"\npair: /[a-z]{1,5}/ "=" /[0-9]{1,3}/\n'


def is_of_schema(text: str) -> bool:
    said = json.loads(text)
    assert list(said) == ["name", "age", "tags"]
    assert isinstance(said["name"], str) and len(said["name"]) <= 6
    return 0 <= said["age"] <= 130 and set(said["tags"]) <= {"red", "blue"}


FORMS: dict[str, tuple[StructuredOutput, Callable[[str], object]]] = {
    "schema": (StructuredOutput(json_schema=SCHEMA), is_of_schema),
    "regex": (StructuredOutput(regex=NUMBER), re.compile(NUMBER).fullmatch),
    "choice": (StructuredOutput(choice=CHOICES), CHOICES.__contains__),
    "grammar": (
        StructuredOutput(grammar=PAIRS),
        re.compile(r"\(([a-z]{1,5}=\d{1,3},?){1,3}\)").fullmatch,
    ),
}
ASKED = heldout_prompts()[:4]
GREEDY = SamplingParams(max_new_tokens=60)
SEEDED = SamplingParams(max_new_tokens=60, temperature=0.9, top_p=0.95, seed=3)
FREE = SamplingParams(max_new_tokens=12)


class EagerLookup(PromptLookupDrafter):
    """Drafts whatever it costs."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        return super().propose(states, Budget(budget.max_nodes, RoundCost(slope=0.0)))


@pytest.fixture(scope="module")
def bundled() -> Engine:
    return specrt.load("builtin")


def asked(params: SamplingParams) -> list[SamplingParams]:
    """Each form of one prompt."""
    return [replace(params, structured=form) for form, _ in FORMS.values()]


EVERYTHING = [*ASKED, *ASKED, ASKED[0]], [*asked(GREEDY), *asked(SEEDED), FREE]
"""All forms, greedy and drawn, and one who is free."""


@pytest.fixture(scope="module")
def plain(bundled: Engine) -> list[tuple[list[int], str]]:
    """What is said alone, undrafted."""
    engine = Engine(bundled.target, EmptyDrafter(), bundled.tokenizer, max_batch=1)
    return [(r.token_ids, r.text) for r in engine.generate(*EVERYTHING)]


def drafter_of(bundled: Engine, name: str) -> Drafter:
    if name == "prompt-lookup":
        return EagerLookup()
    return load_drafter(name, bundled.target, None, DrafterOptions())


def test_texts_are_of_their_form(bundled: Engine) -> None:
    engine = Engine(bundled.target, EmptyDrafter(), bundled.tokenizer)
    for params in (GREEDY, replace(SEEDED, seed=9, repetition_penalty=1.2)):
        for result, (form, fits) in zip(
            engine.generate(ASKED, asked(params)), FORMS.values(), strict=True
        ):
            assert result.finish_reason == "stop", (form.kind, result.text)
            assert fits(result.text), (form.kind, result.text)
            assert result.token_ids[-1] in bundled.target.config.eos_ids


@pytest.mark.parametrize(
    "name", ["fspad", "prompt-lookup", pytest.param("eesd", marks=pytest.mark.slow)]
)
def test_drafting_changes_nothing(
    bundled: Engine, plain: list[tuple[list[int], str]], name: str
) -> None:
    """In a batch with one that is free; sequences join and leave."""
    shapes = {"fspad": DraftParams(depth=3, top_k=3), "eesd": DraftParams(depth=3)}
    engine = Engine(bundled.target, drafter_of(bundled, name), bundled.tokenizer, max_batch=5)
    results = engine.generate(*EVERYTHING, shapes.get(name))
    assert [(r.token_ids, r.text) for r in results] == plain
    assert sum(r.stats.num_accepted_tokens for r in results[:-1]) > 0


def test_a_stop_string_and_a_limit_cut_it(bundled: Engine) -> None:
    form = StructuredOutput(json_schema=SCHEMA)
    engine = Engine(bundled.target, EagerLookup(), bundled.tokenizer)
    cut = engine.generate(ASKED[0], structured=form, stop='"age"')
    assert cut.finish_reason == "stop" and cut.text.endswith(", ") and '"name"' in cut.text
    short = engine.generate(ASKED[0], structured=form, max_new_tokens=5)
    assert short.finish_reason == "length" and len(short.token_ids) == 5
    stopped = engine.generate(
        ASKED[0],
        structured=form,
        ignore_eos=True,
        stop_token_ids=[engine.encode("\n", add_special_tokens=False)[-1]],
    )
    assert stopped.finish_reason == "stop" and is_of_schema(stopped.text)
    late = engine.generate(ASKED[0], structured=StructuredOutput(choice=["a"]), min_new_tokens=9)
    assert late.finish_reason == "error" and late.text == "a"
    assert str(late.error).startswith("min_new_tokens, structured: no token is left at position")


def test_with_a_processor_that_would_have_it_otherwise(bundled: Engine) -> None:
    """What it favours comes where the form allows it."""
    (seven,) = bundled.encode("7", add_special_tokens=False)

    def favour(ids: list[int], row: Any) -> Any:
        row[seven] = 1e9
        return row

    result = bundled.generate(
        ASKED[1], structured=StructuredOutput(regex="a[0-9]b"), logits_processor=favour
    )
    assert result.text == "a7b"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"regex": "(a"}, "^regex: .*unclosed group"),
    "look-ahead": ({"regex": "(?=a)b"}, "^regex: .*look-around"),
    "type": ({"json_schema": {"type": "nothing"}}, "^json_schema: Invalid type: nothing"),
    "no text": (
        {"json_schema": {"type": "string", "minLength": 9, "maxLength": 2}},
        "^json_schema: Unsatisfiable",
    ),
    "unknown rule": ({"grammar": "start: other"}, '^grammar: .*unknown name: "other"'),
    "too much to compile": (
        {"grammar": "start: A\nA: /.*a.{300}/ & /.*b.{299}/ & /.*c.{301}/"},
        "^grammar: fuel exhausted",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_form_that_is_none_is_refused_at_once(bundled: Engine, bad: str) -> None:
    given, named = BAD[bad]
    with pytest.raises(ValueError, match=named) as refused:
        bundled.add(ASKED[0], structured=StructuredOutput(**given))
    assert len(str(refused.value)) <= 500
    assert bundled.is_idle


def test_grammars_are_compiled_once(bundled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(bundled.tokenizer, bundled.target.config.eos_ids)
    made = []
    inner = Grammars._made
    monkeypatch.setattr(
        Grammars, "_made", lambda self, form: made.append(form) or inner(self, form)
    )
    for _ in range(2):
        for form, _ in FORMS.values():
            grammars.mask(form, [1])
    assert len(made) == len(FORMS)


def test_without_llguidance_one_clear_error(
    bundled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    engine = Engine(bundled.target, EmptyDrafter(), bundled.tokenizer)
    with pytest.raises(ValueError, match=r"pip install 'specrt\[structured\]'"):
        engine.generate(ASKED[0], structured=StructuredOutput(regex="a"))


@pytest.mark.parametrize("make", [byte_level, llama])
@pytest.mark.parametrize("vocab_size", [200, 300])
def test_masks_of_other_tokenizers_and_padded_vocabularies(
    make: Callable[[], Tokenizer], vocab_size: int
) -> None:
    """A model may have fewer rows than its tokenizer has tokens, or more."""
    tokenizer = make()
    mask = Grammars(tokenizer, [2]).mask(
        StructuredOutput(regex="[a-c]+:"), [2, 290][: 1 + (vocab_size > 290)]
    )

    def allowed(output: list[int]) -> list[int]:
        row = np.zeros(vocab_size, dtype=np.float32)
        mask.forbid(output, row)
        return [int(i) for i in np.flatnonzero(np.isfinite(row))]

    begin = allowed([])
    texts = {tokenizer.decode([token]) for token in begin}
    assert {"a", "b", "c"} <= texts | {"b"} and ":" not in texts
    (colon,) = [t for t in allowed(begin[:1]) if tokenizer.decode([t]) == ":"][:1]
    ended = allowed([begin[0], colon])
    assert ended == [2] + [290] * (vocab_size > 290)
    assert allowed([]) == begin, "asked for another path, it begins again"
    assert colon in allowed(begin[:1])
