"""The requests that decode, as the tables a round reads: one row each, the first B in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt.cache import CacheBatch, KVCache
from specrt.engine.request import Request
from specrt.reuse import power_of_two
from specrt.sampling import SamplingRows, SamplingTable

_FIRST_TOKENS = 256  # columns of the history to begin with


class Batch:
    """Rows of static tables. A request that joins writes one row; where one leaves, the last row
    takes its place. Nothing else moves, and addresses stay while the history is wide enough.

    Args:
        cache: the target's.
        max_batch: S, rows there are.
        vocab_size: V.
    """

    def __init__(self, cache: KVCache, max_batch: int, vocab_size: int) -> None:
        self._requests: list[Request] = []
        self._cached = CacheBatch(cache, [])
        self._sampling = SamplingRows(max_batch, vocab_size)
        self._history = torch.zeros(max_batch, _FIRST_TOKENS, dtype=torch.int32)
        self._ints = torch.zeros(3, max_batch, dtype=torch.int32)
        # The same memory: writing through numpy costs a tenth of writing through torch.
        self._history_view, self._ints_view = self._history.numpy(), self._ints.numpy()
        self._look()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> Sequence[Request]:
        """In the order of their rows."""
        return self._requests

    history: torch.Tensor
    """``[B, T]`` int32: tokens so far."""
    history_len: torch.Tensor
    """``[B]`` int32"""
    roots: torch.Tensor
    """``[B]`` int32: the last tokens."""
    room: torch.Tensor
    """``[B]`` int32: nodes of a tree that there are pages for."""
    sampling: SamplingTable

    def join(self, request: Request) -> None:
        """A request decodes from now on."""
        row = len(self._requests)
        self._requests.append(request)
        self._sampling.write(row, request.params, request.prompt_len)
        self._write(row)
        self._look()

    def leave(self, request: Request) -> None:
        """A request decodes no more; one that does not anyway changes nothing."""
        if request not in self._requests:
            return
        row, last = self._requests.index(request), len(self._requests) - 1
        if row != last:
            self._requests[row] = self._requests[last]
            self._sampling.move(last, row)
            self._history_view[row] = self._history_view[last]
            self._ints_view[:, row] = self._ints_view[:, last]
        self._requests.pop()
        self._look()

    def clear(self) -> None:
        """Nobody decodes any more, whatever an interrupt has left half written."""
        self._requests.clear()
        self._look()

    def cached(self) -> CacheBatch:
        """The pages of the B sequences as they are now."""
        sequences = []
        for request in self._requests:
            assert request.cached is not None, "a request that decodes has pages"
            sequences.append(request.cached)
        return self._cached.update(sequences)

    def append(self, request: Request, tokens: Sequence[int]) -> None:
        """Add a sequence's new tokens to its row."""
        row = self._requests.index(request)
        start = self._ints_view[0, row]
        end = start + len(tokens)
        if end > self._history.shape[1]:
            self._widen(int(end))
        self._history_view[row, start:end] = tokens
        self._ints_view[0, row], self._ints_view[1, row] = end, tokens[-1]

    def set_room(self, row: int, num_nodes: int) -> None:
        """Bound the tree of a row."""
        self._ints_view[2, row] = num_nodes

    def _write(self, row: int) -> None:
        tokens = self._requests[row].token_ids
        if len(tokens) > self._history.shape[1]:
            self._widen(len(tokens))
        self._history_view[row, : len(tokens)] = tokens
        self._ints_view[:, row] = len(tokens), tokens[-1], 1

    def _widen(self, num_tokens: int) -> None:
        wider = torch.zeros(len(self._history), power_of_two(num_tokens), dtype=torch.int32)
        wider[:, : self._history.shape[1]] = self._history
        self._history, self._history_view = wider, wider.numpy()
        self._look()

    def _look(self) -> None:
        """The views of the rows in use."""
        used = len(self._requests)
        self.history = self._history[:used]
        self.history_len, self.roots, self.room = self._ints[:, :used]
        self.sampling = self._sampling.table(used)
