"""A request: what was asked, how far it has come, and how its user hears of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from specrt.cache import CachedSequence
from specrt.config import ModelConfig
from specrt.draft.base import DraftParams
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.engine.stop import FinishReason, OutputEnd, TextTracker
from specrt.models.tokenizer import Tokenizer
from specrt.sampling import SamplingParams, sampling_row
from specrt.types import RequestHandle, RoundStats, SequenceState


@dataclass(eq=False)
class Request:
    """One request from its arrival to its end; only the engine writes to it.

    It waits, is *admitted* (has pages, and its prompt is run in pieces), and then *runs* (decodes).
    Preempted, it gives its pages up and waits again; all that it knows is its tokens.
    """

    handle: RequestHandle
    params: SamplingParams
    draft: DraftParams
    state: SequenceState
    new_end: Callable[[], OutputEnd]
    """Makes what tells its tokens' text and where it ends."""
    deliver: Callable[[StreamChunk], None]
    """Called with what each round gives it: a box's own ``append`` (see :meth:`tell`)."""
    index: int = 0
    """Which prompt of its call."""
    cached: CachedSequence | None = None
    """Its pages; None while it waits."""
    is_drafted: bool = True
    """False once its drafter has failed it."""
    is_started: bool = False
    """Whether the drafter holds something for it."""
    num_failures: int = 0
    """Times the drafter failed while it was asked for this one."""
    is_suspect: bool = False
    """The drafter failed while it was asked for several: this one is asked for alone, to find out
    which."""
    logprobs: list[float] = field(default_factory=list)
    stats: RoundStats = field(default_factory=RoundStats)
    error: str | None = None
    num_told: int = 0
    """Output tokens that its user has been told of."""
    is_over: bool = False
    """Whether its user has been told its result."""

    def __post_init__(self) -> None:
        self.end = self.new_end()

    @property
    def num_to_prefill(self) -> int:
        """Tokens whose keys and values are missing; the last token is the first round's root."""
        held = 0 if self.cached is None else self.cached.length
        return len(self.state.token_ids) - 1 - held

    @property
    def output_ids(self) -> list[int]:
        """Tokens so far, without the prompt's."""
        return self.state.token_ids[self.state.prompt_len :]

    def append(self, tokens: Sequence[int], logprobs: Sequence[float] | None) -> list[int]:
        """Take tokens until the output ends; those that its user has not been told of."""
        taken = 0
        for token in tokens:
            taken += 1
            self.state.token_ids.append(token)
            if self.end.push(token):
                break
        if logprobs is not None:
            self.logprobs.extend(logprobs[:taken])
        return self.state.token_ids[self.state.prompt_len + self.num_told :]

    def failed(self, error: str, reason: FinishReason = "error") -> StreamChunk:
        """Its last chunk, if it cannot go on or is not to."""
        self.error = error if reason == "error" else None
        untold = self.append([], None)
        try:
            self.end.fail(reason)
            return self.chunk(untold, 0)
        except Exception:  # the tokenizer's: what was shown before is the text
            self.end.forget_unread()
            return self.chunk(untold, 0)

    def chunk(self, taken: list[int], accept_length: int) -> StreamChunk:
        """What a round gave: the tokens taken of a path, and the result if the output has ended."""
        return StreamChunk(
            index=self.index,
            text=self.end.take_text(),
            token_ids=taken,
            num_accepted=min(accept_length, len(taken)),
            result=self._result() if self.end.reason is not None else None,
            handle=self.handle,
        )

    def tell(self, chunk: StreamChunk) -> None:
        """Let its user have a chunk.

        Python looks for Ctrl-C behind each call, and here the last one is the telling itself: so a
        chunk is told and counted, or neither.
        """
        num_told = self.num_told + len(chunk.token_ids)
        self.num_told, self.is_over = num_told, chunk.result is not None
        self.deliver(chunk)

    def forget_untold(self) -> None:
        """Go back to what its user was told, whatever an interrupt has left half done.

        The tokens behind it will come again: their noise is a counter.
        """
        del self.state.token_ids[self.state.prompt_len + self.num_told :]
        del self.logprobs[self.num_told :]
        self.end = self.new_end()
        for token in self.output_ids:
            self.end.push(token)
        self.end.take_text()

    def _result(self) -> GenerationResult:
        return GenerationResult(
            text=self.end.whole_text(),
            token_ids=self.output_ids,
            prompt_token_ids=self.state.token_ids[: self.state.prompt_len],
            finish_reason=self.end.reason or "error",
            stop_reason=self.end.stop_reason,
            logprobs=self.logprobs if self.params.logprobs else None,
            seed=self.state.seed,
            stats=self.stats,
            error=self.error,
        )


class Asked(NamedTuple):
    """One prompt of a call."""

    number: int
    ids: list[int]
    params: SamplingParams
    draft: DraftParams


def new_request(
    asked: Asked,
    handle: RequestHandle,
    config: ModelConfig,
    tokenizer: Tokenizer,
    is_streamed: bool,
    box: deque[StreamChunk],
) -> Request:
    """A request that has not begun.

    Args:
        asked: what of the target.
        handle: names it.
        config: the target's.
        tokenizer: of its text.
        is_streamed: whether text is shown before the end.
        box: takes what comes of it.
    """
    ids, params = asked.ids, asked.params.with_seed()
    wanted = len(ids) + params.max_new_tokens
    max_len = min(wanted, config.max_positions)
    eos_ids = () if params.ignore_eos else config.eos_ids

    def new_end() -> OutputEnd:
        return OutputEnd(
            TextTracker(tokenizer.decode, ids, tokenizer.special_tokens),
            stop_ids={**{i: i for i in params.stop_token_ids or ()}, **dict.fromkeys(eos_ids)},
            stop_strings=params.stop_strings,
            keeps_stop=params.include_stop_str_in_output,
            num_left=max_len - len(ids),
            limit_reason="length" if max_len == wanted else "context",
            is_streamed=is_streamed,
        )

    state = SequenceState(
        list(ids),
        len(ids),
        max_len,
        seed=params.seed or 0,
        temperature=params.temperature,
        sampling_row=sampling_row(params, len(ids)),
    )
    return Request(handle, params, asked.draft, state, new_end, box.append, asked.number)
