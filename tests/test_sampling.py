"""SamplingParams refuses what cannot be meant, naming the field."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specrt.sampling import (
    SamplingParams,
    SamplingTable,
    StructuredOutput,
    one_each,
    sampling_row,
)


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
        ("logit_bias", {"five": 1.0}),
        ("logit_bias", {"-5": 1.0}),
        ("logit_bias", {"5": 1.0, 5: 2.0}),
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
        ("top_logprobs", -1),
        ("top_logprobs", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 1.0),
        ("skip_special_tokens", None),
        ("report_trees", 1),
        ("n", 0),
        ("n", 1025),
        ("n", True),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("bad_words", "word"),
        ("bad_words", ["word", " "]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("logits_processor", 1),
        ("structured", "{}"),
        ("structured", {"json": "{}"}),
        ("structured", {}),
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


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("max_tokens", "expected max_new_tokens"),
        ("max_length", "expected max_new_tokens, which does not count the prompt"),
        ("do_sample", "expected temperature: 0 is greedy"),
        ("num_return_sequences", "expected n$"),
        ("best_of", "expected n, which leaves"),
        ("use_beam_search", "there is no beam search"),
        ("detokenize", "text is decoded as the tokenizer does it"),
        ("guided_json", r"expected structured=StructuredOutput\(json_schema"),
        ("min_tokens", "expected min_new_tokens$"),
        ("eos_token_id", "expected stop_token_ids"),
        ("temprature", "expected temperature$"),
        ("Top-P", "expected top_p$"),
        ("xyz", "expected max_new_tokens, min_new_tokens, temperature, .*logprobs"),
    ],
)
def test_what_others_call_it_is_hinted(field: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"^{field}: no sampling option; {hint}"):
        SamplingParams(**{field: 1})
    with pytest.raises(TypeError, match=f"^{field}: no sampling option; {hint}"):
        one_each(SamplingParams(), 1, {field: 1})


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_is_off(off: int | None) -> None:
    assert SamplingParams(top_k=off) == SamplingParams()


def test_values_as_json_and_other_libraries_have_them() -> None:
    plain = SamplingParams(temperature=0.5, seed=7, logit_bias={5: -100.0, 50256: 1.0})
    biases = {"5": np.float64(-100), np.int64(50256): 1.0}
    given = SamplingParams(temperature=np.float32(0.5), seed=torch.tensor(7), logit_bias=biases)  # type: ignore[arg-type]
    assert given == plain
    assert {type(token) for token in given.logit_bias or ()} == {int}
    assert (type(given.temperature), type(given.seed)) == (float, int)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, "exactly one of json_schema, regex, choice, grammar, got none"),
        ({"regex": "a", "choice": ["a"]}, "got regex, choice"),
        ({"regex": ""}, "^regex: expected a non-empty text"),
        ({"grammar": 5}, "^grammar: expected"),
        ({"choice": []}, "^choice: expected"),
        ({"choice": "ab"}, "^choice: expected"),
        ({"choice": ["a", ""]}, "^choice: expected"),
        ({"json_schema": "{"}, "^json_schema: expected JSON"),
        ({"json_schema": "[]"}, "^json_schema: expected a schema"),
        ({"json_schema": {"const": math.nan}}, "^json_schema: expected what JSON can say"),
        ({"json_schema": {"const": b""}}, "^json_schema: expected what JSON can say"),
        ({"json_schema": 5}, "^json_schema: expected a mapping or JSON"),
        ({"regex": "a" * 70_000}, "^regex: expected at most 65536 characters, got 70000"),
        ({"choice": ["a" * 999] * 70}, "^choice: expected at most 65536 characters"),
    ],
)
def test_a_form_of_output_is_one_and_whole(given: dict[str, object], refused: str) -> None:
    with pytest.raises(ValueError, match=refused):
        StructuredOutput(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=refused):
        SamplingParams(structured=given)  # type: ignore[arg-type]


def test_a_form_of_output_may_come_as_json_has_it() -> None:
    form = StructuredOutput(choice=["a", "b"])
    assert SamplingParams(structured={"choice": ["a", "b"]}) == SamplingParams(structured=form)  # type: ignore[arg-type]
    assert (form.kind, form.source) == ("choice", '["a", "b"]')
    assert StructuredOutput(json_schema={"type": "object"}).source == '{"type": "object"}'


def test_one_each_puts_options_in_place_of_fields() -> None:
    cold, warm = SamplingParams(seed=1), SamplingParams(temperature=1.0, seed=2)
    assert one_each(None, 2) == [SamplingParams()] * 2
    assert one_each([cold, warm], 2) == [cold, warm]
    changed = one_each([cold, warm], 2, {"temperature": 0.5})
    assert changed == [SamplingParams(temperature=0.5, seed=seed) for seed in (1, 2)]
    assert one_each(cold, 1, {"max_new_tokens": 3}) == [SamplingParams(max_new_tokens=3, seed=1)]
    for bad, named in (
        ([cold], "sampling: expected one for each of 2 prompts, got 1"),
        ({"seed": 1}, "sampling: expected SamplingParams, .*got {'seed': 1}"),
        ([cold, None], r"sampling\[1\]: expected SamplingParams, got None"),
    ):
        with pytest.raises(ValueError, match=named):
            one_each(bad, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_p: expected"):
        one_each(None, 1, {"top_p": 2.0})


def test_table_refuses_what_the_kernel_could_not_read() -> None:
    with pytest.raises(ValueError, match="logit_bias .row 1.: expected token ids < 8"):
        SamplingTable.build([SamplingParams(), SamplingParams(logit_bias={8: 1.0})], [1, 1], 8)
    with pytest.raises(ValueError, match="prompt_lens"):
        SamplingTable.build([SamplingParams()], [], 8)
    with pytest.raises(ValueError, match="seed"):
        SamplingTable.build([SamplingParams(temperature=1.0)], [1], 8)
    assert SamplingTable.build([SamplingParams()], [1], 8).workspace is None


def test_a_row_is_the_tables_but_for_where_its_biases_are() -> None:
    params = [
        SamplingParams(logit_bias={1: 2.0, 3: 4.0}),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=-2, logit_bias={0: 1}),
    ]
    table = SamplingTable.build(params, [4, 6], 8)
    for row, prompt_len in enumerate((4, 6)):
        alone = sampling_row(params[row], prompt_len)
        assert torch.equal(alone[:6], table.rows[row, :6]) and alone[6:].tolist() == [0, 0]
    assert table.rows[:, 6:].tolist() == [[0, 2], [2, 3]]
    with pytest.raises(ValueError, match="^seed: expected a seed for a sequence that samples"):
        sampling_row(SamplingParams(temperature=1.0), 1)


def test_a_rows_words_are_what_kernels_take_them_for() -> None:
    """csrc/core/sampling_row.h."""
    params = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=2.0,
        presence_penalty=4.0,
        frequency_penalty=8.0,
        seed=-2,
    )
    row = sampling_row(params, 6)
    assert row.view(torch.float64)[0] == 0.25
    assert row.view(torch.float32)[2:7].tolist() == [0.5, 0.125, 2.0, 4.0, 8.0]
    assert row.view(torch.int32)[7:10].tolist() == [5, 6, 0]
    assert row[5:].tolist() == [-2, 0, 0]
