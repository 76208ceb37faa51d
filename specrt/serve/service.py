"""What all routes share: an engine, its name, limits, figures, whether it takes requests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from specrt.draft.base import DraftParams
from specrt.engine.async_engine import AsyncEngine
from specrt.sampling import SamplingParams
from specrt.serve.answering import Answering
from specrt.serve.errors import ApiError, queue_full, refused
from specrt.serve.fields import SamplingFields
from specrt.serve.options import ServeOptions
from specrt.serve.token_texts import TokenTexts
from specrt.types import QueueFullError

if TYPE_CHECKING:
    from specrt.serve.metrics import Metrics

_LETTERS = 16  # of a token, more than any text's have on average


@dataclass(eq=False)
class Service:
    """One model that is served."""

    engine: AsyncEngine
    options: ServeOptions
    name: str
    """What clients call the model."""
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    """Whether nothing new is taken."""
    open: set[Answering] = field(default_factory=set)
    """Requests that are being answered."""
    num_starting: int = 0
    """Those that are being encoded, or whose grammar is compiled."""

    def __post_init__(self) -> None:
        inner = self.engine.engine
        self.tokenizer = inner.tokenizer
        self.config = inner.target.config
        self.texts = TokenTexts(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Refuse another model than the one that is served.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.name:
            message = f"model: expected {self.name!r}, got {name[:200]!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def max_tokens(self, asked: int | None, num_prompt: int, default: int | None) -> int:
        """How many tokens an answer may have.

        Args:
            asked: by the request.
            num_prompt: tokens of its prompt, the longest one.
            default: where nothing is asked; None: what the context has room for.

        Raises:
            ApiError: 400: more than this server gives.
        """
        most = self.options.max_output_tokens
        if asked is not None:
            if most is not None and asked > most:
                message = f"max_tokens: expected at most {most} on this server, got {asked}"
                raise ApiError(400, message, "max_tokens")
            return min(asked, self.config.max_positions)
        room = max(1, self.config.max_positions - num_prompt)
        wanted = room if default is None else min(default, room)
        return wanted if most is None else min(wanted, most)

    async def check_texts(self, texts: Sequence[str], name: str) -> None:
        """Refuse texts far beyond the context before all of them is encoded, which takes seconds.

        Raises:
            ApiError: 400.
        """
        context = self.config.max_positions
        for text in texts:
            if len(text) > _LETTERS * context:
                beginning = text[: _LETTERS * context]
                ids = await asyncio.to_thread(self.tokenizer.encode, beginning)
                self.check_prompt(ids, name)

    def check_prompt(self, ids: Sequence[int], name: str) -> None:
        """Refuse a prompt that is longer than this server takes.

        Raises:
            ApiError: 400.
        """
        most, context = self.options.max_prompt_tokens, self.config.max_positions
        if len(ids) >= context:
            message = f"{name}: {len(ids)} tokens leave no room in the context of {context}"
        elif most is not None and len(ids) > most:
            message = f"{name}: expected at most {most} tokens on this server, got {len(ids)}"
        else:
            return
        raise ApiError(400, message, name, "context_length_exceeded")

    def cache_salt(self, request: Request, fields: SamplingFields | None = None) -> str:
        """What keeps prompts of different keys apart in the prefix cache.

        A request may add a salt of its own.
        """
        salt = request.scope.get("specrt.salt", "")
        own = None if fields is None else fields.cache_salt
        return salt if own is None else hashlib.sha256(f"{salt}:{own}".encode()).hexdigest()

    async def answer(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        draft: DraftParams | None,
    ) -> Answering:
        """Have prompts answered; they wait for their turn when this returns.

        Raises:
            ApiError: the engine refuses them (400), or has no room (503).
        """
        if self.is_draining:
            raise unavailable()
        count, most = len(prompts) * params.n, self.options.max_choices
        if count > most:
            message = f"n: expected at most {most} answers on this server, got {count}"
            raise ApiError(400, message, "n")
        self.num_starting += 1
        try:
            stream = self.engine.stream(prompts, params, draft)
            answering = Answering(self, stream, request)
            await stream.start()
        except QueueFullError as error:
            raise queue_full(error) from error
        except (ValueError, TypeError) as error:
            raise refused(error) from error
        except ImportError as error:
            raise ApiError(400, str(error), "structured_outputs") from error
        except RuntimeError as error:  # its thread or its GPU is gone
            raise ApiError(503, str(error)) from error
        finally:
            self.num_starting -= 1
        return answering

    def end_open(self) -> None:
        """End what is being answered: the server does not wait any longer."""
        for answering in list(self.open):
            answering.end("drained")


def unavailable() -> ApiError:
    """The answer of a server that is about to end."""
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})


def new_id(prefix: str, request: Request) -> str:
    """An answer's id, by its request's."""
    known: Any = request.scope.get("specrt.request_id", "")
    return f"{prefix}-{known}"
