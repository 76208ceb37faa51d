"""``/v1/chat/completions`` by the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

ASKED: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he?"}
]


def test_an_answer(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=12, temperature=0
    )
    assert answer.object == "chat.completion" and answer.id and answer.created > 0
    (choice,) = answer.choices
    assert choice.index == 0 and choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    assert not choice.message.tool_calls
    usage = answer.usage
    assert usage is not None and 0 < usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_max_completion_tokens(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_completion_tokens=3, temperature=0
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_content_in_parts(client: openai.OpenAI, model: str) -> None:
    text = str(ASKED[0]["content"])
    parts: list[ChatCompletionMessageParam] = [
        {
            "role": "user",
            "content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}],
        }
    ]
    answers = [
        client.chat.completions.create(model=model, messages=one, max_tokens=8, temperature=0)
        for one in (ASKED, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage or answers[1].usage is not None


def test_turns(client: openai.OpenAI, model: str) -> None:
    turns: list[ChatCompletionMessageParam] = [
        *ASKED,
        {"role": "assistant", "content": "He has 7 apples."},
        {"role": "user", "content": "And if he eats 2?"},
    ]
    short = client.chat.completions.create(model=model, messages=ASKED, max_tokens=1)
    answer = client.chat.completions.create(model=model, messages=turns, max_tokens=8)
    assert answer.usage is not None and short.usage is not None
    assert answer.usage.prompt_tokens > short.usage.prompt_tokens


def test_n_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=16, n=3, temperature=1.0, seed=11
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content
    assert answer.usage is not None and len(told.content) == answer.usage.completion_tokens
    for token in told.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.token == token.top_logprobs[0].token  # greedy
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    spelt = b"".join(bytes(token.bytes or ()) for token in told.content)
    assert spelt.decode() == answer.choices[0].message.content


def test_logprobs_without_the_likeliest(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=2, temperature=0, logprobs=True
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content
    assert all(not token.top_logprobs for token in told.content)


def test_stop(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=24, temperature=0
    )
    text = whole.choices[0].message.content or ""
    stop = text[5:8]
    cut = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=24, temperature=0, stop=[stop]
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_seed_and_system_fingerprint(client: openai.OpenAI, model: str) -> None:
    answers = [
        client.chat.completions.create(
            model=model, messages=ASKED, max_tokens=24, temperature=1.0, seed=seed
        )
        for seed in (7, 7, 8)
    ]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    assert answers[0].system_fingerprint == answers[1].system_fingerprint


def test_async_client(make_async_client: Callable[[], openai.AsyncOpenAI], model: str) -> None:
    """Eight at once, and each as alone."""

    async def ask_all() -> list[str | None]:
        async with make_async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=model, messages=ASKED, max_tokens=16, temperature=1.0, seed=seed
                    )
                    for seed in [1, 2, 3, 4] * 2
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(ask_all())
    assert texts[:4] == texts[4:] and len(set(texts)) > 1


def test_a_streaming_response(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=model, messages=ASKED, max_tokens=4, temperature=0
    ) as response:
        assert response.headers["content-type"].startswith("application/json")
        assert response.parse().choices[0].message.content


@pytest.mark.extension
def test_accepted_and_rejected_predictions(client: openai.OpenAI, model: str) -> None:
    """OpenAI's counters of predicted tokens, filled from speculation."""
    answer = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=24, temperature=0
    )
    assert answer.usage is not None
    told = answer.usage.completion_tokens_details
    assert told is not None
    assert told.accepted_prediction_tokens is not None and told.accepted_prediction_tokens >= 0
    assert told.rejected_prediction_tokens is not None and told.rejected_prediction_tokens >= 0
    assert told.accepted_prediction_tokens < answer.usage.completion_tokens


@pytest.mark.extension
def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI, model: str) -> None:
    asked: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "Ann reads nine pages a day. " * 16}
    ]
    found = []
    for _ in range(2):
        answer = client.chat.completions.create(model=model, messages=asked, max_tokens=2)
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        assert details is not None and details.cached_tokens is not None
        found.append(details.cached_tokens)
    assert found[1] > found[0]
    assert found[1] >= answer.usage.prompt_tokens // 2
