"""The pairs that a batch's next step begins with, at addresses that stay.

B sequences, P = :data:`MAX_PAIRS`. Pair i of those that sequence b has waiting has its feature in
row b * P + i of :attr:`PairTable.features`. A step's rows are each sequence's last pair first, and
then pair i of all sequences for i = 0, 1, ..., so that a step of fewer pairs has the first rows of
a larger one. Who has fewer has nothing in the rest, and leaves nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.draft.base import BatchTables
from specrt.draft.coupling import ROW_WORDS, Coupling, write_sampling
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.staging import Staging
from specrt.models.step import FINAL_TAP
from specrt.tree import MAX_NODES, num_words
from specrt.types import AcceptResult, SequenceState

MAX_LEVELS = 16
"""The largest depth of a tree."""
MAX_PAIRS = 1 + MAX_LEVELS
"""Pairs that one step takes, as many as a round may accept; more are run before it."""
BIT_WORDS = num_words(MAX_NODES)


class PairTable:
    """Written by the host (:meth:`stage`), or by a launch behind an accepted path (:meth:`take`).

    ``kv_len``, ``kv_len_after``, ``num_earlier`` and ``num_pairs``, all ``[B]`` int32, are pairs
    that were run before, that will have been run, that wait before the last one, and that wait.
    ``path [B, P]`` int32 commits them.

    Args:
        batch: B.
        layer: who runs them, on whose device they are.
    """

    def __init__(self, batch: int, layer: DraftLayer) -> None:
        device, ints = layer.device, torch.int32
        hidden, dtype = layer.padded.hidden_size, layer.activation_dtype
        self.batch = batch
        self.features = device.zeros(batch * MAX_PAIRS, hidden, dtype=dtype)
        self._staging = Staging(
            device,
            {
                "bits": ((batch, 1, BIT_WORDS), torch.int64),
                "sampling": ((batch, ROW_WORDS), torch.int64),
                "position": ((batch,), ints),
                "counts": ((4, batch), ints),
                "roots": ((batch,), ints),
                "source": ((MAX_PAIRS, batch), ints),
                "tokens": ((MAX_PAIRS, batch), ints),
            },
        )
        places = torch.arange(MAX_PAIRS, dtype=ints)
        own = torch.arange(batch, dtype=ints) * MAX_PAIRS
        self._staging.host["source"][1:] = (own + places[: MAX_PAIRS - 1, None]).numpy()
        there = self._staging.there
        self._tokens, self._source = there["tokens"], there["source"]
        self.roots, self.last_bits = there["roots"], there["bits"]
        self.kv_len, self.kv_len_after, self.num_earlier, self.num_pairs = there["counts"]
        self.coupling = Coupling(there["sampling"], there["position"])
        self.path = device.there(places.repeat(batch, 1))

    def rows(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and rows of the features ``[B * most]`` int32, of a step of ``most`` pairs a
        sequence."""
        count = self.batch * most
        return self._tokens.view(-1)[:count], self._source.view(-1)[:count]

    def stage(
        self,
        states: Sequence[SequenceState],
        batch: CacheBatch,
        pending: Sequence[torch.Tensor],
        *,
        is_coupled: bool,
    ) -> int:
        """Copy in what the host knows, in one piece, and the features.

        Args:
            states: B sequences.
            batch: their draft caches; each holds the pairs before the pending ones.
            pending: features ``[m, H]``, 1 to P of each sequence, not yet run.
            is_coupled: whether a tree will be ranked by their sampling.

        Returns:
            The largest m.
        """
        host, counts = self._staging.host, [len(features) for features in pending]
        for row, (state, cached) in enumerate(zip(states, batch.sequences, strict=True)):
            length, count = cached.length, counts[row]
            *above, last = state.token_ids[length + 1 : length + 1 + count]
            host["tokens"][0, row], host["tokens"][1:count, row] = last, above
            host["counts"][:, row] = length, length + count, count - 1, count
            host["source"][0, row] = row * MAX_PAIRS + count - 1
            host["bits"][row, 0, 0] = (1 << count) - 1
            host["roots"][row] = state.token_ids[-1]
        if is_coupled:
            write_sampling(states, host["sampling"], host["position"])
        self._staging.send()
        slots = [self.waiting(row, count) for row, count in enumerate(counts)]
        torch._foreach_copy_(slots, list(pending))
        return max(counts)

    def waiting(self, row: int, count: int) -> torch.Tensor:
        """Features ``[count, H]`` of the first pairs that a sequence has waiting (a view)."""
        return self.features[row * MAX_PAIRS : row * MAX_PAIRS + count]

    def take(
        self,
        tables: BatchTables,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
        *,
        are_kept: bool,
    ) -> None:
        """The pairs that an accepted path adds; nothing but a launch.

        Args:
            tables: with the path's tokens behind the histories.
            result: of acceptance.
            taps: of the verified trees.
            are_kept: whether those before go on waiting; otherwise they have been run.
        """
        ops.draft_pairs(
            taps[FINAL_TAP],
            result.path,
            tables.num_path,
            tables.history,
            tables.history_len,
            self.features.view(self.batch, MAX_PAIRS, -1),
            self._tokens,
            self._source[0],
            self.kv_len,
            self.kv_len_after,
            self.num_earlier,
            self.last_bits.view(self.batch, -1),
            are_kept=are_kept,
        )
