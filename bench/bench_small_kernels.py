"""The small kernels against plain torch expressions, and what calling any op costs.

The first table times ``rms_norm``, ``layer_norm``, ``rope_append``, ``activate`` (gated silu, and
ungated gelu), ``scale_add`` (capped too), ``embed`` (with positions too) and ``kv_commit`` at 1, 8
and 64 rows (kv_commit: committed rows, one slot further down) of the bundled model's and of
Llama-3-8B's shape, one Python call each. Rows named ``call:`` are every op on the least work it
takes, that is, wrapper and binding alone; the goal is 3 µs. ``--device cuda`` is
``small_kernels_cuda.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench import gpu, limits
from bench.harness import Row, measure_interleaved, parser, ratio_to, report, start
from specrt import ops
from specrt.models.rope import rope_table
from specrt.ops.history_append import report_size
from specrt.sampling import SamplingParams, SamplingTable

ROWS = (1, 8, 64)
PAGE = 64
_VOCAB = 1024
PREFIX = 200
"""Committed slots before the rows."""

Pair = tuple[Callable[[], object], Callable[[], object]]
"""Ours and torch's way to do the same work."""


@dataclass(frozen=True)
class Shape(limits.Model):
    """A model, and what its cache holds."""

    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "builtin": Shape(256, 704, 24, 4, 2, 64),
    "Llama-3-8B": Shape(**vars(limits.MODELS["Llama-3-8B"])),
}


def ints(*values: int) -> torch.Tensor:
    """``[n]`` int32."""
    return torch.tensor(values, dtype=torch.int32)


class Cache:
    """One sequence of ``PREFIX`` committed slots and room for ``num_rows`` more."""

    def __init__(self, shape: Shape, num_rows: int) -> None:
        self.num_pages = -(-(PREFIX + num_rows + 1) // PAGE)
        size = (shape.num_layers, 2, self.num_pages, PAGE, shape.num_kv_heads, shape.head_dim)
        self.kv = torch.randn(size).to(shape.dtype)
        self.table = torch.arange(self.num_pages, dtype=torch.int32)[None]
        self.kv_len = ints(PREFIX)
        self._length = self.kv_len.numpy()

    def reset(self) -> None:
        """Uncommit; through numpy, which costs next to nothing."""
        self._length[0] = PREFIX

    def slots(self, start: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and row in it of slots ``start``.. behind the prefix, as torch indexes them."""
        slot = PREFIX + start + torch.arange(num_rows)
        return self.table[0].long()[slot // PAGE], slot % PAGE


def rms_norm(shape: Shape, num_rows: int) -> Pair:
    """torch: its own fused ``rms_norm``."""
    x, weight = torch.randn(num_rows, shape.hidden_size), torch.randn(shape.hidden_size)
    out = torch.empty_like(x)
    return (
        lambda: ops.rms_norm(x, weight, 1e-6, out=out),
        lambda: F.rms_norm(x, weight.shape, weight, 1e-6),
    )


def layer_norm(shape: Shape, num_rows: int) -> Pair:
    """torch: its own fused ``layer_norm``."""
    x = torch.randn(num_rows, shape.hidden_size)
    weight, bias, out = torch.randn(shape.hidden_size), torch.randn(shape.hidden_size), x.clone()
    return (
        lambda: ops.layer_norm(x, weight, bias, 1e-6, out),
        lambda: F.layer_norm(x, weight.shape, weight, bias, 1e-6),
    )


def activate(shape: Shape, num_rows: int) -> Pair:
    """torch: ``silu(gate) * up``."""
    gate_up = torch.randn(num_rows, 2 * shape.intermediate_size)
    out = torch.empty(num_rows, shape.intermediate_size)
    gate, up = gate_up.chunk(2, dim=1)
    return lambda: ops.activate(gate_up, out), lambda: torch.mul(F.silu(gate), up, out=out)


def activate_gelu(shape: Shape, num_rows: int) -> Pair:
    """torch: its own ``gelu``."""
    x = torch.randn(num_rows, shape.intermediate_size)
    out = torch.empty_like(x)
    return lambda: ops.activate(x, out, "gelu", False), lambda: F.gelu(x)


def scale_add(shape: Shape, num_rows: int) -> Pair:
    """torch: one fused sum."""
    x, residual = torch.randn(2, num_rows, shape.hidden_size)
    out = torch.empty_like(x)
    return (
        lambda: ops.scale_add(x, 0.5, residual, out=out),
        lambda: torch.add(residual, x, alpha=0.5, out=out),
    )


def scale_add_capped(shape: Shape, num_rows: int) -> Pair:
    """torch: a quotient, a tangent and a product, in place."""
    x = torch.randn(num_rows, shape.hidden_size)
    out = torch.empty_like(x)
    return (
        lambda: ops.scale_add(x, 1.0, cap=30.0, out=out),
        lambda: torch.div(x, 30.0, out=out).tanh_().mul_(30.0),
    )


def embed(shape: Shape, num_rows: int) -> Pair:
    """torch: a selection and, where the types differ, a copy."""
    table = torch.randn(_VOCAB, shape.hidden_size).to(shape.dtype)
    out, tokens = torch.empty(num_rows, shape.hidden_size), torch.arange(num_rows).int() * 7
    return lambda: ops.embed(tokens, table, out), lambda: out.copy_(table.index_select(0, tokens))


def embed_positions(shape: Shape, num_rows: int) -> Pair:
    """torch: two selections, a product and a sum."""
    table, places = (torch.randn(_VOCAB, shape.hidden_size).to(shape.dtype) for _ in range(2))
    out, tokens = torch.empty(num_rows, shape.hidden_size), torch.arange(num_rows).int() * 7
    depth = torch.arange(num_rows, dtype=torch.int32)[None]
    positions, rows = ops.EmbedPositions(places, depth, ints(PREFIX), 0), PREFIX + depth[0]

    def torchs() -> None:
        out.copy_(table.index_select(0, tokens)).mul_(2.0).add_(places.index_select(0, rows))

    return lambda: ops.embed(tokens, table, out, scale=2.0, positions=positions), torchs


def rope_append(shape: Shape, num_rows: int) -> Pair:
    """torch: rotation of both halves, then two indexed writes into the pages."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(1, num_rows, heads, shape.head_dim)
    q, k, v = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=2)
    cache = Cache(shape, num_rows)
    k_cache, v_cache = cache.kv[0, 0], cache.kv[0, 1]
    depth = torch.arange(num_rows, dtype=torch.int32)[None]
    table = rope_table(shape.head_dim, 10000.0, PREFIX + num_rows)
    first, count = ints(0), ints(num_rows)
    pages, rows = cache.slots(0, num_rows)

    def ours() -> None:
        ops.rope_append(
            q, k, v, depth, cache.kv_len, first, count, cache.table, table, k_cache, v_cache
        )

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def torchs() -> None:
        cos, sin = table[PREFIX + depth[0]][None, :, None].chunk(2, dim=-1)
        q.copy_(rotated(q, cos, sin))
        k_cache[pages, rows] = rotated(k, cos, sin)[0].to(shape.dtype)
        v_cache[pages, rows] = v[0].to(shape.dtype)

    return ours, torchs


def kv_commit(shape: Shape, num_rows: int) -> Pair:
    """torch: one indexed copy over all layers. Every row moves by one slot."""
    cache = Cache(shape, num_rows)
    path = torch.arange(1, num_rows + 1, dtype=torch.int32)[None]
    count = ints(num_rows)
    sources, targets = cache.slots(1, num_rows), cache.slots(0, num_rows)

    def ours() -> None:
        cache.reset()
        ops.kv_commit(cache.kv, cache.table, path, count, cache.kv_len)

    def torchs() -> None:
        cache.reset()
        cache.kv[:, :, targets[0], targets[1]] = cache.kv[:, :, sources[0], sources[1]]
        cache.kv_len.add_(count)

    return ours, torchs


KERNELS: dict[str, Callable[[Shape, int], Pair]] = {
    "rms_norm": rms_norm,
    "rope_append": rope_append,
    "layer_norm": layer_norm,
    "activate": activate,
    "activate, gelu": activate_gelu,
    "scale_add": scale_add,
    "scale_add, capped": scale_add_capped,
    "embed": embed,
    "embed, positions": embed_positions,
    "kv_commit": kv_commit,
}


def least_work() -> dict[str, Callable[[], object]]:
    """A call of each op on as little work as it takes, outputs given where the op lets one."""
    shape = Shape(16, 1, 1, 1, 1, 16, torch.float32)
    cache = Cache(shape, 1)
    x, weight, vector = torch.randn(1, 16), torch.randn(1, 16), torch.randn(16)
    one, normed, pair = torch.empty(1, 1), torch.empty(1, 16), torch.randn(1, 2)
    scratch, joined = torch.empty(1, ops.feature_sample_workspace(1, 0)), torch.empty(1, 1)
    q = torch.randn(1, 1, 1, 16)
    attended = torch.empty_like(q)
    ancestors, zero, count = torch.ones(1, 1, 1, dtype=torch.int64), ints(0), ints(1)
    depth, kv, empty = ints(0)[None], cache.kv[0], ints(0)
    table = rope_table(16, 10000.0, PREFIX + 1)
    tokens, path, length, chosen = (ints(0)[None] for _ in range(4))
    parents, below, room = ints(-1)[None], ints(0)[None], ints(0)
    of_four = tuple(torch.zeros(4, 1).int())
    of_one, record = (length[0], chosen[0]), torch.zeros(1, report_size(1, False)).int()
    logits = torch.zeros(1, 1, 1)
    sampling = SamplingTable.build([SamplingParams()], [1], 1).rows
    return {
        "gumbel_noise": lambda: ops.gumbel_noise(0, 0, 1),
        "tree_accept": lambda: ops.tree_accept(
            tokens,
            parents,
            count,
            None,
            logits,
            sampling,
            None,
            None,
            tokens,
            count,
            None,
            path,
            length[0],
            chosen,
            None,
        ),
        "linear": lambda: ops.linear(x, weight, out=one),
        "rms_norm": lambda: ops.rms_norm(x, vector, 1e-6, out=normed),
        "embed": lambda: ops.embed(zero, weight, normed),
        "layer_norm": lambda: ops.layer_norm(x, vector, vector, 1e-6, normed),
        "activate": lambda: ops.activate(pair, one),
        "scale_add": lambda: ops.scale_add(x, 0.5, out=normed),
        "rope_append": lambda: ops.rope_append(
            q, q, q, depth, cache.kv_len, zero, count, cache.table, table, kv[0], kv[1]
        ),
        "tree_attention": lambda: ops.tree_attention(
            q, kv[0], kv[1], cache.table, empty, zero, count, ancestors, 0.25, out=attended
        ),
        "kv_commit": lambda: ops.kv_commit(cache.kv, cache.table, depth, zero, cache.kv_len),
        "tree_settle": lambda: ops.tree_settle(
            tokens, parents, count, empty, count, 1, path, chosen, below, ancestors, length[0]
        ),
        "history_append": lambda: ops.history_append(
            count, depth, path, zero, tokens, None, parents, room, below, empty, *of_one, record
        ),
        "history_tail": lambda: ops.history_tail(tokens, count, path, length[0]),
        "time_stamp": lambda: ops.time_stamp(ancestors[0, 0, :1]),
        "draft_pairs": lambda: ops.draft_pairs(
            q[0],
            path,
            zero,
            tokens,
            count,
            attended[0],
            below,
            *of_four,
            ancestors[0],
            are_kept=False,
        ),
        "prompt_lookup": lambda: ops.prompt_lookup(
            tokens, zero, zero, 1, 1, 1, 0, path, below, *of_one, record[0, :1]
        ),
        "feature_sample": lambda: ops.feature_sample(
            zero, None, one, None, one, token_fc=one, eps=1e-6, workspace=scratch, out=joined
        ),
    }


def bench_kernels(quick: bool) -> list[Row]:
    """Ours against torch, every kernel and shape."""
    rows = []
    for name, make in KERNELS.items():
        for shape in SHAPES:
            for num_rows in ROWS[:1] if quick else ROWS:
                ours, torchs = make(SHAPES[shape], num_rows)
                seconds = measure_interleaved(
                    {"ours": ours, "torch": torchs},
                    min_time=0.01 if quick else 0.2,
                    rounds=5 if quick else 50,
                )
                rows.append(_row(name, shape, num_rows, seconds["ours"], seconds["torch"]))
    return rows


def bench_calls(quick: bool) -> list[Row]:
    """What a call costs, for every op; those without an entry above show no figure."""
    calls = least_work()
    seconds = measure_interleaved(calls, min_time=0.01 if quick else 0.2, rounds=5 if quick else 50)
    names = sorted(
        name
        for name in ops.__all__
        if callable(getattr(ops, name)) and name.islower() and not name.endswith("_workspace")
    )
    return [_row(f"call: {name}", "least work", 1, seconds.get(name), None) for name in names]


def _row(name: str, shape: str, rows: int, ours: float | None, torchs: float | None) -> Row:
    return {
        "op": name,
        "shape": shape,
        "rows": rows,
        "us": None if ours is None else 1e6 * ours,
        "torch_us": None if torchs is None else 1e6 * torchs,
        "torch/ours": None if ours is None or torchs is None else ratio_to(torchs, ours),
    }


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    args = start(arguments)
    if args.device == "cuda":
        device = gpu.chosen_device(args)
        from bench import small_kernels_cuda

        small_kernels_cuda.run(args, device)
        return
    calls = bench_calls(args.quick)
    summary = {"slowest_call_us": max(row["us"] for row in calls if row["us"] is not None)}
    report("small_kernels", bench_kernels(args.quick) + calls, save=args.save, summary=summary)


if __name__ == "__main__":
    main()
