"""A request: what was asked, how far it has come, and how its user hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from specrt.cache import CachedSequence
from specrt.device import Mark
from specrt.draft.base import DraftParams
from specrt.engine.editor import Editor
from specrt.engine.results import GenerationResult, RoundTree, StreamChunk, TokenLogprob
from specrt.engine.stop import FinishReason, OutputEnd
from specrt.sampling import SamplingParams
from specrt.types import RequestHandle, RoundStats, SequenceState

T = TypeVar("T")


class TokenLaw(NamedTuple):
    """What the target's unprocessed law says at a token's place."""

    logprob: float
    """Of the token; NaN where the logits are no law."""
    top: list[TokenLogprob]
    """The likeliest, the likeliest first; none where the logits are no law."""


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
    """What drafters see of it; nothing is read back."""
    new_end: Callable[[], OutputEnd]
    """Makes what tells its tokens' text and where it ends."""
    deliver: Callable[[StreamChunk], None]
    """Called with what each round gives it: a box's own ``append`` (see :meth:`tell`)."""
    index: int = 0
    """Which prompt of its call."""
    choice: int = 0
    """Which of its prompt's answers."""
    editor: Editor | None = None
    """Edits the logits that its tokens are taken of."""
    cached: CachedSequence | None = None
    """Its pages; None while it waits."""
    is_looked_up: bool = False
    """Whether its beginning was looked for among what is kept."""
    is_drafted: bool = True
    """False once its drafter has failed it."""
    is_started: bool = False
    """Whether the drafter holds something for it."""
    num_failures: int = 0
    """Times the drafter failed while it was asked for this one."""
    is_suspect: bool = False
    """The drafter failed while it was asked for several: this one is asked for alone, to find out
    which."""
    prefills: list[tuple[Mark, Mark]] = field(default_factory=list)
    """When pieces of its prompt were run, of those that no round has come behind yet."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    prompt_laws: list[TokenLaw] = field(default_factory=list)
    """At the places of the prompt's tokens behind the first, as far as they were run."""
    stats: RoundStats = field(default_factory=RoundStats)
    error: str | None = None
    num_told: int = 0
    """Output tokens that its user has been told of."""
    is_over: bool = False
    """Whether its user has been told its result, or is to hear nothing more."""

    def __post_init__(self) -> None:
        self.end = self.new_end()
        self.token_ids = list(self.state.token_ids)  # prompt, then output
        self.prompt_len = len(self.token_ids)
        self.max_len = self.state.max_len

    @property
    def needs_host(self) -> bool:
        """Whether the host has a part in each of its rounds."""
        asks = self.params.top_logprobs > 0 or self.params.report_trees
        return asks or self.editor is not None

    @property
    def reads_prompt(self) -> bool:
        """Whether more of its prompt has to be run than its keys and values call for."""
        wanted = self.params.prompt_logprobs is not None
        return wanted and len(self.prompt_laws) < self.prompt_len - 1

    @property
    def num_to_prefill(self) -> int:
        """Tokens whose keys and values are missing; the last token is the first round's root."""
        held = 0 if self.cached is None else self.cached.length
        return len(self.token_ids) - 1 - held

    @property
    def output_ids(self) -> list[int]:
        """Tokens so far, without the prompt's."""
        return self.token_ids[self.prompt_len :]

    def append(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float] | None = None,
        top_logprobs: Sequence[list[TokenLogprob]] | None = None,
    ) -> list[int]:
        """Take tokens until the output ends; those that its user has not been told of."""
        taken = 0
        for token in tokens:
            taken += 1
            self.token_ids.append(token)
            if self.end.push(token):
                break
        self.state.token_ids.extend(tokens[:taken])
        if logprobs is not None:
            self.logprobs.extend(logprobs[:taken])
        if top_logprobs is not None:
            self.top_logprobs.extend(top_logprobs[:taken])
        return self.token_ids[self.prompt_len + self.num_told :]

    def failed(self, error: str, reason: FinishReason = "error") -> StreamChunk:
        """Its last chunk, if it cannot go on or is not to."""
        self.error = error if reason == "error" else None
        untold = self.append([])
        try:
            self.end.fail(reason)
            return self.chunk(untold, 0)
        except Exception:  # the tokenizer's: what was shown before is the text
            self.end.forget_unread()
            return self.chunk(untold, 0)

    def chunk(
        self, taken: list[int], accept_length: int, tree: RoundTree | None = None
    ) -> StreamChunk:
        """What a round gave: the tokens taken of a path, and the result if the output has ended."""
        num_accepted = min(accept_length, len(taken))
        if tree is not None:
            tree = replace(tree, path=tree.path[: 1 + num_accepted])
        params = self.params
        return StreamChunk(
            index=self.index,
            text=self.end.take_text(),
            token_ids=taken,
            num_accepted=num_accepted,
            result=self._result() if self.end.reason is not None else None,
            handle=self.handle,
            choice=self.choice,
            logprobs=self._untold(self.logprobs, taken) if params.wants_logprobs else None,
            top_logprobs=self._untold(self.top_logprobs, taken) if params.top_logprobs else None,
            tree=tree,
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
        del self.token_ids[self.prompt_len + self.num_told :]
        self.state.token_ids[:] = self.token_ids
        del self.logprobs[self.num_told :], self.top_logprobs[self.num_told :]
        self.end = self.new_end()
        for token in self.output_ids:
            self.end.push(token)
        self.end.take_text()

    def _untold(self, values: Sequence[T], taken: Sequence[int]) -> list[T]:
        return list(values[self.num_told : self.num_told + len(taken)])

    def _result(self) -> GenerationResult:
        params, laws = self.params, self.prompt_laws
        # Of the first token there is no law, of a prompt that was not run to its end not all.
        asks_prompt, missing = params.prompt_logprobs is not None, self.prompt_len - 1 - len(laws)
        prompt = [None, *(law.logprob for law in laws), *[None] * missing]
        prompt_top = [[], *(law.top for law in laws), *([] for _ in range(missing))]
        return GenerationResult(
            text=self.end.whole_text(),
            token_ids=self.output_ids,
            prompt_token_ids=self.token_ids[: self.prompt_len],
            finish_reason=self.end.reason or "error",
            stop_reason=self.end.stop_reason,
            logprobs=self.logprobs if params.wants_logprobs else None,
            seed=params.seed or 0,
            stats=self.stats,
            error=self.error,
            choice=self.choice,
            top_logprobs=self.top_logprobs if params.top_logprobs else None,
            prompt_logprobs=prompt if asks_prompt else None,
            prompt_top_logprobs=prompt_top if asks_prompt else None,
        )
