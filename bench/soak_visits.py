"""How a soak's clients behave: some well, some not; each says what was wrong with the server."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.http_client import DONE, Address, Reply, ask, post, request_bytes, send
from bench.soak_work import CHAT, COMPLETIONS, LONG, Work

WHOLE, STREAM, LEAVE, RESET, SLOW, BAD, HALF, KILLED = (
    "whole", "stream", "leave", "reset", "slow", "malformed", "half", "killed",
)  # fmt: skip
SHARES = {
    WHOLE: 34, STREAM: 26, LEAVE: 13, RESET: 8, SLOW: 3, BAD: 10, HALF: 5, KILLED: 1,
}  # fmt: skip
_PATIENCE = 300.0


@dataclass(frozen=True)
class Visit:
    """One client's doings."""

    kind: str
    number: int
    """Which of all works it asks for; of bad ones which request."""
    key: str
    leave_after: int
    """Events that are read of a stream before it is left."""
    pause: float
    """Seconds."""


def make_visits(count: int, works: Sequence[Work], keys: Sequence[str], seed: int) -> list[Visit]:
    """A fixed function of the arguments."""
    rng = random.Random(seed + 1)
    longs = [i for i, work in enumerate(works) if work.kind == LONG]
    shorts = [i for i, work in enumerate(works) if work.kind != LONG]
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    for place, kind in enumerate(list(SHARES)[:count]):  # each comes up
        kinds[place] = kind
    rng.shuffle(kinds)
    return [
        Visit(
            kind,
            rng.choice(longs if kind in (SLOW, LEAVE, RESET) else shorts),
            rng.choice(keys),
            rng.randrange(12),
            rng.random() * 0.05,
        )
        for kind in kinds
    ]


class Client:
    """Makes visits to one server.

    Args:
        address: the server's.
        works: what is asked for.
        model: its name there.
    """

    def __init__(self, address: Address, works: Sequence[Work], model: str) -> None:
        self._address = address
        self._works = works
        self._model = model
        self.num_compared = 0
        """Texts that were compared with plain decoding's, parts of them included."""
        self.num_differing = 0
        self._doings: dict[str, Callable[[Visit], Coroutine[None, None, str | None]]] = {
            WHOLE: self._whole, STREAM: self._stream, LEAVE: self._stream, RESET: self._stream,
            SLOW: self._stream, BAD: self._bad, HALF: self._half, KILLED: self._killed,
        }  # fmt: skip

    async def visit(self, visit: Visit) -> str | None:
        """Make one; what was wrong, or None."""
        try:
            return await asyncio.wait_for(self._doings[visit.kind](visit), _PATIENCE)
        except asyncio.TimeoutError:
            return f"{visit.kind}: no end in {_PATIENCE:g} s"
        except (ConnectionError, ValueError, KeyError) as error:
            return f"{visit.kind}: {type(error).__name__}: {error}"

    def _request(self, visit: Visit, *, is_stream: bool) -> bytes:
        work = self._works[visit.number]
        body = {**work.body, "model": self._model, "stream": is_stream}
        return post(work.path, body, key=visit.key)

    async def _whole(self, visit: Visit) -> str | None:
        work = self._works[visit.number]
        status, body = await ask(self._address, self._request(visit, is_stream=False))
        if status != 200:
            return f"whole: {status}: {body[:300]!r}"
        texts = [""] * work.params.n
        for choice in json.loads(body)["choices"]:
            texts[choice["index"]] = _text_of(work, choice)
        return self._compare(work, texts, is_whole=True)

    async def _stream(self, visit: Visit) -> str | None:
        work, is_slow = self._works[visit.number], visit.kind == SLOW
        buffer = 4096 if is_slow else None
        request = self._request(visit, is_stream=True)
        reply = await send(self._address, request, receive_buffer=buffer)
        try:
            return await self._read(visit, reply, work, is_slow)
        finally:
            if visit.kind == RESET:
                reply.reset()
            else:
                reply.close()

    async def _read(self, visit: Visit, reply: Reply, work: Work, is_slow: bool) -> str | None:
        await reply.read_head()
        if reply.status != 200:
            return f"{visit.kind}: {reply.status}: {(await reply.body())[:300]!r}"
        texts, count, is_done = [""] * work.params.n, 0, False
        async for data in reply.events():
            if data == DONE:
                is_done = True
                continue
            event = json.loads(data)
            if "error" in event:
                return f"{visit.kind}: {data[:300]!r}"
            for choice in event["choices"]:
                texts[choice["index"]] += _text_of(work, choice)
            count += 1
            if is_slow:
                await asyncio.sleep(visit.pause)
            elif visit.kind in (LEAVE, RESET) and count > visit.leave_after:
                break
        has_left = visit.kind in (LEAVE, RESET) and not is_done
        if not has_left and not is_done:
            return f"{visit.kind}: a stream without its end"
        return self._compare(work, texts, is_whole=not has_left)

    def _compare(self, work: Work, texts: Sequence[str], *, is_whole: bool) -> str | None:
        self.num_compared += len(texts)
        for index, (text, expected) in enumerate(zip(texts, work.texts, strict=True)):
            if text != (expected if is_whole else expected[: len(text)]):
                self.num_differing += 1
                return f"differs: {work.body}, choice {index}: {text!r}, plainly {expected!r}"
        return None

    async def _bad(self, visit: Visit) -> str | None:
        requests = bad_requests(self._model, visit.key)
        name, request = requests[visit.number % len(requests)]
        status, body = await ask(self._address, request)
        if not 400 <= status < 500:
            return f"malformed, {name}: {status}: {body[:300]!r}"
        if not json.loads(body)["error"]["message"]:
            return f"malformed, {name}: no message"
        return None

    async def _half(self, visit: Visit) -> str | None:
        """A request that ends in its middle, by a FIN or a RST."""
        request = self._request(visit, is_stream=False)
        end = 20 + (visit.leave_after * len(request)) // 16
        reply = await send(self._address, request[:end])
        await asyncio.sleep(visit.pause)
        if visit.leave_after % 2:
            reply.reset()
        else:
            reply.close()
        return None

    async def _killed(self, visit: Visit) -> str | None:
        """A process that reads four streams, until SIGKILL comes."""
        request = self._request(visit, is_stream=True).hex()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.http_client", self._address.host, str(self._address.port),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        process.stdin.write("\n".join([request] * 4).encode())
        process.stdin.close()
        line = await process.stdout.readline()
        await asyncio.sleep(visit.pause)
        process.kill()
        await process.communicate()
        return None if line == b"200\n" else f"killed: answered {line!r}"


def _text_of(work: Work, choice: Mapping[str, Any]) -> str:
    """Of a choice, or of an event's part of one."""
    if work.path == COMPLETIONS:
        return str(choice["text"])
    told = choice["delta"] if "delta" in choice else choice["message"]
    return told.get("content") or ""


def bad_requests(model: str, key: str) -> list[tuple[str, bytes]]:
    """Requests that are to be refused, by name."""

    def sent(body: bytes, path: str = COMPLETIONS, **headers: str) -> bytes:
        return request_bytes("POST", path, body, headers, key=key)

    def asked(path: str = COMPLETIONS, **fields: object) -> bytes:
        body = {"model": model, "prompt": "Question:", **fields}
        return sent(json.dumps(body).encode(), path)

    return [
        ("no JSON", sent(b'{"prompt": ')),
        ("no UTF-8", sent(b'{"prompt": "\xff\xfe"}')),
        ("nothing", sent(b"")),
        ("a list", sent(b"[]")),
        ("deep", sent(b"[" * 50_000)),
        ("another type", asked(prompt={"a": 1})),
        ("out of range", asked(temperature=-1)),
        ("no model", asked(model="no-such-model")),
        ("too long", asked(prompt="apples and " * 20_000)),
        ("no token", asked(prompt=[10**9])),
        ("no expression", asked(structured_outputs={"regex": "(["})),
        ("no schema", asked(structured_outputs={"json": {"type": "stone"}})),
        ("a wrong key", request_bytes("POST", COMPLETIONS, b"{}", key="wrong")),
        ("no route", asked(path="/v1/no/such")),
        ("another method", request_bytes("PUT", COMPLETIONS, b"{}", key=key)),
        ("no messages", asked(path=CHAT, prompt="a")),
    ]
