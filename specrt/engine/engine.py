"""The loop: draft, verify, accept, commit, observe, output.

Plain decoding is this same loop with the empty drafter. The engine is the only one that knows all
the stages; they exchange the plain types of :mod:`specrt.types` and never hold each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, NoReturn

from specrt.accept import accept
from specrt.cache import CacheBatch
from specrt.draft.base import Budget, Drafter, DraftParams, RoundCost, ShapedDrafter
from specrt.engine.prompts import Prompt, PromptEncoder, split_prompts
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.engine.running import RunningBatch, RunningSequence
from specrt.engine.stop import OutputEnd, TextTracker
from specrt.models.model import LlamaModel
from specrt.models.tokenizer import Tokenizer
from specrt.sampling import SamplingParams, one_each, sampling_row
from specrt.tree import MAX_NODES, settle
from specrt.types import AcceptResult, DraftTree, SequenceState


class Engine:
    """A target, a drafter and the loop that joins them; made by :func:`specrt.load`.

    Several streams of one engine may be open at once, and threads may share it: they take turns,
    a round each (so do engines of one target). Between processes it cannot be shared, nor copied.
    ``with`` closes it at the end.

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
        self._lock = target.lock
        self._running: set[RunningBatch] = set()
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
            f"drafter={type(self.drafter).__name__}, max_batch={self.max_batch}, "
            f"max_nodes={self.max_nodes})"
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
        for batch in list(self._running):
            self._leave(batch)
        self.cache.retire()
        del self.target, self.drafter, self.tokenizer, self.cache

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

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> Any:
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
            A :class:`GenerationResult`, or a list of them in the order of the prompts. A sequence
            that failed has ``finish_reason == "error"`` and leaves the others untouched.

        Raises:
            ValueError: no prompt or an empty one, one longer than the context, bad sampling
                options, a ``draft`` that the drafter does not take; names it and what came.
            TypeError: an option that :class:`SamplingParams` does not have.
            RuntimeError: the engine is closed.
            MemoryError: no memory for the KV cache; says how much was needed.
        """
        batch, many = split_prompts(prompts)
        requests = self._requests(batch, many, sampling, options, add_special_tokens)
        results: list[GenerationResult | None] = [None] * len(batch)
        with closing(self._run(requests, draft, has_text=False)) as chunks:
            for chunk in chunks:
                if chunk.result is not None:
                    results[chunk.index] = chunk.result
        return results if many else results[0]

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        draft: DraftParams | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> Generator[StreamChunk, None, None]:
        """As :meth:`generate`, but yield tokens as each round accepts them.

        Closing the iterator, or any exception in the loop around it, frees what the sequences hold.
        Arguments are checked at the call, before the first chunk is asked for.
        """
        batch, many = split_prompts(prompts)
        requests = self._requests(batch, many, sampling, options, add_special_tokens)
        return self._run(requests, draft, has_text=True)

    # --- requests -----------------------------------------------------------------------------

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """One prompt's token ids; arguments as for :meth:`generate`.

        Raises:
            ValueError: the prompt is empty or none, or has ids outside the vocabulary.
        """
        self._check_open()
        vocab_size = self.target.config.vocab_size
        return PromptEncoder(self.tokenizer, vocab_size, add_special_tokens).encode(prompt)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        many: bool,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        options: Mapping[str, Any],
        add_special_tokens: bool,
    ) -> list[tuple[list[int], SamplingParams]]:
        """Token ids and options of each prompt, which the target can take."""
        self._check_open()
        params = one_each(sampling, len(prompts), options)
        defaults = self.target.config.generation
        params = [p.with_defaults(defaults) for p in params]
        limit, vocab = self.target.config.max_positions, self.target.config.vocab_size
        encoder = PromptEncoder(self.tokenizer, vocab, add_special_tokens)
        requests = []
        for index, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            name = f"prompts[{index}]" if many else "prompt"
            ids = encoder.encode(prompt, name)
            if len(ids) >= limit:
                raise ValueError(
                    f"{name}: {len(ids)} tokens leave no room in the context of {limit}"
                )
            if p.logit_bias and max(p.logit_bias) >= vocab:
                raise ValueError(
                    f"logit_bias, suppress_tokens: expected token ids < {vocab}, "
                    f"got {max(p.logit_bias)}"
                )
            requests.append((ids, p))
        return requests

    def _new_sequence(
        self, index: int, ids: list[int], params: SamplingParams, has_text: bool
    ) -> RunningSequence:
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
            sampling_row=sampling_row(params, len(ids)),
        )
        # Tree rows are written past the length, and the last tree may start at the last token.
        cached = self.cache.open(max_len + self.max_nodes)
        return RunningSequence(index, params, state, end, cached)

    # --- the loop -----------------------------------------------------------------------------

    def _run(
        self,
        requests: Sequence[tuple[list[int], SamplingParams]],
        draft: DraftParams | None,
        has_text: bool,
    ) -> Generator[StreamChunk, None, None]:
        if draft is not None:
            self._check_draft(draft)
        return self._rounds(deque(enumerate(requests)), draft, has_text)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("engine: expected an open one, got one that was closed")

    def _check_draft(self, draft: DraftParams) -> None:
        if (draft.total_tokens or 1) > self.max_nodes:
            raise ValueError(
                f"total_tokens: expected at most the engine's max_nodes, {self.max_nodes}, "
                f"got {draft.total_tokens}"
            )
        if isinstance(self.drafter, ShapedDrafter):
            self.drafter.check(draft)

    def _rounds(
        self,
        waiting: deque[tuple[int, tuple[list[int], SamplingParams]]],
        draft: DraftParams | None,
        has_text: bool,
    ) -> Generator[StreamChunk, None, None]:
        batch = RunningBatch()
        self._running.add(batch)
        try:
            is_over = not waiting
            while not is_over:
                while waiting and len(batch.sequences) < self.max_batch:
                    index, request = waiting.popleft()
                    self._lock.run(partial(self._join, batch, index, request, has_text))
                chunks = self._lock.run(partial(self._round, batch, draft))
                is_over = not (waiting or batch.sequences)  # before anybody may close the engine
                yield from chunks
        finally:
            # Maybe by the garbage collector in the middle of another stream's round.
            self._lock.do_when_free(partial(self._leave, batch))

    def _leave(self, batch: RunningBatch) -> None:
        """Free what a stream's sequences hold, whichever way it ended."""
        self._running.discard(batch)
        with ExitStack() as releases:  # all of them, though one may raise
            for sequence in batch.sequences:
                releases.callback(self._release, batch, sequence)

    def _release(self, batch: RunningBatch, sequence: RunningSequence) -> None:
        try:
            self.drafter.finish(sequence.state)
        finally:
            self.cache.close(sequence.cached)
            batch.leave(sequence)

    def _join(
        self,
        batch: RunningBatch,
        index: int,
        request: tuple[list[int], SamplingParams],
        has_text: bool,
    ) -> None:
        self._check_open()
        batch.join(self._new_sequence(index, *request, has_text))
        self._start(batch.sequences[-1])

    def _start(self, sequence: RunningSequence) -> None:
        """Run the prompt but for its last token, which is the first round's root."""
        started = perf_counter()
        self.drafter.start(sequence.state)
        batch = CacheBatch(self.cache, [sequence.cached])
        prompt = sequence.state.token_ids[:-1]
        for start, taps in self.target.extend(prompt, batch, taps=self.drafter.taps):
            self.drafter.prefill(sequence.state, start, taps)
        self.target.wait()  # or the first round would be charged for it
        sequence.stats.prefill_ms = 1e3 * (perf_counter() - started)

    def _round(self, batch: RunningBatch, draft: DraftParams | None) -> list[StreamChunk]:
        """One round of every running sequence; those that end leave."""
        self._check_open()
        batch.refresh(self.cache, self.target.config.vocab_size, self.max_nodes)
        drafter = self.drafter
        budget = Budget(self.max_nodes, self._cost, draft, batch.cached)
        times = [perf_counter()]
        proposal = drafter.propose(batch.states, budget)
        tree = settle(proposal, batch.roots, batch.max_nodes, self.target.config.vocab_size)
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
        drafter.observe(batch.states, proposal, result, output.taps)
        times.append(perf_counter())
        draft_ms, verify_ms, accept_ms = (1e3 * (b - a) for a, b in pairwise(times))
        self._cost.observe(tree.draft_tokens.numel(), verify_ms + accept_ms)
        for sequence in batch.sequences:
            stats = sequence.stats
            stats.draft_ms += draft_ms
            stats.verify_ms += verify_ms
            stats.accept_ms += accept_ms
        chunks = self._output(batch, tree, result)
        for chunk, sequence in zip(chunks, list(batch.sequences), strict=True):
            if chunk.result is not None:
                self._release(batch, sequence)
        return chunks

    def _output(
        self, batch: RunningBatch, tree: DraftTree, result: AcceptResult
    ) -> list[StreamChunk]:
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
                chunks.append(sequence.chunk([], 0))
                continue
            row_logprobs = None if logprobs is None else logprobs[row]
            taken = sequence.append(tokens[row][: length + 1], row_logprobs)
            batch.append(row, taken)
            depth = tree.depth[row] if sizes[row] > 1 else None
            sequence.stats.record(sizes[row], len(taken) - 1, depth)
            chunks.append(sequence.chunk(taken, length))
        return chunks
