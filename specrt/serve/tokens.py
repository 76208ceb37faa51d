"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from specrt.serve.chat import prompt_ids, refused_messages
from specrt.serve.chat_fields import ChatRequest, Message
from specrt.serve.errors import ApiError, JsonResponse, refused
from specrt.serve.fields import Strict
from specrt.serve.service import Service
from specrt.serve.tools import Tool


class TokenizeRequest(Strict):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(BaseModel):
    """Token ids, and the context they have to fit into."""

    tokens: list[int]
    token_strs: list[str] | None
    count: int
    max_model_len: int


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 20)]


class DetokenizeAnswer(BaseModel):
    """Their text, without special tokens."""

    prompt: str


def token_routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The routes, for one service."""
    routes = APIRouter()

    @routes.post(
        "/tokenize", response_model=TokenizeAnswer, responses=errors, summary="A text's tokens"
    )
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: expected either it or messages", "prompt")
        ids = await _ids(service, body)
        texts = [service.texts.text_of(token) for token in ids]
        return JsonResponse(
            {
                "tokens": ids,
                "token_strs": texts if body.return_token_strs else None,
                "count": len(ids),
                "max_model_len": service.config.max_positions,
            }
        )

    @routes.post(
        "/detokenize", response_model=DetokenizeAnswer, responses=errors, summary="Tokens' text"
    )
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        most = service.config.vocab_size
        for index, token in enumerate(body.tokens):
            if token >= most:
                message = (
                    f"tokens[{index}]: token id {token} is outside the vocabulary 0..{most - 1}"
                )
                raise ApiError(400, message, f"tokens[{index}]")
        text = await asyncio.to_thread(service.tokenizer.decode, body.tokens)
        return JsonResponse({"prompt": text})

    return routes


async def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    try:
        if body.messages is not None:
            chat = ChatRequest(
                messages=body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            return await prompt_ids(service, chat)
        has_bos = body.add_special_tokens is not False
        assert body.prompt is not None, "one of the two is given"
        return await asyncio.to_thread(
            service.tokenizer.encode, body.prompt, add_special_tokens=has_bos
        )
    except ValueError as error:
        raise (refused(error) if body.messages is None else refused_messages(error)) from error
