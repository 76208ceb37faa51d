"""A load of so many streams at any time: over HTTP, and the same on an engine that is stepped."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.http_client import DONE, Address, ask, post, request_bytes, send
from bench.served import Served
from specrt import DraftParams, SamplingParams
from specrt.engine.engine import Engine

AUTO, OFF, ON = "auto", "off", "on"
PATH = "/v1/completions"
_REST_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """A request of the load."""

    ids: list[int]
    max_tokens: int
    temperature: float
    seed: int

    def params(self) -> SamplingParams:
        """For an engine."""
        return SamplingParams(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=True,
        )

    def body(self, speculation: str, depth: int) -> dict[str, Any]:
        """For a server."""
        wishes = {OFF: {"enabled": False}, ON: {"enabled": True, "max_tokens": depth}}
        return {
            "prompt": self.ids,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            **({"speculative": wishes[speculation]} if speculation in wishes else {}),
        }


@dataclass
class Load:
    """What was seen in the window of one run."""

    begun: float
    end: float
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    """Seconds between a stream's events, the first token's left out."""
    firsts: list[float] = field(default_factory=list)
    """Seconds from a request to its first token."""
    cpu: float = 0.0
    """Processor seconds of whoever computes."""
    loop_cpu: float = 0.0
    """Those of them that a server's event loop takes."""
    client_cpu: float = 0.0
    """Those of the client."""

    def take(self, now: float, before: float | None, asked: float) -> None:
        """Note an event, if it is in the window."""
        if not self.begun <= now < self.end:
            return
        if before is not None:
            self.gaps.append(now - before)
        elif asked >= self.begun:
            self.firsts.append(now - asked)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.num_tokens / (self.end - self.begun)

    @property
    def cpu_ms(self) -> float:
        """Processor milliseconds a token."""
        return 1e3 * self.cpu / max(1, self.num_tokens)

    def gap(self, share: float) -> float:
        """A quantile of the gaps, in ms."""
        gaps = sorted(self.gaps)
        return 1e3 * gaps[min(len(gaps) - 1, int(share * len(gaps)))] if gaps else float("nan")


def make_jobs(prompts: Sequence[list[int]], lengths: tuple[int, int], seed: int) -> Iterator[Job]:
    """Without end, greedy and sampled ones in turn; a fixed function of the arguments."""
    rng, number = random.Random(seed), 0
    while True:
        yield Job(
            prompts[number % len(prompts)],
            rng.randint(*lengths),
            0.7 * (number % 2),
            rng.randrange(2**31),
        )
        number += 1


def window(warm_up: float, seconds: float) -> Load:
    """One that opens in a while."""
    begun = time.perf_counter() + warm_up
    return Load(begun, begun + seconds)


# --- over HTTP --------------------------------------------------------------------------------


async def first_token(address: Address, body: Mapping[str, Any]) -> float:
    """Seconds from a request to its first event, which is read to its end."""
    asked, first = time.perf_counter(), 0.0
    reply = await send(address, post(PATH, body))
    try:
        await reply.read_head()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {await reply.body()!r}")
        async for _ in reply.events():
            first = first or time.perf_counter() - asked
    finally:
        reply.close()
    return first


async def _stream(address: Address, body: Mapping[str, Any], load: Load) -> None:
    """One stream; nothing of its events is looked at but when they come."""
    asked, before = time.perf_counter(), None
    reply = await send(address, post(PATH, body))
    try:
        await reply.read_head()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {await reply.body()!r}")
        async for data in reply.events():
            if data == DONE:
                break
            now = time.perf_counter()
            load.take(now, before, asked)
            before = now
    finally:
        reply.close()


async def generated(address: Address) -> int:
    """Tokens that the server has sent since it began."""
    _, body = await ask(address, request_bytes("GET", "/metrics"))
    return round(figures(body.decode())["generation_tokens_total"])


def over_http(
    served: Served, jobs: Iterator[Job], streams: int, mode: str, depth: int, load: Load
) -> Load:
    """So many streams at any time, until the window closes."""
    address = served.address

    async def stream() -> None:
        while True:
            await _stream(address, next(jobs).body(mode, depth), load)

    async def run() -> None:
        tasks = [asyncio.create_task(stream()) for _ in range(streams)]
        await asyncio.sleep(load.begun - time.perf_counter())
        before, held, own = await generated(address), served.held(), time.process_time()
        load.begun = time.perf_counter()
        await asyncio.sleep(load.end - load.begun)
        load.num_tokens = await generated(address) - before
        load.end = time.perf_counter()
        after = served.held()
        load.cpu = after.cpu_seconds - held.cpu_seconds
        load.loop_cpu = after.main_seconds - held.main_seconds
        load.client_cpu = time.process_time() - own
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            task.result()  # raises
        await idle(address)

    asyncio.run(run())
    return load


async def idle(address: Address, key: str | None = None) -> dict[str, float]:
    """Wait until the server says that nothing runs and nothing waits; its figures then, whatever
    they are when patience is over."""
    request = request_bytes("GET", "/metrics", key=key)
    end = time.monotonic() + _REST_SECONDS
    while True:
        _, body = await ask(address, request)
        told = figures(body.decode())
        is_idle = not told["num_requests_running"] and not told["num_requests_waiting"]
        if is_idle or time.monotonic() > end:
            return told
        await asyncio.sleep(0.05)


def figures(exposition: str) -> dict[str, float]:
    """Prometheus' text: sums over labels, names without what stands before the colon."""
    found: Counter[str] = Counter()
    for line in exposition.splitlines():
        match = re.match(r"(?:\w+:)?(\w+)(?:\{[^}]*\})? ([-+.\deE]+)$", line)
        if match:
            found[match[1]] += float(match[2])
    return dict(found)


# --- stepped ----------------------------------------------------------------------------------


def stepped(
    engine: Engine, jobs: Iterator[Job], streams: int, speculation: str, depth: int, load: Load
) -> Load:
    """The same on an engine in this thread."""
    draft = {OFF: DraftParams(depth=0), ON: DraftParams(depth=depth)}.get(speculation)
    running: dict[Any, tuple[float, float | None]] = {}
    cpu = None
    while (now := time.perf_counter()) < load.end:
        if cpu is None and now >= load.begun:
            cpu = time.process_time()
        while len(running) < streams:
            job = next(jobs)
            running[engine.add(job.ids, job.params(), draft)] = time.perf_counter(), None
        for chunk in engine.step():
            asked, before = running[chunk.handle]
            now = time.perf_counter()
            load.take(now, before, asked)
            load.num_tokens += len(chunk.token_ids) if now >= load.begun else 0
            running[chunk.handle] = asked, now
            if chunk.result is not None:
                del running[chunk.handle]
    load.end = time.perf_counter()
    load.cpu = time.process_time() - (cpu or 0.0)
    for handle in running:
        engine.abort(handle)
    while not engine.is_idle:
        engine.step()
    return load
