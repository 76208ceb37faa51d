"""Draft trees on a GPU: a level's children and frontier, and the best of all, against torch."""

from __future__ import annotations

import torch

from bench.gpu import Place
from bench.limits import TREE_DEPTH, TREE_TOP_K, Model, pool_size
from specrt import ops
from specrt.draft.recycle.template import NUM_RANKS, make_template
from specrt.ops import registry
from specrt.ops.tree_build import expand_gpu_workspace_size, expand_workspace_size

Tensors = tuple[torch.Tensor, ...]


def _ints(place: Place, *shape: int) -> torch.Tensor:
    return torch.full(shape, -77, dtype=torch.int32, device=place.device)


def _floats(place: Place, *shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=place.device)


class TreeExpand:
    """``rows`` children of each of as many nodes, ranked plainly; one sequence.

    torch: log_softmax, the best of each row, the best of those.
    """

    _maxima: ops.DraftMaxima | None = None

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._logits = 3 * torch.randn(1, rows, model.vocab_size, device=place.device)
        self._top_k = rows
        words = torch.zeros(1, rows, 2, dtype=torch.int64, device=place.device)
        size = rows + rows * rows
        self._read = torch.zeros(1, rows, device=place.device), _ints(place, 1, rows), words
        self._pool = _ints(place, 1, size), _ints(place, 1, size), _floats(place, 1, size)
        self._scores = _floats(place, 1, rows)
        self._workspace = self._scratch(model)
        self._written = (
            _ints(place, 1, rows),
            self._scores,
            _ints(place, 1, rows),
            _ints(place, 1, rows),
            torch.zeros_like(words),
        )

    def _scratch(self, model: Model) -> torch.Tensor:
        if not registry.is_on_gpu(self._logits):
            return torch.zeros(1, expand_workspace_size(model.vocab_size))
        size = expand_gpu_workspace_size(1, self._top_k, model.vocab_size, self._top_k)
        return torch.zeros(size, device=self._logits.device)

    def ours(self) -> Tensors:
        """One level below the root's children."""
        level = 0 if self._top_k == 1 else 1
        ops.tree_expand(
            self._logits, *self._read, None, None, None, level, self._workspace, *self._pool,
            *self._written, maxima=self._maxima,
        )  # fmt: skip
        return (self._scores,)

    def torchs(self) -> Tensors:
        best = self._logits[0].log_softmax(-1).topk(self._top_k).values
        return ((best + self._read[0][0, :, None]).view(-1).topk(self._top_k).values[None],)


class TreeExpandByMaxima(TreeExpand):
    """The same by what the product that makes the logits leaves of every 64, which a GPU's does."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        super().__init__(model, rows, place)
        if not registry.is_on_gpu(self._logits):
            return
        x, weight = (
            torch.randn(size, 8, device=place.device).bfloat16()
            for size in (rows, model.vocab_size)
        )
        keys = torch.zeros(rows, -(-model.vocab_size // 64), dtype=torch.int64, device=x.device)
        self._maxima = ops.DraftMaxima(keys, torch.zeros_like(keys, dtype=torch.float32))
        ops.linear(x, weight, out=self._logits[0], maxima=self._maxima)


class TreeRerank:
    """``rows`` nodes of a pool of six levels below the root's children; one sequence.

    torch: the best scores, and their parents by a table of what was taken.
    """

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        k, size = TREE_TOP_K, pool_size()
        parent = torch.arange(-k, size - k, device=place.device).div(k, rounding_mode="floor")
        parent = parent.clamp(min=-1)
        steps, scores = torch.rand(size, device=place.device), _floats(place, size)
        for level in range(TREE_DEPTH + 1):
            end = k + level * k * k
            start = 0 if level == 0 else end - k * k
            above = scores[parent[start:end]] if level > 0 else 0.0
            scores[start:end] = above - steps[start:end]
        self._num_kept = min(rows - 1, size)
        self._tokens = torch.arange(size, dtype=torch.int32, device=place.device)[None]
        self._parent, self._scores = parent.int()[None], scores[None]
        self._root = place.ints(7)
        self._out = (
            _ints(place, 1, rows), _ints(place, 1, rows), _ints(place, 1), _floats(place, 1, rows),
        )  # fmt: skip

    def ours(self) -> Tensors:
        ops.tree_rerank(
            self._tokens, self._parent, self._scores, self._scores.shape[1], self._root, *self._out
        )
        return self._out[0], self._out[1], self._out[3]

    def torchs(self) -> Tensors:
        best = self._scores[0].topk(self._num_kept)
        nodes = torch.arange(1, self._num_kept + 1, dtype=torch.int32, device=self._root.device)
        place = torch.zeros_like(self._tokens[0]).index_copy_(0, best.indices, nodes)
        above = self._parent[0, best.indices].long()
        parents = torch.where(above < 0, 0, place[above.clamp(min=0)])
        return (
            torch.cat([self._root, self._tokens[0, best.indices]])[None],
            torch.cat([torch.full_like(self._root, -1), parents])[None],
            torch.cat([torch.zeros_like(best.values[:1]), best.values])[None]
            if self._num_kept
            else torch.zeros_like(self._out[3]),
        )


class RecyclePropose:
    """A template of ``rows`` nodes filled from a table; one sequence. torch: a gather a level."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        template = make_template(rows, 12, 128)
        size, vocab = rows, model.vocab_size
        self._table = torch.randint(
            0, vocab, (1, vocab, NUM_RANKS), dtype=torch.int32, device=place.device
        )
        self._slot, self._root = place.ints(0), place.ints(7)
        self._parents = place.ints(*template.parents[:size].tolist())
        self._ranks = place.ints(*template.ranks[:size].tolist())
        self._levels = [torch.from_numpy(level).to(place.device) for level in template.levels]
        self._out, self._torch_out = _ints(place, 2, 1, size)

    def ours(self) -> Tensors:
        """One launch."""
        given = self._table, self._slot, self._root, self._parents, self._ranks
        ops.recycle_propose(*given, self._out)
        return (self._out,)

    def torchs(self) -> Tensors:
        """Two lookups and a write a level."""
        tokens = self._torch_out[0]
        tokens[:1] = self._root
        for level in self._levels:
            above = tokens[self._parents[level].long()].long()
            tokens[level] = self._table[0][above, self._ranks[level].long()]
        return (self._torch_out,)


class RecycleLearn:
    """The best of ``rows`` rows of logits into a table; one sequence. torch: topk and a copy."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        vocab = model.vocab_size
        self._logits = torch.randn(1, rows, vocab, device=place.device)
        self._tokens = place.ints(*range(rows))[None]
        self._count, self._slot, self._accepted = (place.ints(n) for n in (rows, 0, 0))
        self._path = place.ints(0)[None]
        self._table, self._torch_table = _ints(place, 2, 1, vocab, NUM_RANKS)
        self._is_own = _ints(place, 1, vocab)
        floats = ops.recycle_learn_workspace(rows, vocab, NUM_RANKS)
        self._workspace = torch.zeros(floats, device=place.device)

    def ours(self) -> Tensors:
        """One launch."""
        ops.recycle_learn(
            self._logits, self._tokens, self._count, self._path, self._accepted, self._slot,
            self._table, self._is_own, self._workspace,
        )  # fmt: skip
        return (self._table,)

    def torchs(self) -> Tensors:
        """Without asking which of equal tokens counts."""
        best = self._logits[0].topk(NUM_RANKS, dim=1).indices.int()
        self._torch_table[0].index_copy_(0, self._tokens[0].long(), best)
        return (self._torch_table,)
