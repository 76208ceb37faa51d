"""Inputs of what a round does with trees and histories, for ``small_kernels_cuda``, and the same
work in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.gpu import Place
from bench.limits import LOOKUP_HISTORY, Model
from specrt import ops
from specrt.ops.history_append import report_size

PREFIX = 192
"""Committed slots before a round's rows; whole pages."""

Tensors = tuple[torch.Tensor, ...]


class TreeSettle:
    """torch: each node judged by itself, then what is known of ancestors doubled round by round."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        nodes, self._words = range(rows), -(-rows // 64)
        self._tokens = place.ints(*(3 * node for node in nodes))[None]
        self._parents = place.ints(*((node - 1) // 3 for node in nodes))[None]
        self._count, self._root = place.ints(rows), place.ints(7)
        self._vocab_size = 3 * rows
        self._node = torch.arange(rows, device=place.device)
        self._self = torch.eye(rows, dtype=torch.bool, device=place.device)
        ints = [place.ints(*(-77 for _ in nodes))[None] for _ in range(3)]
        bits = torch.full((1, rows, self._words), -77, dtype=torch.int64, device=place.device)
        self._out = (*ints, bits, place.ints(-77))

    def ours(self) -> Tensors:
        ops.tree_settle(
            self._tokens,
            self._parents,
            self._count,
            self._root,
            self._count,
            self._vocab_size,
            *self._out,
        )
        return self._out

    def torchs(self) -> Tensors:
        node, tokens, parents = self._node, self._tokens[0], self._parents[0]
        is_token = (tokens >= 0) & (tokens < self._vocab_size)
        stands = is_token & (parents < node) & (parents >= 0) & (node < self._count)
        is_kept = (stands | (node == 0)).cumprod(0).bool()
        known, up = self._self, parents.clamp(min=0).long() * is_kept
        for _ in range(len(node).bit_length()):
            known, up = known | known[up], up[up]
        known = known & is_kept[:, None]
        return (
            torch.where(node == 0, self._root, tokens * is_kept)[None],
            torch.where(node == 0, -1, parents * is_kept)[None],
            (known.sum(1) - is_kept.long()).int()[None],
            self._packed(known)[None],
            is_kept.sum(dtype=torch.int32)[None],
        )

    def _packed(self, known: torch.Tensor) -> torch.Tensor:
        bits = known.long() << (self._node % 64)
        return torch.stack([part.sum(1) for part in bits.split(64, dim=1)], dim=1)


class HistoryAppend:
    """torch: which tokens are taken as a mask, and one scatter; reports are joined."""

    def __init__(self, rows: int, place: Place, lengths: Tensors) -> None:
        self._entry = torch.arange(rows, device=place.device)
        node = place.ints(*range(rows))[None]
        self._count, self._accepted = place.ints(rows), place.ints(rows - 1)
        self._depth, self._path, self._tokens = node, node.clone(), 3 * node
        self._stop_ids, self._max_len = place.ints(-1, 1, 2, 3 * rows)[None], place.ints(4 * PREFIX)
        self._length, self._torch_length = lengths
        self._history, self._torch_history = (place.ints(*[-77] * 4 * PREFIX)[None] for _ in "ab")
        self._root, self._torch_root = place.ints(-77), place.ints(-77)
        self._num_path = place.ints(-77)
        self._report = place.ints(*[-77] * report_size(rows, False))[None]

    def ours(self) -> Tensors:
        out = self._history, self._length, self._root, self._num_path, self._report
        ops.history_append(
            self._count,
            self._depth,
            self._path,
            self._accepted,
            self._tokens,
            None,
            self._stop_ids,
            self._max_len,
            *out,
        )
        return out

    def torchs(self) -> Tensors:
        tokens, history, entry = self._tokens[0], self._torch_history, self._entry
        is_stop = (tokens[:, None] == self._stop_ids).any(1)
        is_told, room = entry <= self._accepted, self._max_len - self._torch_length
        takes = is_told & (entry < room) & (is_stop.cumsum(0) - is_stop.int() == 0)
        taken = takes.sum(dtype=torch.int32)[None]
        slot = (self._torch_length + entry).long().clamp(max=history.shape[1] - 1)
        history[0, slot] = torch.where(takes, tokens, history[0, slot])
        self._torch_length += taken
        last = tokens[(taken - 1).clamp(min=0).long()]
        self._torch_root.copy_(torch.where(taken > 0, last, self._torch_root))
        ending = (takes & is_stop).any() + 2 * (taken == room)
        deepest = (self._depth[0] * (entry < self._count)).max()[None]
        header = [
            self._count,
            deepest,
            self._accepted,
            taken,
            ending,
            *[torch.zeros_like(taken)] * 3,
        ]
        told = [torch.where(is_told, row[0], -1) for row in (self._tokens, self._path)]
        report = torch.cat([*header, *told]).int()[None]
        return history, self._torch_length, self._torch_root, taken, report


class PromptLookup:
    """One continuation, of a text in which few n-grams come again.

    torch: matches of every place at once, and the best of them.
    """

    _MAX_NGRAM = 4

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        length = LOOKUP_HISTORY
        self._history = place.ints(*(i * i % 9973 for i in range(length)))[None]
        self._length, self._max_len = place.ints(length), place.ints(length + rows)
        self._places = torch.arange(1, length, device=place.device)
        self._node = place.ints(*range(rows))
        self._out = tuple(place.ints(*[-77] * rows)[None] for _ in range(2))
        self._counts = tuple(place.ints(-77) for _ in range(3))

    def ours(self) -> Tensors:
        depth = len(self._node) - 1
        lengths = self._length, self._max_len
        ops.prompt_lookup(
            self._history, *lengths, self._MAX_NGRAM, 1, 1, depth, *self._out, *self._counts
        )
        return (*self._out, self._counts[0])

    def torchs(self) -> Tensors:
        history, places = self._history[0], self._places
        length, most = len(history), self._MAX_NGRAM
        padded = F.pad(history, (most, 0), value=-1)
        before = [padded[most - k : most - k + length - 1] for k in range(most)]
        same = torch.stack([row == history[-1 - k] for k, row in enumerate(before)])
        match = same.cumprod(0).sum(0)
        end = (match * length + places).argmax() + 1
        path = history[end + self._node[:-1] % (length - end)]
        is_found = match.max() > 0
        tokens = torch.cat([history[-1:], path * is_found])
        parents = (self._node - 1) * (is_found | (self._node == 0))
        count = 1 + is_found * (len(self._node) - 1)
        return tokens[None], parents[None].int(), count.int()[None]
