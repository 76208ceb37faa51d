"""The sequences that are being answered, and the tables of them that a round reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.engine.stop import OutputEnd
from specrt.sampling import SamplingParams, SamplingTable
from specrt.types import RoundStats, SequenceState


@dataclass(eq=False)
class RunningSequence:
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
        """Tokens so far, without the prompt's."""
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

    def chunk(self, taken: list[int], accept_length: int) -> StreamChunk:
        """What a round gave: the tokens taken of a path, and the result if the output has ended."""
        return StreamChunk(
            index=self.index,
            text=self.end.take_text(),
            token_ids=taken,
            num_accepted=min(accept_length, len(taken)),
            result=self._result() if self.end.reason is not None else None,
        )

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


class RunningBatch:
    """The running sequences and the tables the kernels read, remade when one joins or leaves."""

    def __init__(self) -> None:
        self.sequences: list[RunningSequence] = []
        self._is_stale = True

    def join(self, sequence: RunningSequence) -> None:
        self.sequences.append(sequence)
        self._is_stale = True

    def leave(self, sequence: RunningSequence) -> None:
        self.sequences.remove(sequence)
        self._is_stale = True

    def refresh(self, cache: KVCache, vocab_size: int, max_nodes: int) -> None:
        """Make the tables fit the sequences."""
        if not self._is_stale:
            return
        sequences = self.sequences
        states = [sequence.state for sequence in sequences]
        self.states = states
        self.cached = CacheBatch(cache, [sequence.cached for sequence in sequences])
        self.sampling = SamplingTable.build(
            [sequence.params for sequence in sequences],
            [state.prompt_len for state in states],
            vocab_size,
        )
        self.history = torch.zeros(
            len(states), max(state.max_len for state in states), dtype=torch.int32
        )
        for row, state in enumerate(states):
            known = torch.tensor(state.token_ids, dtype=torch.int32)
            self.history[row, : len(known)] = known
        self.history_len = torch.tensor([len(s.token_ids) for s in states], dtype=torch.int32)
        self.roots = torch.tensor([s.token_ids[-1] for s in states], dtype=torch.int32)
        self.max_nodes = torch.full((len(states),), max_nodes, dtype=torch.int32)
        # Writing through numpy costs a tenth of writing through torch.
        self._history, self._history_len = self.history.numpy(), self.history_len.numpy()
        self._is_stale = False

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Add a sequence's new tokens to its row of the history."""
        start = self._history_len[row]
        self._history[row, start : start + len(tokens)] = tokens
        self._history_len[row] = start + len(tokens)
        self.roots[row] = tokens[-1]
