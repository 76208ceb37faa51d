"""What comes of a prompt: the whole result, and what one round adds to it."""

from __future__ import annotations

from dataclasses import dataclass

from specrt.engine.stop import FinishReason
from specrt.types import RequestHandle, RoundStats


@dataclass(frozen=True)
class GenerationResult:
    """One prompt's output."""

    text: str
    """What the output adds to the prompt's text, a leading space included; without special tokens,
    and without the stop string or stop token that ended it (``include_stop_str_in_output``)."""
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
