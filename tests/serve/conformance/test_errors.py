"""Refusals, as the official client raises them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.serve.conformance.conftest import Endpoint

ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 2 + 2?"}]


def check_object(error: openai.APIStatusError) -> dict[str, Any]:
    """The error object: four fields of their types."""
    body = error.body
    assert isinstance(body, dict)  # the client takes "error" out
    assert isinstance(body["message"], str) and body["message"]
    assert isinstance(body["type"], str)
    assert body["param"] is None or isinstance(body["param"], str)
    assert body["code"] is None or isinstance(body["code"], (str, int))
    return body


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="no-such-model", messages=ASKED)
    body = check_object(raised.value)
    assert "no-such-model" in body["message"]


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 1.5}),
        ("max_tokens", {"max_tokens": -5}),
        ("n", {"n": 0}),
        ("presence_penalty", {"presence_penalty": 9}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 10_000}),
    ],
)
def test_out_of_range(
    client: openai.OpenAI, model: str, param: str, options: dict[str, Any]
) -> None:
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as raised:
        client.chat.completions.create(model=model, messages=ASKED, **options)
    assert param in check_object(raised.value)["message"]


def test_the_parameter_is_named(client: openai.OpenAI, model: str, server: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=model, messages=ASKED, temperature=-1)
    if server.has_extensions:
        assert raised.value.param == "temperature"
        assert raised.value.type == "invalid_request_error"


def test_too_long_for_the_context(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=model, prompt="apples and " * 5_000, max_tokens=4)
    check_object(raised.value)


def test_no_messages(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=[])


def test_a_wrong_key(server: Endpoint) -> None:
    if server.api_key == "none":
        pytest.skip("this server asks for no key")
    with (
        openai.OpenAI(base_url=server.base_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        stranger.models.list()
    check_object(raised.value)
    assert server.api_key not in str(raised.value.body)


def test_an_unknown_route(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.get("/no/such/route", cast_to=object)


def test_a_client_that_does_not_wait(client: openai.OpenAI, model: str) -> None:
    """It raises its timeout, and the server goes on."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).completions.create(
            model=model, prompt="Question:", max_tokens=1000, seed=1
        )
    assert client.completions.create(model=model, prompt="Question:", max_tokens=1).choices


def test_async_errors(make_async_client: Callable[[], openai.AsyncOpenAI], model: str) -> None:
    import asyncio

    async def ask() -> None:
        async with make_async_client() as client:
            await client.chat.completions.create(model="no-such-model", messages=ASKED)

    with pytest.raises(openai.NotFoundError):
        asyncio.run(ask())
