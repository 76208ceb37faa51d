"""The loop: draft, verify, accept, commit, observe, output.

Plain decoding is this same loop with the empty drafter. The engine is the only one that knows all
the stages; they exchange the plain types of :mod:`specrt.types` and never hold each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any, cast

import torch

from specrt.accept import accept
from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.draft.base import Budget, Drafter, DraftParams, RoundCost
from specrt.models.llama import LlamaModel
from specrt.models.tokenizer import Tokenizer
from specrt.sampling import SamplingParams, SamplingTable
from specrt.stop import FinishReason, OutputEnd, TextTracker
from specrt.tree import MAX_NODES
from specrt.types import AcceptResult, DraftTree, RoundStats, SequenceState

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or chat messages (through the tokenizer's own template)."""


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
    stats: RoundStats
    error: str | None = None
    """What went wrong, where ``finish_reason`` is ``"error"``."""
    stop_reason: int | str | None = None
    """The stop string or the id in ``stop_token_ids`` that ended it; None for end-of-sequence."""


@dataclass(frozen=True)
class StreamChunk:
    """What one round gave one sequence."""

    index: int
    """Which prompt."""
    text: str
    """New text; concatenated, a sequence's chunks give its result's ``text``."""
    token_ids: list[int]
    num_accepted: int
    """How many of ``token_ids`` (the first ones) the drafter had proposed."""
    result: GenerationResult | None
    """The whole result, with the sequence's last chunk."""


@dataclass(eq=False)
class _Sequence:
    """One running sequence: what the engine keeps beside the state that drafters see."""

    index: int
    params: SamplingParams
    state: SequenceState
    end: OutputEnd
    cached: CachedSequence
    logprobs: list[float] = field(default_factory=list)
    stats: RoundStats = field(default_factory=RoundStats)
    error: str | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.state.token_ids[self.state.prompt_len :]

    def append(self, tokens: Sequence[int], logprobs: Sequence[float] | None) -> list[int]:
        """Take tokens until the output ends; return those taken."""
        taken = 0
        for token in tokens:
            taken += 1
            self.state.token_ids.append(token)
            if self.end.push(token):
                break
        if logprobs is not None:
            self.logprobs.extend(logprobs[:taken])
        return list(tokens[:taken])


class _Batch:
    """The running sequences and the tables the kernels read, remade when one joins or leaves."""

    def __init__(self, cache: KVCache, vocab_size: int) -> None:
        self._cache = cache
        self._vocab_size = vocab_size
        self.sequences: list[_Sequence] = []
        self._is_stale = True

    def join(self, sequence: _Sequence) -> None:
        self.sequences.append(sequence)
        self._is_stale = True

    def leave(self, sequence: _Sequence) -> None:
        self.sequences.remove(sequence)
        self._is_stale = True

    def refresh(self) -> None:
        """Make the tables fit the sequences."""
        if not self._is_stale:
            return
        sequences = self.sequences
        states = [sequence.state for sequence in sequences]
        self.states = states
        self.cached = CacheBatch(self._cache, [sequence.cached for sequence in sequences])
        self.sampling = SamplingTable.build(
            [sequence.params for sequence in sequences],
            [state.prompt_len for state in states],
            self._vocab_size,
        )
        self.history = torch.zeros(
            len(states), max(state.max_len for state in states), dtype=torch.int32
        )
        for row, state in enumerate(states):
            known = torch.tensor(state.token_ids, dtype=torch.int32)
            self.history[row, : len(known)] = known
        self.history_len = torch.tensor([len(s.token_ids) for s in states], dtype=torch.int32)
        # Writing through numpy costs a tenth of writing through torch.
        self._history, self._history_len = self.history.numpy(), self.history_len.numpy()
        self._is_stale = False

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Add a sequence's new tokens to its row of the history."""
        start = self._history_len[row]
        self._history[row, start : start + len(tokens)] = tokens
        self._history_len[row] = start + len(tokens)


class Engine:
    """A target, a drafter and the loop that joins them; made by :func:`specrt.load`.

    Several streams of one engine may be open at once; calls must come from one thread at a time,
    for all of them share the model's buffers.

    Args:
        target: the model whose words are spoken.
        drafter: proposes; never changes the words.
        tokenizer: for text prompts and text output.
        max_batch: sequences that run together; further prompts wait for a place.
        max_nodes: the largest tree a drafter may propose, root included.
    """

    def __init__(
        self,
        target: LlamaModel,
        drafter: Drafter,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 8,
        max_nodes: int = 64,
    ) -> None:
        if not 1 <= max_nodes <= MAX_NODES:
            raise ValueError(f"max_nodes: expected 1..{MAX_NODES}, got {max_nodes}")
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, got {max_batch}")
        self.target = target
        self.drafter = drafter
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.max_nodes = max_nodes
        self.cache = target.new_cache()
        self._cost = RoundCost()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
    ) -> Any:
        """Answer one prompt or many.

        Args:
            prompts: one prompt (text, token ids or chat messages) or a list of them.
            sampling: for all prompts, or one each; greedy by default.
            draft: the shape of the draft trees; by default the drafter's choice. Never changes
                the text.

        Returns:
            A :class:`GenerationResult`, or a list of them in the order of the prompts. A sequence
            that failed has ``finish_reason == "error"`` and leaves the others untouched.

        Raises:
            ValueError: an empty prompt, one longer than the context, bad sampling options.
            MemoryError: no memory for the KV cache; says how much was needed.
        """
        many = _is_many(prompts)
        batch = list(prompts) if many else [prompts]
        results: list[GenerationResult | None] = [None] * len(batch)
        with closing(self._run(batch, sampling, draft, has_text=False)) as chunks:
            for chunk in chunks:
                if chunk.result is not None:
                    results[chunk.index] = chunk.result
        return results if many else results[0]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
    ) -> Generator[StreamChunk, None, None]:
        """As :meth:`generate`, but yield tokens as each round accepts them.

        Closing the iterator, or any exception in the loop around it, frees what the sequences hold.
        Arguments are checked at the call, before the first chunk is asked for.
        """
        batch = list(prompts) if _is_many(prompts) else [prompts]
        return self._run(batch, sampling, draft, has_text=True)

    # --- requests -----------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids.

        Raises:
            ValueError: the prompt is empty or has ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer.encode(prompt)) if prompt else []
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.apply_chat_template(cast("Sequence[Message]", prompt))
        else:
            ids = [int(token) for token in cast("Sequence[int]", prompt)]
        if not ids:
            raise ValueError("prompt: expected at least one token, got an empty prompt")
        vocab = self.target.config.vocab_size
        for token in ids:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"prompt: token id {token} is outside the vocabulary 0..{vocab - 1}"
                )
        return ids

    def _checked(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[tuple[list[int], SamplingParams]]:
        if sampling is None or isinstance(sampling, SamplingParams):
            params = [sampling or SamplingParams()] * len(prompts)
        else:
            params = list(sampling)
        if len(params) != len(prompts):
            raise ValueError(
                f"sampling: expected one for each of {len(prompts)} prompts, got {len(params)}"
            )
        requests = [(self.encode(prompt), p) for prompt, p in zip(prompts, params, strict=True)]
        limit, vocab = self.target.config.max_positions, self.target.config.vocab_size
        for ids, p in requests:
            if p.logit_bias and max(p.logit_bias) >= vocab:
                raise ValueError(
                    f"logit_bias: expected token ids < {vocab}, got {max(p.logit_bias)}"
                )
            if len(ids) >= limit:
                raise ValueError(
                    f"prompt: {len(ids)} tokens leave no room in the context of {limit}"
                )
        return requests

    def _new_sequence(
        self, index: int, ids: list[int], params: SamplingParams, has_text: bool
    ) -> _Sequence:
        params = params.with_seed()
        wanted = len(ids) + params.max_new_tokens
        max_len = min(wanted, self.target.config.max_positions)
        eos_ids = () if params.ignore_eos else self.target.config.eos_ids
        end = OutputEnd(
            TextTracker(self.tokenizer.decode, ids, self.tokenizer.special_tokens),
            stop_ids={**{i: i for i in params.stop_token_ids or ()}, **dict.fromkeys(eos_ids)},
            stop_strings=params.stop_strings,
            keeps_stop=params.include_stop_str_in_output,
            num_left=max_len - len(ids),
            limit_reason="length" if max_len == wanted else "context",
            is_streamed=has_text,
        )
        state = SequenceState(
            list(ids),
            len(ids),
            max_len,
            seed=params.seed or 0,
            temperature=params.temperature,
            top_k=params.top_k or 0,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        # Tree rows are written past the length, and the last tree may start at the last token.
        cached = self.cache.open(max_len + self.max_nodes)
        return _Sequence(index, params, state, end, cached)

    def _result(self, sequence: _Sequence) -> GenerationResult:
        ids = sequence.output_ids
        return GenerationResult(
            text=sequence.end.whole_text(),
            token_ids=ids,
            prompt_token_ids=sequence.state.token_ids[: sequence.state.prompt_len],
            finish_reason=sequence.end.reason or "error",
            stop_reason=sequence.end.stop_reason,
            logprobs=sequence.logprobs if sequence.params.logprobs else None,
            stats=sequence.stats,
            error=sequence.error,
        )

    # --- the loop -----------------------------------------------------------------------------

    def _run(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        draft: DraftParams | None,
        has_text: bool,
    ) -> Generator[StreamChunk, None, None]:
        if draft is not None and (draft.total_tokens or 1) > self.max_nodes:
            raise ValueError(
                f"total_tokens: expected at most the engine's max_nodes, {self.max_nodes}, "
                f"got {draft.total_tokens}"
            )
        requests = deque(enumerate(self._checked(prompts, sampling)))
        return self._rounds(requests, draft, has_text)

    def _rounds(
        self,
        waiting: deque[tuple[int, tuple[list[int], SamplingParams]]],
        draft: DraftParams | None,
        has_text: bool,
    ) -> Generator[StreamChunk, None, None]:
        batch = _Batch(self.cache, self.target.config.vocab_size)
        try:
            while waiting or batch.sequences:
                while waiting and len(batch.sequences) < self.max_batch:
                    index, (ids, params) = waiting.popleft()
                    batch.join(self._new_sequence(index, ids, params, has_text))
                    self._start(batch.sequences[-1])
                batch.refresh()
                for chunk, sequence in self._round(batch, draft):
                    if chunk.result is not None:
                        self._release(batch, sequence)
                    yield chunk
        finally:
            for sequence in list(batch.sequences):
                self._release(batch, sequence)

    def _release(self, batch: _Batch, sequence: _Sequence) -> None:
        batch.leave(sequence)
        self.drafter.finish(sequence.state)
        self.cache.close(sequence.cached)

    def _start(self, sequence: _Sequence) -> None:
        """Run the prompt but for its last token, which is the first round's root."""
        started = perf_counter()
        self.drafter.start(sequence.state)
        batch = CacheBatch(self.cache, [sequence.cached])
        prompt = sequence.state.token_ids[:-1]
        for start, taps in self.target.extend(prompt, batch, taps=self.drafter.taps):
            self.drafter.prefill(sequence.state, start, taps)
        self.target.wait()  # or the first round would be charged for it
        sequence.stats.prefill_ms = 1e3 * (perf_counter() - started)

    def _round(
        self, batch: _Batch, draft: DraftParams | None
    ) -> list[tuple[StreamChunk, _Sequence]]:
        """One round of every running sequence."""
        drafter = self.drafter
        budget = Budget(self.max_nodes, self._cost, draft, batch.cached)
        times = [perf_counter()]
        tree = drafter.propose(batch.states, budget)
        times.append(perf_counter())
        output = self.target.forward(tree, batch.cached, taps=drafter.taps)
        times.append(perf_counter())
        result = accept(
            tree,
            output.logits,
            batch.sampling,
            batch.history,
            batch.history_len,
            want_logprobs=batch.sampling.want_logprobs,
        )
        batch.cached.commit(result.path, result.accept_length + 1)
        drafter.observe(batch.states, result, output.taps)
        times.append(perf_counter())
        draft_ms, verify_ms, accept_ms = (1e3 * (b - a) for a, b in pairwise(times))
        self._cost.observe(tree.draft_tokens.numel(), verify_ms + accept_ms)
        for sequence in batch.sequences:
            stats = sequence.stats
            stats.draft_ms += draft_ms
            stats.verify_ms += verify_ms
            stats.accept_ms += accept_ms
        return self._output(batch, tree, result)

    def _output(
        self, batch: _Batch, tree: DraftTree, result: AcceptResult
    ) -> list[tuple[StreamChunk, _Sequence]]:
        """Append each sequence's new tokens and say what came of the round."""
        lengths, tokens = result.accept_length.tolist(), result.tokens.tolist()
        logprobs = None if result.logprobs is None else result.logprobs.tolist()
        sizes = tree.num_nodes.tolist()
        chunks = []
        for row, sequence in enumerate(batch.sequences):
            length = lengths[row]
            if length < 0:
                position = len(sequence.state.token_ids)
                sequence.error = f"logits: NaN or no finite value at position {position}"
                sequence.end.fail()
                chunks.append((self._chunk(sequence, [], 0), sequence))
                continue
            row_logprobs = None if logprobs is None else logprobs[row]
            taken = sequence.append(tokens[row][: length + 1], row_logprobs)
            batch.append(row, taken)
            sequence.stats.record(sizes[row], length, tree.depth[row] if sizes[row] > 1 else None)
            chunks.append((self._chunk(sequence, taken, length), sequence))
        return chunks

    def _chunk(self, sequence: _Sequence, taken: list[int], length: int) -> StreamChunk:
        is_over = sequence.end.reason is not None
        return StreamChunk(
            index=sequence.index,
            text=sequence.end.take_text(),
            token_ids=taken,
            num_accepted=min(length, len(taken)),
            result=self._result(sequence) if is_over else None,
        )


def _is_many(prompts: Any) -> bool:
    """A list of prompts, as opposed to one prompt of token ids or of chat messages."""
    if isinstance(prompts, str):
        return False
    if len(prompts) == 0:
        return True
    first = prompts[0]
    return not isinstance(first, int | Mapping)
