"""``/v1/responses`` by the official client; skipped where a server has none."""

from __future__ import annotations

import openai
import pytest

TEXT = "Tom has 3 apples and buys 4 more. How many apples has he?"


@pytest.fixture(scope="module")
def responses(client: openai.OpenAI, model: str) -> openai.resources.Responses:
    try:
        client.responses.create(model=model, input=TEXT, max_output_tokens=16)
    except openai.NotFoundError:
        pytest.skip("no /v1/responses here")
    return client.responses


def test_an_answer(responses: openai.resources.Responses, model: str) -> None:
    answer = responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0)
    assert answer.object == "response" and answer.id
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text
    assert answer.output[0].type == "message"
    assert answer.usage is not None and 0 < answer.usage.output_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_cut_by_the_limit(responses: openai.resources.Responses, model: str) -> None:
    answer = responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0)
    if answer.status == "incomplete":
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"


def test_messages_say_the_same(
    client: openai.OpenAI, responses: openai.resources.Responses, model: str
) -> None:
    answer = responses.create(
        model=model,
        input=[{"role": "user", "content": TEXT}],
        max_output_tokens=16,
        temperature=0,
    )
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": TEXT}], max_tokens=16, temperature=0
    )
    assert answer.output_text == chat.choices[0].message.content


def test_a_stream(responses: openai.resources.Responses, model: str) -> None:
    whole = responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0)
    events = list(
        responses.create(model=model, input=TEXT, max_output_tokens=16, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    told = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert told == whole.output_text
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


def test_a_refused_one(responses: openai.resources.Responses, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        responses.create(model=model, input=TEXT, temperature=-1)
