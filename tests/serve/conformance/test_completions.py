"""``/v1/completions`` by the official client."""

from __future__ import annotations

import openai
import pytest

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples has he?\nAnswer:"


def test_an_answer(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.object == "text_completion" and answer.id and answer.created > 0
    assert answer.model == model
    (choice,) = answer.choices
    assert choice.index == 0 and choice.text and choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage is not None and 0 < usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_default_length_is_sixteen(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, temperature=0, n=1)
    assert answer.usage is not None and answer.usage.completion_tokens <= 16


def test_finish_reason_of_a_limit(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def test_greedy_repeats(client: openai.OpenAI, model: str) -> None:
    texts = {
        client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
        .choices[0]
        .text
        for _ in range(2)
    }
    assert len(texts) == 1


def test_many_prompts_come_in_order(client: openai.OpenAI, model: str) -> None:
    prompts = [PROMPT, "Question: What is 2 + 2?\nAnswer:"]
    both = client.completions.create(model=model, prompt=prompts, max_tokens=8, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    for prompt, choice in zip(prompts, both.choices, strict=True):
        alone = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
        assert alone.choices[0].text == choice.text


def test_prompts_of_token_ids(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=[10, 11, 12, 13], max_tokens=4, temperature=0
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == 4
    two = client.completions.create(
        model=model, prompt=[[10, 11, 12, 13], [20, 21]], max_tokens=4, temperature=0
    )
    assert len(two.choices) == 2 and two.choices[0].text == answer.choices[0].text
    assert two.usage is not None and two.usage.prompt_tokens == 6


def test_n_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=16, n=3, temperature=1.0, seed=5
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert answer.usage is not None and answer.usage.completion_tokens > 16


def test_n_choices_of_two_prompts(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=[PROMPT, "Question: 1?"], max_tokens=2, n=2, temperature=1.0, seed=5
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]


def test_stop_strings(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    text = whole.choices[0].text
    stop = text[4:7]
    cut = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=24, temperature=0, stop=stop
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == text[: text.index(stop)]
    first = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=24, temperature=0, stop=["\x01never", stop]
    )
    assert first.choices[0].text == cut.choices[0].text


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs)
    for logprob, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        assert logprob <= 0 and len(top) >= 3
        assert logprob == pytest.approx(max(top.values()))  # greedy: the likeliest
    assert "".join(told.tokens) == answer.choices[0].text
    assert told.text_offset == sorted(told.text_offset or [])


def test_logprobs_are_of_the_law_before_penalties(client: openai.OpenAI, model: str) -> None:
    """A bias changes what is chosen, not what the model thinks of it."""
    plain = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=2
    )
    hot = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=1, temperature=2.0, seed=1, logprobs=2
    )
    first, second = plain.choices[0].logprobs, hot.choices[0].logprobs
    assert first is not None and second is not None
    assert first.top_logprobs is not None and second.top_logprobs is not None
    least = min(first.top_logprobs[0].values())
    assert least in [pytest.approx(value) for value in second.top_logprobs[0].values()]


def test_echo(client: openai.OpenAI, model: str) -> None:
    plain = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0)
    echoed = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4, temperature=0, echo=True
    )
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and answer.usage
    assert len(told.tokens) == answer.usage.total_tokens
    assert told.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in told.token_logprobs[1:])


def test_logit_bias_bans_and_forces(client: openai.OpenAI, model: str) -> None:
    forced = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={"1000": 100}
    )
    other = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={"1001": 100}
    )
    banned = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=4,
        temperature=0,
        logit_bias={"1000": 100, "1001": -100},
    )
    assert forced.choices[0].text != other.choices[0].text
    assert banned.choices[0].text == forced.choices[0].text


def test_penalties_change_the_text(client: openai.OpenAI, model: str) -> None:
    """Of a text that says one token again and again."""
    texts = [
        client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=6,
            temperature=0,
            logit_bias={"1000": 50, "1001": 49.9},  # type: ignore[dict-item]
            **penalty,
        )
        .choices[0]
        .text
        for penalty in ({}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0})
    ]
    assert texts[0] != texts[1] and texts[0] != texts[2]


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_p": 0.5}, {"temperature": 1.3}])
def test_a_seed_repeats(client: openai.OpenAI, model: str, options: dict[str, float]) -> None:
    texts = [
        client.completions.create(model=model, prompt=PROMPT, max_tokens=24, seed=seed, **options)
        .choices[0]
        .text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_raw_response(client: openai.OpenAI, model: str) -> None:
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, max_tokens=2, temperature=0
    )
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse().choices[0].text


@pytest.mark.extension
def test_fields_that_engines_share(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=8,
        temperature=1.0,
        seed=3,
        extra_body={
            "top_k": 1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "stop_token_ids": [],
            "include_stop_str_in_output": False,
        },
    )
    greedy = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == greedy.choices[0].text
    assert answer.usage is not None and answer.usage.completion_tokens == 8
