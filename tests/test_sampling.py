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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 1e39),
        ("temperature", 3.5e38),
        pytest.param("temperature", 10**400, id="a long temperature"),
        ("presence_penalty", 1e-50),
        ("frequency_penalty", -1e-50),
        ("min_p", 1e-50),
        ("logit_bias", {1: -1e39}),
        pytest.param("logit_bias", {1: -(10**400)}, id="a long bias"),
        ("logit_bias", {1: 1e-50}),
    ],
)
def test_what_float32_cannot_hold_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}.*expected .*float32 holds, got"):
        SamplingParams(**{field: value})


def test_all_that_passes_can_be_packed() -> None:
    extremes = [
        SamplingParams(temperature=3.4e38, seed=0, top_p=1e-30, min_p=1e-45, top_k=2**31 - 1),
        SamplingParams(temperature=1e-5, seed=2**64 - 1, logit_bias={0: 1e30, 7: -3.4e38}),
        SamplingParams(repetition_penalty=1e-5, presence_penalty=-99999, frequency_penalty=1e-45),
        SamplingParams(seed=-(2**63), logit_bias={1: -math.inf, 2: 0, 3: -0.0}),
    ]
    table = SamplingTable.build(extremes, [1] * 4, 8)
    assert table.bias_values is not None and table.bias_ids is not None
    assert table.bias_ids.tolist() == [0, 7, 1, 2, 3]
    assert table.bias_values.isfinite().tolist() == [True, True, False, True, True]


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
