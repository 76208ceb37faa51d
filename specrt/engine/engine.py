"""What users hold: an engine that answers prompts, streams, or is stepped request by request."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, MutableSequence, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NoReturn, overload

from specrt.cache import KVCache
from specrt.draft.base import Drafter, DraftParams
from specrt.engine.core import EngineCore
from specrt.engine.editors import Editors
from specrt.engine.intake import Asked, Intake
from specrt.engine.limits import EngineLimits
from specrt.engine.prompts import OnePrompt, Prompt
from specrt.engine.request import Request
from specrt.engine.results import EngineStats, GenerationResult, StreamChunk
from specrt.engine.turns import Turns
from specrt.models.model import LlamaModel
from specrt.models.tokenizer import Tokenizer
from specrt.sampling import SamplingOptions, SamplingParams
from specrt.types import RequestHandle

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Engine:
    """A target, a drafter and the loop that joins them; made by :func:`specrt.load`.

    :meth:`generate` and :meth:`stream` answer prompts; :meth:`add`, :meth:`step` and :meth:`abort`
    are what they are made of, for whoever has a loop of their own. All requests of an engine, of
    whatever thread or call, are answered in one batch: they join while others run and leave as
    they end, and none changes another's text. Between processes an engine cannot be shared, nor
    copied. ``with`` closes it at the end.

    Args:
        target: the model whose words are spoken.
        drafter: proposes; never changes the words.
        tokenizer: for text prompts and text output.
        **limits: fields of :class:`~specrt.engine.limits.EngineLimits`.

    Raises:
        ValueError: a limit is out of range, or the drafter reads hidden states that the target
            has not; names it.
    """

    def __init__(
        self, target: LlamaModel, drafter: Drafter, tokenizer: Tokenizer, **limits: int | None
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.tokenizer = tokenizer
        self.limits = EngineLimits(**limits)  # type: ignore[arg-type]
        with target.device.working():  # where its memory is used
            self._core = EngineCore(target, drafter, self.limits)
        config = target.config
        editors = Editors(tokenizer, config.vocab_size, config.eos_ids)
        self._intake = Intake(config, tokenizer, drafter, self.limits, editors)
        self._lock = target.lock
        self._turns = Turns(self._core, self._lock, self._enqueue, self._check_open)
        self._outbox: list[StreamChunk] = []
        self._ids = count()
        self._owner = object()
        self._process = os.getpid()
        self._is_closed = False

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return "Engine(closed)"
        model, config = self.target, self.target.config
        return (
            f"Engine({config.num_layers} layers of {config.hidden_size}, vocabulary "
            f"{config.vocab_size}, {str(model.dtype).removeprefix('torch.')} on {model.device}, "
            f"drafter={type(self.drafter).__name__}, max_batch={self.limits.max_batch}, "
            f"max_nodes={self.limits.max_nodes})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Engine: cannot be pickled or copied; threads may share one, a process loads its own"
        )

    def close(self) -> None:
        """Free the cache and let go of target, drafter and tokenizer; closing again does nothing.

        Waits for a round that another thread is in. Open streams raise RuntimeError instead of
        their next round, and so does every later call.
        """
        self._lock.run(self._close)

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._turns.close()
        self._core.close()
        del self.target, self.drafter, self.tokenizer, self._core, self._intake

    @property
    def max_batch(self) -> int:
        """Requests that are answered at the same time."""
        return self.limits.max_batch

    @property
    def max_nodes(self) -> int:
        """The largest tree that is verified, its root included."""
        return self.limits.max_nodes

    @property
    def cache(self) -> KVCache:
        """The target's keys and values.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._check_open()
        return self._core.cache

    @property
    def default_sampling(self) -> SamplingParams:
        """What the model's authors would sample by (``generation_config.json``); greedy if nothing.

        Requests take nothing of it by themselves but ``repetition_penalty`` and
        ``suppress_tokens``, which are part of ``transformers``' greedy output.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._check_open()
        return SamplingParams.from_defaults(self.target.config.generation)

    @property
    def stats(self) -> EngineStats:
        """What it holds now, and what it has found so far; any thread may ask.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._check_open()
        return self._core.stats

    # --- whole answers ------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is iterable too, and the first fits
        self,
        prompts: OnePrompt,
        sampling: SamplingParams | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> list[GenerationResult]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult | list[GenerationResult]: ...

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """Answer one prompt or many.

        Args:
            prompts: one prompt (text, token ids, chat messages) or a list of them, also as
                tokenizers return them (:mod:`specrt.engine.prompts`).
            sampling: for all prompts, or one each; greedy by default.
            draft: the shape of the draft trees; by default the drafter's choice. Never changes
                the text.
            add_special_tokens: False leaves out what the tokenizer puts before a text by itself
                (bos); for texts that a chat template has made.
            **options: fields of :class:`SamplingParams`, which replace those of ``sampling``.

        Returns:
            A :class:`GenerationResult`, or a list of them in the order of the prompts. With ``n``
            above 1 a list, even of one prompt: all answers to the first, then those to the next. A
            sequence that failed (no memory, NaN) has ``finish_reason == "error"`` and leaves the
            others untouched.

        Raises:
            ValueError: no prompt or an empty one, one longer than the context, bad sampling
                options, a ``draft`` that the drafter does not take; names it and what came.
            TypeError: an option that :class:`SamplingParams` does not have.
            RuntimeError: the engine is closed, lost its GPU before, or is another process's.
        """
        self._check_open()
        requests, many = self._intake.take(prompts, sampling, draft, options, add_special_tokens)
        results = dict[tuple[int, int], GenerationResult]()
        with closing(self._turns.answers(requests, is_streamed=False)) as stream:
            for chunk in stream:
                if chunk.result is not None:
                    results[chunk.index, chunk.choice] = chunk.result
        ordered = [results[place] for place in sorted(results)]
        return ordered if many else ordered[0]

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> Generator[StreamChunk, None, None]:
        """As :meth:`generate`, but yield tokens as each round accepts them; ``chunk.index`` says of
        which prompt, ``chunk.choice`` of which of its answers.

        Closing the iterator, or any exception in the loop around it, frees what the sequences hold.
        Arguments are checked at the call, before the first chunk is asked for; requests are added
        when it is.
        """
        self._check_open()
        requests, _ = self._intake.take(prompts, sampling, draft, options, add_special_tokens)
        return self._turns.answers(requests, is_streamed=True)

    # --- step by step -------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs, and :meth:`step` has handed over all there was.

        Raises:
            RuntimeError: the engine is closed.
        """
        self._check_open()
        return self._core.scheduler.is_idle and not self._outbox

    def add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> RequestHandle:
        """Add a request; it joins when there is a place, and :meth:`step` tells how it goes.

        Any thread may add while others step. Arguments as for :meth:`generate`, of one prompt.

        Returns:
            What the request's chunks are known by (``chunk.handle``), and :meth:`abort` takes.

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`generate`; ``n`` is more than 1.
            QueueFullError: as many requests wait as may (``max_waiting``); nothing was added.
        """
        self._check_open()
        asked, many = self._intake.take(prompt, sampling, draft, options, add_special_tokens)
        count = asked[-1].choice + 1
        if count > 1:
            raise ValueError(f"n: expected 1, got {count}; add each answer, with a seed of its own")
        if many:
            raise ValueError("prompt: expected one, got a list of them; add each")
        return self._enqueue(asked[0], True, self._outbox).handle

    def step(self) -> list[StreamChunk]:
        """Run a piece of the prompts that wait for it, and a round of all that decode.

        Returns:
            What came of it for requests that were added by :meth:`add`; a request's last chunk has
            its result. Streams of the same engine go on as well, and keep what is theirs.

        Raises:
            RuntimeError: as :meth:`generate`.
        """
        self._check_open()
        device = self._core.device
        self._turns.step(deque())
        count = len(self._outbox)
        # No call from here on: neither Ctrl-C nor another thread comes in between.
        told = self._outbox[:count]
        del self._outbox[:count]
        if not told:
            device.require()
        return told

    def abort(self, handle: RequestHandle) -> bool:
        """End a request; its last chunk has a result with ``finish_reason == "abort"``.

        In the middle of a round (of another thread) it ends with that round.

        Returns:
            False if it had ended already.

        Raises:
            ValueError: the handle is not of this engine.
            RuntimeError: the engine is closed.
        """
        self._check_open()
        if not isinstance(handle, RequestHandle) or handle.owner is not self._owner:
            raise ValueError(f"handle: expected one that this engine's add gave, got {handle!r}")
        for request in self._core.scheduler:
            if request.handle is handle and not request.is_over:
                self._lock.do_when_free(partial(self._abort, request))
                return True
        return False

    # --- requests -----------------------------------------------------------------------------

    def encode(
        self, prompt: Prompt, *, name: str = "prompt", add_special_tokens: bool = True
    ) -> list[int]:
        """One prompt's token ids; arguments as for :meth:`generate`, ``name`` for errors.

        Raises:
            ValueError: the prompt is empty or none, or has ids outside the vocabulary.
        """
        self._check_open()
        return self._intake.encoder(add_special_tokens).encode(prompt, name)

    def check_draft(self, draft: DraftParams | None) -> None:
        """Refuse a shape that the engine or its drafter does not take, as :meth:`generate` would.

        Raises:
            ValueError: so; names the field.
            RuntimeError: the engine is closed.
        """
        self._check_open()
        self._intake.check_draft(draft)

    def check_sampling(self, params: SamplingParams) -> None:
        """Refuse parameters that this engine cannot follow, as :meth:`generate` would. A form of
        output is compiled here, and found again when a request is added.

        Raises:
            ValueError: so; names the field.
            RuntimeError: the engine is closed.
        """
        self._check_open()
        self._intake.editors.checked(params)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("engine: expected an open one, got one that was closed")
        if os.getpid() != self._process:
            raise RuntimeError(
                "engine: expected the process that loaded it, got a fork, in which its threads are "
                "gone; let each process load its own (multiprocessing's spawn)"
            )

    def _enqueue(
        self, asked: Asked, is_streamed: bool, box: MutableSequence[StreamChunk]
    ) -> Request:
        """A request that waits for its turn.

        Raises:
            QueueFullError: as :meth:`add`.
        """
        handle = RequestHandle(next(self._ids), self._owner)
        request = self._intake.request(asked, handle, is_streamed, box)
        self._core.add(request)
        return request

    def _abort(self, request: Request) -> None:
        if not self._is_closed and not request.is_over:
            self._core.end(request, request.failed("", "abort"))
