"""Streams, as the official client reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

PROMPT = "Question: Ann has 5 coins and finds 6. How many has she?\nAnswer:"
ASKED: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Ann has 5 coins and finds 6. How many has she?"}
]


def test_a_completion(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    chunks = list(
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert len(chunks) > 1 and len({chunk.id for chunk in chunks}) == 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])


def test_a_chat(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=24, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=model, messages=ASKED, max_tokens=24, temperature=0, stream=True
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert not any(delta.role for delta in deltas[1:])
    text = "".join(delta.content or "" for delta in deltas)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_without_choices(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=ASKED, max_tokens=9, temperature=0)
    *chunks, last = client.chat.completions.create(
        model=model,
        messages=ASKED,
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks)


def test_n_choices_are_told_apart(client: openai.OpenAI, model: str) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 4, "n": 3}
    whole = client.chat.completions.create(model=model, messages=ASKED, **options)
    texts = {0: "", 1: "", 2: ""}
    reasons = dict[int, str]()
    for chunk in client.chat.completions.create(
        model=model, messages=ASKED, stream=True, **options
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert sorted(reasons) == [0, 1, 2]
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content


def test_logprobs_of_all_tokens(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=12, temperature=0, logprobs=True, top_logprobs=1
    )
    tokens = []
    for chunk in client.chat.completions.create(
        model=model,
        messages=ASKED,
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=1,
        stream=True,
    ):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                tokens += choice.logprobs.content or []
    assert whole.choices[0].logprobs is not None
    expected = whole.choices[0].logprobs.content or []
    assert [token.token for token in tokens] == [token.token for token in expected]
    assert [token.logprob for token in tokens] == [token.logprob for token in expected]


def test_a_stop_string_is_never_shown(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=32, temperature=0)
    text = whole.choices[0].text
    stop = text[6:12]
    chunks = list(
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=32, temperature=0, stop=stop, stream=True
        )
    )
    told = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert told == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_leaving_early(client: openai.OpenAI, model: str) -> None:
    stream = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=500, temperature=1.0, seed=1, stream=True
    )
    with closing(stream):
        for _ in zip(range(3), stream, strict=False):
            pass
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=2)
    assert answer.choices[0].text


def test_the_stream_helper(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=12, temperature=0
    )
    stop = (whole.choices[0].message.content or "")[6:9]  # the helper raises at a limit
    with client.chat.completions.stream(
        model=model, messages=ASKED, max_tokens=12, temperature=0, stop=stop
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content


def test_async_streams(make_async_client: Callable[[], openai.AsyncOpenAI], model: str) -> None:
    async def read(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=model, prompt=PROMPT, max_tokens=20, temperature=1.0, seed=seed, stream=True
        )
        return "".join([c.choices[0].text async for c in stream if c.choices])

    async def all_of_them() -> list[str]:
        async with make_async_client() as client:
            return await asyncio.gather(*(read(client, seed) for seed in [1, 2, 3, 4] * 2))

    texts = asyncio.run(all_of_them())
    assert texts[:4] == texts[4:]


@pytest.mark.extension
def test_accepted_runs_share_an_event(client: openai.OpenAI, model: str) -> None:
    """Fewer events than tokens: what a round accepts is told at once."""
    *chunks, last = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "speculative": {"enabled": True}},
    )
    assert last.usage is not None and last.usage.completion_tokens == 32
    assert len(chunks) < 32
