"""An engine for event loops: one thread steps, any number of tasks read."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from specrt.draft.base import DraftParams
from specrt.engine.engine import Engine
from specrt.engine.prompts import Prompt, split_prompts
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.engine.stepper import Inbox, Stepper, Wanted
from specrt.sampling import SamplingOptions, SamplingParams, one_each

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Letters or ids of prompts that are encoded and checked within a fraction of a millisecond.
_SHORT = 2000


class AsyncEngine:
    """An :class:`Engine` whose answers are awaited.

    One thread steps the engine while anything is open and sleeps where nothing is. Tasks of any
    event loop, in any thread, may ask at the same time; all are answered in one batch. ``async
    with`` (or :meth:`close`) ends the thread; the engine itself stays open and is its owner's.

    Args:
        engine: its ``add``, ``step`` and ``abort`` are used here and by nobody else from now on;
            ``generate`` and ``stream`` may be called besides.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stepper = Stepper(engine)
        # The thread holds the stepper alone, so that an engine nobody holds ends its thread.
        self._stop = weakref.finalize(self, self._stepper.stop)

    async def __aenter__(self) -> AsyncEngine:
        self._stepper.require()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """End the thread behind the round it is in; open streams raise RuntimeError."""
        self._stop()

    async def aclose(self) -> None:
        """As :meth:`close`, without keeping the loop waiting."""
        await asyncio.to_thread(self.close)

    def require(self) -> None:
        """Refuse further requests, if there can be none.

        Raises:
            RuntimeError: this was closed, or the stepping thread ended by an error; names it.
        """
        self._stepper.require()

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """What comes of prompts, round by round: ``async for chunk in engine.stream(...)``.

        Leaving the loop, an exception in it or cancelling its task ends the requests within a
        round. Chunks that were not read are kept; of a reader who is far behind they are merged
        (``num_accepted`` is then of all their rounds, and ``tree`` is None). Arguments are those of
        :meth:`Engine.stream`; ``chunk.index`` and ``chunk.choice`` tell whose a chunk is.

        Raises:
            ValueError, TypeError: at the call: sampling options, ``draft``, what is no prompt. When
                the first chunk is asked for: what encoding finds, a prompt that is too long.
            QueueFullError: there is not room for all of them to wait, when the first chunk is
                asked for; nothing was added.
            RuntimeError: as :meth:`require`, or as :meth:`Engine.add`.
        """
        self._stepper.require()
        batch, _ = split_prompts(prompts)
        params = one_each(sampling, len(batch), options)
        self.engine.check_draft(draft)
        return AsyncStream(self, batch, params, draft, add_special_tokens)

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Whole answers, as :meth:`Engine.generate` gives them: one result, or a flat list of them.

        Raises:
            ValueError, TypeError, QueueFullError, RuntimeError: as :meth:`stream`.
        """
        batch, many = split_prompts(prompts)
        stream = self.stream(
            batch, sampling, draft, add_special_tokens=add_special_tokens, **options
        )
        results = await stream.results()
        return results if many or len(results) != 1 else results[0]


class AsyncStream(AsyncIterator[StreamChunk]):
    """The chunks of some prompts; made by :meth:`AsyncEngine.stream`.

    It belongs to the loop in which it was started. Dropped, it ends its requests.
    """

    def __init__(
        self,
        owner: AsyncEngine,
        prompts: Sequence[Any],
        params: Sequence[SamplingParams],
        draft: DraftParams | None,
        add_special_tokens: bool,
    ) -> None:
        self._num_open = 0  # before anything here may fail
        self._owner = owner  # or its thread would end
        self._prompts, self._draft = prompts, draft
        self._add_special_tokens = add_special_tokens
        self.params = [one.with_seed().choices() for one in params]
        """Of each prompt the parameters of its answers, each with a seed."""
        self.prompt_ids: list[list[int]] = []
        """Token ids of each prompt, once it is started."""
        self._box: Inbox | None = None
        self._is_read = False
        self._num_open = sum(map(len, self.params))

    def __aiter__(self) -> AsyncStream:
        return self

    async def start(self) -> None:
        """Put the requests into the engine's queue, which asking for the first chunk does too.

        Raises:
            ValueError, QueueFullError, RuntimeError: as :meth:`AsyncEngine.stream`.
        """
        if self._box is not None or not self._num_open:
            return
        box = self._box = Inbox(asyncio.get_running_loop())
        try:
            if _is_short(self._prompts) and not self._has_forms():
                self._enqueue(box)
            else:
                await asyncio.to_thread(self._enqueue, box)
        except BaseException:
            self._drop()
            raise

    async def __anext__(self) -> StreamChunk:
        if self._is_read:
            raise RuntimeError("stream: another task waits for its next chunk")
        self._is_read = True
        try:
            await self.start()
            chunk = await self._next()
        except BaseException:
            self._drop()
            raise
        finally:
            self._is_read = False
        if chunk.result is not None:
            self._num_open -= 1
        return chunk

    async def results(self) -> list[GenerationResult]:
        """Read to the end; the results by prompt and choice."""
        found: dict[tuple[int, int], GenerationResult] = {}
        async for chunk in self:
            if chunk.result is not None:
                found[chunk.index, chunk.choice] = chunk.result
        return [found[number] for number in sorted(found)]

    async def aclose(self) -> None:
        """As :meth:`close`."""
        self.close()

    def close(self) -> None:
        """End what is open of it, within a round; a task that reads it comes to its end.

        To be called in its loop. Closing again does nothing.
        """
        self._drop()
        box = self._box
        if box is not None and box.waiter is not None and not box.waiter.done():
            box.waiter.set_result(None)

    def _enqueue(self, box: Inbox) -> None:
        engine, stepper = self._owner.engine, self._owner._stepper
        many = len(self._prompts) > 1
        for index, prompt in enumerate(self._prompts):
            name = f"prompts[{index}]" if many else "prompt"
            self.prompt_ids.append(
                engine.encode(prompt, name=name, add_special_tokens=self._add_special_tokens)
            )
        asked = [
            Wanted(index, choice, ids, params, self._draft)
            for index, (ids, each) in enumerate(zip(self.prompt_ids, self.params, strict=True))
            for choice, params in enumerate(each)
        ]
        if self._has_forms():  # here, for the stepping thread waits for who adds
            for each in self.params:
                engine.check_sampling(each[0])
        stepper.add(asked, box)
        if not self._num_open:  # dropped meanwhile: its task was cancelled
            stepper.abort(box)

    def _has_forms(self) -> bool:
        """Whether something is to be compiled first."""
        return any(each[0].structured is not None for each in self.params)

    async def _next(self) -> StreamChunk:
        box = self._box
        while self._num_open:
            assert box is not None, "a stream that was started has an inbox"
            found = box.take()
            if isinstance(found, StreamChunk):
                return found
            await found
        raise StopAsyncIteration

    def _drop(self) -> None:
        num_open, self._num_open = self._num_open, 0
        if num_open and self._box is not None:
            self._owner._stepper.abort(self._box)

    def __del__(self) -> None:
        self._drop()


def _is_short(prompts: Sequence[Any]) -> bool:
    """Whether encoding them keeps nobody waiting; a chat's template may take its time."""
    sizes = [
        len(one)
        for one in prompts
        if isinstance(one, str) or (isinstance(one, list) and all(type(x) is int for x in one[:1]))
    ]
    return len(sizes) == len(prompts) and sum(sizes) < _SHORT
