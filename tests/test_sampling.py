"""SamplingParams refuses what cannot be meant, naming the field."""

from __future__ import annotations

import math

import pytest

from specrt.sampling import SamplingParams, SamplingTable


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-9),
        ("top_k", -2),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", [1]),
        ("seed", 2**64),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", ["a", 1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "a"),
        ("ignore_eos", 1),
        ("logprobs", None),
    ],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}.*expected .*got"):
        SamplingParams(**{field: value})


def test_defaults_and_derived_fields() -> None:
    params = SamplingParams()
    assert params.is_greedy and not params.edits_logits and params.stop_strings == ()
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"], top_k=None).stop_strings == ("a", "b")
    drawn = params.with_seed()
    assert drawn.seed is not None and drawn.with_seed(5) is drawn
    assert params.with_seed(5).seed == 5


def test_table_refuses_what_the_kernel_could_not_read() -> None:
    with pytest.raises(ValueError, match="logit_bias .row 1.: expected token ids < 8"):
        SamplingTable.build([SamplingParams(), SamplingParams(logit_bias={8: 1.0})], [1, 1], 8)
    with pytest.raises(ValueError, match="prompt_lens"):
        SamplingTable.build([SamplingParams()], [], 8)
    with pytest.raises(ValueError, match="seed"):
        SamplingTable.build([SamplingParams(temperature=1.0)], [1], 8)
    assert SamplingTable.build([SamplingParams()], [1], 8).workspace is None
