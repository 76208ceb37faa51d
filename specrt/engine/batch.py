"""The requests that decode, as the tables a round reads: one row each, the first B in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrt import ops
from specrt.cache import CacheBatch, KVCache
from specrt.draft.base import BatchTables
from specrt.draft.length.costs import GPU_SLOPE, RoundCost
from specrt.engine.request import Request
from specrt.ops.history_append import report_size
from specrt.reuse import power_of_two
from specrt.sampling import SamplingRows, SamplingTable
from specrt.types import AcceptResult, DraftTree

_FIRST_TOKENS = 256  # columns of the history to begin with
_FEW_STOPS = 4  # columns of the stop tokens to begin with
_NO_STOP = -1


class Batch:
    """Rows of static tables. A request that joins writes one row; where one leaves, the last row
    takes its place. Nothing else moves, and addresses stay while the tables are wide enough.

    From round to round tokens go on where the tables lie: on a GPU the host writes none of them.

    Args:
        cache: the target's.
        max_batch: S, rows there are.
        vocab_size: V.
    """

    def __init__(self, cache: KVCache, max_batch: int, vocab_size: int) -> None:
        self._device = device = cache.device
        self.cost = RoundCost(GPU_SLOPE) if device.is_gpu else RoundCost()
        """What verifying rows takes."""
        self._vocab_size = vocab_size
        self._requests: list[Request] = []
        self._cached = CacheBatch(cache, [])
        self._sampling = SamplingRows(max_batch, vocab_size, device)
        self._history = device.zeros(max_batch, _FIRST_TOKENS, dtype=torch.int32)
        self._stops = device.zeros(max_batch, _FEW_STOPS, dtype=torch.int32)
        self._ints = device.zeros(4, max_batch, dtype=torch.int32)
        self._host_room = torch.zeros(max_batch, dtype=torch.int32)  # what stands there
        self._room = device.there(self._host_room)
        self._room_view = self._host_room.numpy()
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
    max_len: torch.Tensor
    """``[B]`` int32: how long each history may become; 0 once it has ended."""
    roots: torch.Tensor
    """``[B]`` int32: the last tokens."""
    room: torch.Tensor
    """``[B]`` int32: nodes of a tree that there are pages for."""
    num_path: torch.Tensor
    """``[B]`` int32: nodes of the accepted path that are to be committed."""
    sampling: SamplingTable
    tables: BatchTables
    """All of these, as a round's launches read and write them."""

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
            for table in (self._history, self._stops, self._ints.T):
                table[row].copy_(table[last])
        self._requests.pop()
        self._look()

    def clear(self) -> None:
        """Nobody decodes any more, whatever an interrupt has left half written."""
        self._requests.clear()
        self._cached.expect_move()  # rounds may be under way that nobody will read
        self._look()

    def cached(self, *, is_ahead: bool = False) -> CacheBatch:
        """The pages of the B sequences as they are now; ``is_ahead`` as for
        :meth:`CacheBatch.update`."""
        sequences = []
        for request in self._requests:
            assert request.cached is not None, "a request that decodes has pages"
            sequences.append(request.cached)
        return self._cached.update(sequences, is_ahead=is_ahead)

    def set_room(self, num_nodes: Sequence[int], *, num_unread: int = 0) -> None:
        """Bound the trees of the B rows, and see to it that their tokens have a place.

        Args:
            num_nodes: of each tree, its root included.
            num_unread: tokens that a round that nobody has read yet may have appended.
        """
        used = len(self._requests)
        if self._room_view[:used].tolist() != num_nodes:
            self._room_view[:used] = 0  # until it stands there, if an interrupt comes in between
            if self._device.is_gpu:
                self._device.upload(torch.tensor(num_nodes, dtype=torch.int32), self.room)
            self._room_view[:used] = num_nodes
        longest = max(len(request.token_ids) for request in self._requests)
        # One more, for a history without room has ended.
        self._widen(longest + num_unread + max(num_nodes) + 1)

    def append(self, tree: DraftTree, result: AcceptResult) -> torch.Tensor:
        """Take what was accepted, up to each output's end; nothing but a launch.

        Returns:
            The round's report (``ops.history_append``), ``[B, R]`` int32.
        """
        report = self._device.empty(*report_shape(result), dtype=torch.int32)
        launch_append(self.tables, tree, result, report)
        return report

    def advance(self, counts: Sequence[int], *, is_ahead: bool) -> None:
        """So many rows of each sequence were committed (:meth:`CacheBatch.advance`)."""
        self._cached.advance(counts, is_ahead=is_ahead)

    def _write(self, row: int) -> None:
        request = self._requests[row]
        tokens = request.token_ids
        stops = sorted(token for token in request.end.stop_ids if token < self._vocab_size)
        self._widen(len(tokens))
        if len(stops) > self._stops.shape[1]:
            self._stops = self._widened(self._stops, len(stops))
        stops += [_NO_STOP] * (self._stops.shape[1] - len(stops))
        values = len(tokens), tokens[-1], request.max_len, 0
        for there, ids in (
            (self._history[row, : len(tokens)], tokens),
            (self._stops[row], stops),
            (self._ints[:, row], values),
        ):
            self._device.upload(torch.tensor(ids, dtype=torch.int32), there)

    def _widen(self, num_tokens: int) -> None:
        if num_tokens > self._history.shape[1]:
            self._history = self._widened(self._history, num_tokens)
            self._look()

    def _widened(self, table: torch.Tensor, num_columns: int) -> torch.Tensor:
        wider = self._device.zeros(len(table), power_of_two(num_columns), dtype=torch.int32)
        wider.fill_(_NO_STOP)
        wider[:, : table.shape[1]] = table
        return wider

    def _look(self) -> None:
        """The views of the rows in use."""
        used = len(self._requests)
        self.history = self._history[:used]
        self.history_len, self.roots, self.max_len, self.num_path = self._ints[:, :used]
        self.room = self._room[:used]
        self.sampling = self._sampling.table(used)
        self.tables = BatchTables(
            history=self.history,
            history_len=self.history_len,
            max_len=self.max_len,
            roots=self.roots,
            room=self.room,
            num_path=self.num_path,
            stop_ids=self._stops[:used],
            cached=self._cached,
            sampling=self.sampling,
        )


def report_shape(result: AcceptResult) -> tuple[int, int]:
    """``[B, R]``: of the report of a round with this result."""
    batch, size = result.tokens.shape
    return batch, report_size(size, result.logprobs is not None)


def launch_append(
    tables: BatchTables, tree: DraftTree, result: AcceptResult, report: torch.Tensor
) -> None:
    """What was accepted goes behind the histories, and into a report."""
    ops.history_append(
        tree.num_nodes,
        tree.depth,
        result.path,
        result.accept_length,
        result.tokens,
        result.logprobs,
        tables.stop_ids,
        tables.max_len,
        tables.history,
        tables.history_len,
        tables.roots,
        tables.num_path,
        report,
    )
