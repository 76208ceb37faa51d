"""What comes of a prompt: the whole result, and what one round adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from specrt.engine.stop import FinishReason
from specrt.types import RequestHandle, RoundStats


class TokenLogprob(NamedTuple):
    """A token and its log-probability under the target's unprocessed law."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class RoundTree:
    """What a round verified of one sequence."""

    token_ids: list[int]
    """Of each node; node 0, the root, is the last token that was there before."""
    parents: list[int]
    """Of each node, its parent, which comes before it; -1 of the root."""
    path: list[int]
    """The accepted nodes whose tokens the output took, from the root (0) down."""


@dataclass(frozen=True)
class GenerationResult:
    """One prompt's output."""

    text: str
    """What the output adds to the prompt's text, a leading space included; without special tokens
    (``skip_special_tokens``), and without the stop string or stop token that ended it
    (``include_stop_str_in_output``)."""
    token_ids: list[int]
    """Output tokens, an end-of-sequence token included."""
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None
    """Of each token under the target's unprocessed law, if asked for."""
    seed: int
    """The request's, or the one that was drawn for it; with it, it can be repeated."""
    stats: RoundStats
    error: str | None = None
    """What went wrong, where ``finish_reason`` is ``"error"``."""
    stop_reason: int | str | None = None
    """The stop string or the id in ``stop_token_ids`` that ended it; None for end-of-sequence."""
    choice: int = 0
    """Which of its prompt's ``n`` answers."""
    top_logprobs: list[list[TokenLogprob]] | None = None
    """Of each output token's place the likeliest tokens, if asked for, the likeliest first; nothing
    where the target's logits are no law (an infinity that a bias mended)."""
    prompt_logprobs: list[float | None] | None = None
    """Of each prompt token, if asked for; None of the first, for which there is no law, and of
    those that a request which failed did not come to."""
    prompt_top_logprobs: list[list[TokenLogprob]] | None = None
    """As ``top_logprobs``, of each prompt token's place, if asked for; nothing where
    ``prompt_logprobs`` is None."""


@dataclass(frozen=True)
class StreamChunk:
    """What one round gave one sequence."""

    index: int
    """Which prompt of its call."""
    text: str
    """New text; concatenated, a sequence's chunks give its result's ``text``."""
    token_ids: list[int]
    num_accepted: int
    """How many of ``token_ids`` (the first ones) the drafter had proposed: all but the bonus token,
    and simply all where the output ends before it. Only there ``stats`` counts one less, for it
    gives the bonus token's place to the last one."""
    result: GenerationResult | None
    """The whole result, with the sequence's last chunk."""
    handle: RequestHandle
    """Whose it is: what :meth:`Engine.add` gave."""
    choice: int = 0
    """Which of its prompt's ``n`` answers."""
    logprobs: list[float] | None = None
    """Of ``token_ids``, as :attr:`GenerationResult.logprobs`."""
    top_logprobs: list[list[TokenLogprob]] | None = None
    """Of ``token_ids``, as :attr:`GenerationResult.top_logprobs`."""
    tree: RoundTree | None = None
    """The round's, if asked for (``report_trees``); None where no round gave the chunk."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds at a moment, and what it has found so far."""

    num_running: int
    """Requests that have a place: those whose prompt is run and those that decode."""
    num_waiting: int
    num_pages: int
    """Of the target's keys and values that there are; on a CPU they become more as they are
    needed."""
    num_held_pages: int
    """Those that requests hold."""
    num_shared_pages: int
    """Those that later requests may begin with, whether one holds them now or not."""
    prefix_queries: int
    """Tokens of all prompts so far that might have been there; the last one of each is run."""
    prefix_hits: int
    """Those of them that were."""
