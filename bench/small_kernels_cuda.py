"""The small kernels on a GPU against plain torch expressions, all in bfloat16.

Inputs rotate over sets that together exceed the cache, up to 64 sets: a few rows stay in it, as
they do in a model, where the kernel before has just written them. ``apart`` is ``feature_sample``
with rows that are gathered before its products and an activation behind them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from bench import limits
from bench.draft_sets import DraftControl, DraftControlUpdate, Embed, FeatureSample
from bench.draft_trees_cuda import (
    RecycleLearn,
    RecyclePropose,
    TreeExpand,
    TreeExpandByMaxima,
    TreeRerank,
)
from bench.gpu import OURS, Contender, Device, Launch, Place
from bench.gpu_report import Measured, run_bench
from bench.harness import Row, ratio_to
from bench.limits import Model
from bench.round_sets import PREFIX, HistoryAppend, PromptLookup, TreeSettle
from bench.tree_accept_cuda import TreeAccept, TreeAcceptFiltered
from specrt import ops
from specrt.models.rope import rope_table

ROWS = (60, 8192, 1, 8, 128)
NODES = (8, 60, 1, 127)
"""Of a tree, and so of a path at the most, each of which moves by one slot here."""
PAIRS = (10, 60, 1, 128)
"""Rows that a level of a draft tree joins."""
SEQUENCES = (1, 8, 64)
CHILDREN = (10, 4)
"""Of a frontier's node, and nodes of a frontier."""
PAGE_SIZE = 64
EPS = 1e-6
_TOLERANCE = 5e-2
"""Of a few roundings to bfloat16, which the expressions make and the kernels do not."""


Tensors = tuple[torch.Tensor, ...]


class InputSet(Protocol):
    """One set of inputs; both ways change copies of their own and return what they wrote."""

    def ours(self) -> Tensors: ...
    def torchs(self) -> Tensors: ...


class RmsNorm:
    """torch: the sum in place, then its own fused ``rms_norm``, with weights of the rows' type."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._x = place.randn(rows, model.hidden_size)
        self._residual = place.randn(rows, model.hidden_size)
        self._torch_residual = self._residual.clone()
        self._torch_weight = place.randn(model.hidden_size)
        self._weight = self._torch_weight.float()
        self._out = place.poison(rows, model.hidden_size)

    def ours(self) -> Tensors:
        ops.rms_norm(self._x, self._weight, EPS, residual=self._residual, out=self._out)
        return self._out, self._residual

    def torchs(self) -> Tensors:
        residual = self._torch_residual.add_(self._x)
        return F.rms_norm(residual, residual.shape[1:], self._torch_weight, EPS), residual


class LayerNorm:
    """torch: the sum in place, then its own ``layer_norm``, with weights of the rows' type."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._x = place.randn(rows, model.hidden_size)
        self._residual = place.randn(rows, model.hidden_size)
        self._torch_residual = self._residual.clone()
        self._torch_weights = [place.randn(model.hidden_size) for _ in range(2)]
        self._weights = [weight.float() for weight in self._torch_weights]
        self._out = place.poison(rows, model.hidden_size)

    def ours(self) -> Tensors:
        ops.layer_norm(self._x, *self._weights, EPS, self._out, residual=self._residual)
        return self._out, self._residual

    def torchs(self) -> Tensors:
        residual = self._torch_residual.add_(self._x)
        return F.layer_norm(residual, residual.shape[1:], *self._torch_weights, EPS), residual


class ScaleAdd:
    """torch: ``residual + factor * x``, one fused kernel."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._x, self._residual = (place.randn(rows, model.hidden_size) for _ in range(2))
        self._out, self._torch_out = (place.poison(rows, model.hidden_size) for _ in range(2))

    def ours(self) -> Tensors:
        return (ops.scale_add(self._x, 0.5, self._residual, out=self._out),)

    def torchs(self) -> Tensors:
        return (torch.add(self._residual, self._x, alpha=0.5, out=self._torch_out),)


class Activate:
    """torch: ``silu(gate) * up``."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        self._gate_up = place.randn(rows, 2 * model.intermediate_size)
        self._out, self._torch_out = (place.poison(rows, model.intermediate_size) for _ in range(2))

    def ours(self) -> Tensors:
        return (ops.activate(self._gate_up, self._out),)

    def torchs(self) -> Tensors:
        gate, up = self._gate_up.chunk(2, dim=1)
        return (torch.mul(F.silu(gate), up, out=self._torch_out),)


class RopeAppend:
    """torch: rotation of both halves, then two indexed writes into the pages."""

    def __init__(self, model: Model, rows: int, place: Place) -> None:
        heads, kv_heads, dim = model.num_heads, model.num_kv_heads, model.head_dim
        self._split = [heads, kv_heads, kv_heads]
        self._qkv = place.randn(1, rows, sum(self._split), dim)
        self._torch_qkv = self._qkv.clone()
        num_pages = -(-(PREFIX + rows) // PAGE_SIZE)
        self._cache = place.poison(2, num_pages, PAGE_SIZE, kv_heads, dim)
        self._torch_cache = self._cache.clone()
        self._table = place.ints(*range(num_pages))[None]
        self._depth = place.ints(*range(rows))[None]
        self._kv_len, self._first, self._count = (place.ints(n) for n in (PREFIX, 0, rows))
        self._cos_sin = rope_table(dim, 10000.0, PREFIX + rows).to(place.device)
        roped = self._cos_sin[PREFIX:, None].to(place.dtype)
        self._cos, self._sin = roped.chunk(2, dim=-1)
        slot = torch.arange(PREFIX, PREFIX + rows, device=place.device)
        self._page, self._row = slot // PAGE_SIZE, slot % PAGE_SIZE

    def ours(self) -> Tensors:
        q, k, v = self._qkv.split(self._split, dim=2)
        ops.rope_append(
            q,
            k,
            v,
            self._depth,
            self._kv_len,
            self._first,
            self._count,
            self._table,
            self._cos_sin,
            self._cache[0],
            self._cache[1],
        )
        return q, self._cache

    def torchs(self) -> Tensors:
        q, k, v = self._torch_qkv.split(self._split, dim=2)
        q.copy_(self._rotated(q))
        self._torch_cache[0][self._page, self._row] = self._rotated(k)[0]
        self._torch_cache[1][self._page, self._row] = v[0]
        return q, self._torch_cache

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = self._cos, self._sin
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class CommitCaches:
    """Two equal caches of all layers, in which one commit goes on where the last one ended."""

    def __init__(self, model: Model, rows: int, num_commits: int, place: Place) -> None:
        num_pages = -(-(PREFIX + num_commits * rows + 1) // PAGE_SIZE)
        size = (model.num_layers, 2, num_pages, PAGE_SIZE, model.num_kv_heads, model.head_dim)
        self.kv = place.randn(*size)
        self.torch_kv = self.kv.clone()
        self.table = place.ints(*range(num_pages))[None]
        self.path = place.ints(*range(1, rows + 1))[None]
        self.count = place.ints(rows)
        self.kv_len, self.torch_kv_len = place.ints(PREFIX), place.ints(PREFIX)
        self.tickets = place.ints(0)

    def reset(self) -> None:
        """Before the first commit; the rows stay moved, which costs the same again."""
        self.kv_len.fill_(PREFIX)
        self.torch_kv_len.fill_(PREFIX)


class KvCommit:
    """torch: one indexed copy over all layers, with slots that the host knows beforehand."""

    def __init__(self, caches: CommitCaches, start: int, rows: int) -> None:
        self._caches = caches
        slot = torch.arange(start, start + rows, device=caches.kv.device)
        self._to = slot // PAGE_SIZE, slot % PAGE_SIZE
        self._source = (slot + 1) // PAGE_SIZE, (slot + 1) % PAGE_SIZE

    def ours(self) -> Tensors:
        c = self._caches
        ops.kv_commit(c.kv, c.table, c.path, c.count, c.kv_len, tickets=c.tickets)
        return c.kv, c.kv_len

    def torchs(self) -> Tensors:
        c = self._caches
        moved = c.torch_kv[:, :, self._source[0], self._source[1]]
        c.torch_kv[:, :, self._to[0], self._to[1]] = moved
        c.torch_kv_len.add_(c.count)
        return c.torch_kv, c.torch_kv_len


Sets = tuple[list[InputSet], Launch | None]


def commits(model: Model, rows: int, num_sets: int, place: Place) -> Sets:
    """One cache; the sets are one commit after the other."""
    caches = CommitCaches(model, rows, num_sets, place)
    return [KvCommit(caches, PREFIX + i * rows, rows) for i in range(num_sets)], caches.reset


def appends(model: Model, rows: int, num_sets: int, place: Place) -> Sets:
    """Sets that share the tensor of their lengths alone, so that one launch resets all."""
    lengths = torch.full((2, num_sets, 1), PREFIX, dtype=torch.int32, device=place.device)
    sets = [HistoryAppend(rows, place, tuple(lengths[:, i])) for i in range(num_sets)]
    return sets, lambda: lengths.fill_(PREFIX)


def separate(kind: Callable[[Model, int, Place], InputSet]) -> Callable[..., Sets]:
    """Sets that share nothing."""

    def make(model: Model, rows: int, num_sets: int, place: Place) -> Sets:
        return [kind(model, rows, place) for _ in range(num_sets)], None

    return make


@dataclass(frozen=True)
class Kernel:
    """How to make its input sets, what it moves, at which numbers of rows."""

    sets: Callable[[Model, int, int, Place], Sets]
    work: Callable[[Model, int], limits.Work]
    rows: Sequence[int] = ROWS


KERNELS = {
    "rms_norm": Kernel(separate(RmsNorm), limits.rms_norm),
    "activate": Kernel(separate(Activate), limits.activate),
    "layer_norm": Kernel(separate(LayerNorm), limits.layer_norm),
    "scale_add": Kernel(separate(ScaleAdd), limits.scale_add),
    "embed": Kernel(separate(Embed), limits.embed),
    "rope_append": Kernel(separate(RopeAppend), limits.rope_append),
    "kv_commit": Kernel(commits, limits.kv_commit, NODES),
    "tree_settle": Kernel(separate(TreeSettle), limits.tree_settle, NODES),
    "history_append": Kernel(appends, limits.history_append, NODES),
    "prompt_lookup": Kernel(separate(PromptLookup), limits.prompt_lookup, NODES),
    "feature_sample": Kernel(separate(FeatureSample), limits.feature_sample, PAIRS),
    "feature_sample_folded": Kernel(
        separate(FeatureSample.folded), limits.feature_sample_folded, PAIRS
    ),
    "draft_control": Kernel(separate(DraftControl), limits.draft_control, SEQUENCES),
    "draft_control_update": Kernel(
        separate(DraftControlUpdate), limits.draft_control_update, SEQUENCES
    ),
    "tree_expand": Kernel(separate(TreeExpand), limits.tree_expand, CHILDREN),
    "tree_expand_by_maxima": Kernel(
        separate(TreeExpandByMaxima), limits.tree_expand_by_maxima, CHILDREN
    ),
    "recycle_propose": Kernel(separate(RecyclePropose), limits.recycle_propose, NODES),
    "recycle_learn": Kernel(separate(RecycleLearn), limits.recycle_learn, NODES),
    "tree_rerank": Kernel(separate(TreeRerank), limits.tree_rerank, NODES[1:]),
    "tree_accept": Kernel(separate(TreeAccept), limits.tree_accept, NODES),
    "tree_accept_filtered": Kernel(separate(TreeAcceptFiltered), limits.tree_accept, NODES),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kernel: str
    model: str
    rows: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.model} rows {self.rows}"


def cases(is_quick: bool, models: Sequence[str] = tuple(limits.MODELS)) -> Iterator[Case]:
    """What the goals are stated for comes first."""
    for index in range(2 if is_quick else len(ROWS)):
        for model in models[: 1 if is_quick else None]:
            for name, kernel in KERNELS.items():
                if index < len(kernel.rows):
                    yield Case(name, model, kernel.rows[index])


def contenders(sets: Sequence[InputSet], reset: Launch | None) -> dict[str, Contender]:
    """Both, after a first launch of each has given the same."""
    for ours, torchs in zip(sets[0].ours(), sets[0].torchs(), strict=True):
        # Slots that nobody wrote are still poison, in both.
        torch.testing.assert_close(ours, torchs, atol=_TOLERANCE, rtol=_TOLERANCE, equal_nan=True)
    found = {
        OURS: Contender([one.ours for one in sets], reset),
        "torch": Contender([one.torchs for one in sets], reset),
    }
    apart = [one.apart for one in sets if isinstance(one, FeatureSample)]
    for ours, alike in zip(sets[0].ours(), apart[0]() if apart else (), strict=False):
        torch.testing.assert_close(ours, alike, atol=_TOLERANCE, rtol=_TOLERANCE)
    return found | ({"apart": Contender(apart, reset)} if apart else {})


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    kernel, model = KERNELS[case.kernel], device.models[case.model]
    work = kernel.work(model, case.rows)
    free = device.free_bytes() // 2
    num_sets = limits.input_sets(work.num_bytes, 3 * work.num_bytes, l2_bytes, free)
    if num_sets == 0:
        return None, {OURS: f"needs {3 * work.num_bytes / 1e9:.0f} GB of {free / 1e9:.0f} GB"}
    sets = kernel.sets(model, case.rows, num_sets, device.place)
    timings = device.measure(contenders(*sets))
    ours, torchs = timings.graph[OURS], timings.graph.get("torch")
    apart = timings.graph.get("apart")
    row: Row = {
        "op": case.kernel,
        "model": case.model,
        "rows": case.rows,
        **limits.figures(work, ours, ceilings),
        "eager_us": 1e6 * timings.eager[OURS],
        "torch_us": None if torchs is None else 1e6 * torchs,
        "torch/ours": None if torchs is None else ratio_to(torchs, ours),
        "apart/ours": None if apart is None else ratio_to(apart, ours),
        "input_sets": num_sets,
    }
    return row, timings.failures


def run(args: argparse.Namespace, device: Device) -> None:
    """Measure and report what the budget allows."""
    chosen = cases(args.quick, tuple(device.models))
    run_bench("small_kernels_cuda", chosen, one_case, args, device)
