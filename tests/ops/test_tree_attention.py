"""``tree_attention``: a row's bits are those of decoding it alone, whatever else there is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from specrt import _C, ops
from specrt.ops import tree_attention
from tests.ops.conftest import Backend
from tests.oracles.paged import attend, lineage, make_pages, pack_bits, random_parents

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
NUM_TICKETS = 4096  # words at a workspace's beginning that are zero between launches
CPU = Backend("cpu", torch.device("cpu"))


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    isa, threads = _C.active_isa(), torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own small ops crawl on busy cores otherwise
    yield
    _C.set_isa(isa)
    torch.set_num_threads(threads)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Case:
    """One sequence: a committed prefix and a tree, its queries, keys and values."""

    prefix: int
    parents: list[int]
    q: Tensor  # [N, Hq, d]
    k: Tensor  # [prefix + N, Hkv, d], in the cache's dtype
    v: Tensor
    generator: torch.Generator
    window: int | None = None
    num_sinks: int = 0
    sliding_window: int | None = None
    cap: float | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def options(self) -> dict[str, Any]:
        names = ("window", "num_sinks", "sliding_window", "cap")
        return {name: getattr(self, name) for name in names}

    def visible(self, node: int) -> list[int]:
        path = self.path(node)
        return path[-min(self.sliding_window or len(path), len(path)) :]

    def path(self, node: int) -> list[int]:
        """What a sliding window slides over."""
        tree = [self.prefix + j for j in lineage(self.parents, node)]
        first = 0 if self.window is None else max(0, self.prefix - self.window)
        sinks = range(min(self.num_sinks, first))
        return [*sinks, *range(first, self.prefix), *tree]


def make_case(
    prefix: int,
    num_nodes: int,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    chain: bool = False,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    kv_shape = (prefix + num_nodes, heads[1], dim)
    parents = list(range(-1, num_nodes - 1)) if chain else random_parents(num_nodes, g)
    return Case(
        prefix,
        parents,
        2 * torch.randn(num_nodes, heads[0], dim, generator=g),
        torch.randn(kv_shape, generator=g).to(dtype),
        torch.randn(kv_shape, generator=g).to(dtype),
        g,
    )


def queries(case: Case, backend: Backend, dtype: torch.dtype) -> Case:
    """The case as a backend takes it: the tensor cores have queries in the cache's type."""
    if not backend.runs_cuda_source:
        return case
    if dtype == torch.float32:
        pytest.skip("the tensor cores take 16 bits")
    return replace(case, q=case.q.to(dtype))


def workspace_for(
    backend: Backend,
    q: Tensor,
    table: Tensor,
    k_cache: Tensor,
    plan: ops.AttentionPlan | None = None,
    max_seen: int | None = None,
    sliding_window: int | None = None,
) -> Tensor | None:
    """Poisoned, but for the tickets."""
    if not backend.runs_cuda_source:
        return None
    (size, nodes, heads, dim), max_len = q.shape, table.shape[1] * k_cache.shape[1]
    max_len = min(max_len, max_seen or max_len)
    sizes = size, heads, k_cache.shape[2], dim, nodes, max_len
    floats = ops.tree_attention_workspace(*sizes, backend.device, plan, sliding_window)
    workspace = torch.full((floats,), float("nan"), device=backend.device)
    workspace[:NUM_TICKETS] = 0
    return workspace


def run(
    case: Case,
    rows: slice | None = None,
    page_size: int = 16,
    num_pad: int = 0,
    backend: Backend = CPU,
    plan: ops.AttentionPlan | None = None,
) -> Tensor:
    """The tree's rows (or some of them) in one call of one sequence; ``num_pad`` idle rows.

    Pages before all windows are given back: their entries name one that is nobody's."""
    nodes = list(range(len(case.parents)))[rows or slice(None)]
    pages = make_pages(len(case.k), page_size, *case.k.shape[1:], case.k.dtype, case.generator)
    needed = torch.tensor(sorted({s for n in nodes for s in case.visible(n)}))
    pages.write(needed, case.k[needed], case.v[needed])  # all else stays NaN
    if case.sliding_window:
        spare = set(range(len(pages.k))) - set(pages.block_table.tolist())
        pages.block_table[: int(needed[0]) // page_size] = min(spare)
    total = len(nodes) + num_pad
    q = torch.full((1, total, *case.q.shape[1:]), float("nan"), dtype=case.q.dtype)
    q[0, : len(nodes)] = case.q[nodes]
    words = (len(case.parents) + 63) // 64
    bits = torch.full((1, total, words), -1, dtype=torch.int64)
    bits[0, : len(nodes)] = pack_bits([lineage(case.parents, n) for n in nodes], words)
    args = [
        q, pages.k, pages.v, pages.block_table[None], ints(case.prefix), ints(nodes[0]),
        ints(len(nodes)), bits,
    ]  # fmt: skip
    args = [tensor.to(backend.device) for tensor in args]
    out = torch.full_like(args[0], float("nan"))
    seen = case.window and case.window + case.num_sinks
    sizes = plan, seen, case.sliding_window
    workspace = workspace_for(backend, args[0], args[3], args[1], *sizes)
    tree_attention(*args, case.scale, out, workspace, plan=plan, **case.options)
    if workspace is not None:
        assert (workspace[:NUM_TICKETS].view(torch.int32) == 0).all()
    out = out.cpu()
    assert (out[0, len(nodes) :] == 0).all()
    return out[0, : len(nodes)]


def alone(case: Case, node: int, backend: Backend = CPU) -> Tensor:
    """The node decoded by itself after its ancestors were committed."""
    slots = case.path(node)
    single = replace(
        case, prefix=len(slots) - 1, parents=[-1], q=case.q[[node]], k=case.k[slots],
        v=case.v[slots], window=None,
    )  # fmt: skip
    return run(single, page_size=7, backend=backend)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 61, 64, 190, 250, 520])
def test_a_node_in_a_tree_has_the_bits_of_decoding_it_alone(
    backend: Backend, prefix: int, dtype: torch.dtype
) -> None:
    case = queries(make_case(prefix, 41, dtype=dtype, seed=prefix), backend, dtype)
    out = run(case, backend=backend)
    for node in range(0, 41, 5 if backend.name == "simt" else 1):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("prefix", [50, 200])
def test_a_chain_of_128_crosses_leaves_inside_the_tree(backend: Backend, prefix: int) -> None:
    dtype = torch.bfloat16
    case = queries(make_case(prefix, 128, chain=True, dtype=dtype), backend, dtype)
    out = run(case, backend=backend)
    for node in (0, 13, 14, 55, 56, 63, 64, 77, 78, 127):
        assert torch.equal(out[node], alone(case, node, backend)), node


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (20, 1)])
def test_what_later_rows_of_a_chain_hold_reaches_no_earlier_one(
    heads: tuple[int, int],
) -> None:
    case = make_case(50, 40, heads, chain=True)
    k, v = case.k.clone(), case.v.clone()
    k[50 + 21], v[50 + 21] = float("inf"), float("nan")
    out = run(replace(case, k=k, v=v))
    assert torch.equal(out[:21], run(case)[:21])
    assert out[21:].isnan().all()


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (7, 1), (40, 2)])
def test_error_within_twice_torchs(dim: int, heads: tuple[int, int]) -> None:
    case = make_case(131, 9, heads, dim)
    out = run(case)
    for node in range(9):
        slots = case.visible(node)
        args = case.q[node], case.k[slots], case.v[slots], case.scale
        exact = attend(*args, torch.float64)
        theirs = (attend(*args, torch.float32) - exact).abs().max()
        assert (out[node] - exact).abs().max() <= 2 * theirs + 1e-6


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (7, 1), (40, 2)])
def test_error_within_twice_torchs_in_16_bits(
    backend: Backend, heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    case = make_case(291, 9, heads, dim, dtype)
    case = replace(case, q=case.q.to(dtype))
    out = run(case, backend=backend)
    for node in (0, 8):
        slots = case.visible(node)
        args = case.q[node], case.k[slots], case.v[slots], case.scale
        exact = attend(*args, torch.float64)
        theirs = (attend(*args, dtype) - exact).abs().max()
        assert (out[node] - exact).abs().max() <= 2 * theirs


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_queries_are_read_exactly_and_outputs_rounded_once(dtype: torch.dtype) -> None:
    case = make_case(70, 5, dtype=dtype)
    case = replace(case, q=case.q.to(dtype))
    assert torch.equal(run(case), run(replace(case, q=case.q.float())).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_reads_half_precision_caches_exactly(dtype: torch.dtype) -> None:
    case = make_case(70, 5, dtype=dtype)
    wide = Case(70, case.parents, case.q, case.k.float(), case.v.float(), case.generator)
    assert torch.equal(run(case), run(wide))


def test_bits_do_not_depend_on_pages_rows_isa_or_threads() -> None:
    case = make_case(100, 37, (6, 2), 80)
    expected = run(case)
    for page_size in (1, 3, 64, 256):
        assert torch.equal(run(case, page_size=page_size), expected)
    assert torch.equal(run(case, num_pad=27), expected)
    for rows in (slice(0, 1), slice(5, 6), slice(11, 30)):  # first_node > 0
        assert torch.equal(run(case, rows), expected[rows])
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(run(case), expected)
    for isa in _C.build_info()["cpu_isas"]:
        _C.set_isa(isa)
        assert torch.equal(run(case), expected), isa


@pytest.mark.tensor_cores("sm_90")
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (20, 1)])
def test_bits_do_not_depend_on_pages_rows_or_padding(
    backend: Backend, heads: tuple[int, int]
) -> None:
    case = queries(make_case(291, 37, heads, 80, torch.bfloat16), backend, torch.bfloat16)
    expected = run(case, backend=backend)
    for page_size in (3, 64):
        assert torch.equal(run(case, page_size=page_size, backend=backend), expected)
    assert torch.equal(run(case, num_pad=91, backend=backend), expected)
    for rows in (slice(0, 1), slice(5, 6), slice(11, 30)):  # first_node > 0
        assert torch.equal(run(case, rows, backend=backend), expected[rows])


def simt() -> object:
    """The shim's settings; the fixture puts them back for the next test."""
    return importlib.import_module("tests.simt._simt")


@pytest.mark.parametrize("num_nodes", [1, 60])
def test_bits_do_not_depend_on_the_gpu(backend: Backend, num_nodes: int) -> None:
    """Nor on how many leaves a block takes, where it keeps them, or who comes last."""
    if backend.name != "simt":
        pytest.skip("a GPU cannot be changed")
    case = queries(make_case(1990, num_nodes, dtype=torch.bfloat16), backend, torch.bfloat16)
    expected = run(case, backend=backend)
    devices = [(1, 232448), (1, 92160), (5, 166912), (6, 98304), (10, 98304), (64, 232448)]
    for seed, (num_sms, shared) in enumerate(devices):
        simt().set_schedule(seed)  # type: ignore[attr-defined]
        simt().set_device(num_sms, shared)  # type: ignore[attr-defined]
        assert torch.equal(run(case, backend=backend), expected), num_sms


def batch_arguments(
    cases: list[Case], backend: Backend = CPU, first_node: tuple[int, ...] | None = None
) -> dict[str, Tensor | float | None]:
    """Ragged sequences in one cache, with q a strided view of a fused projection.

    With ``first_node`` the call is of each tree's nodes from there on; those before are in the
    cache.
    """
    most = max(len(c.parents) for c in cases)
    heads, dim = cases[0].q.shape[1:]
    dtype = cases[0].q.dtype
    fused = torch.full((len(cases), most, heads + 3, dim), float("nan"), dtype=dtype)
    q = fused[:, :, 1 : heads + 1]
    bits = torch.zeros(len(cases), most, 2, dtype=torch.int64)
    k, v, tables, start = [], [], [], 0
    width = max(-(-len(c.k) // 16) for c in cases)
    for b, case in enumerate(cases):
        n = len(case.parents)
        q[b, :n] = case.q
        bits[b, :n] = pack_bits([lineage(case.parents, i) for i in range(n)], 2)
        pages = make_pages(len(case.k), 16, *case.k.shape[1:], case.k.dtype, case.generator)
        pages.write(torch.arange(len(case.k)), case.k, case.v)
        table = torch.full((width,), 2**30, dtype=torch.int32)
        table[: len(pages.block_table)] = pages.block_table + start
        start += len(pages.k)
        k.append(pages.k), v.append(pages.v), tables.append(table)
    keys, table = torch.cat(k), torch.stack(tables)
    args: dict[str, Tensor | float | None] = {
        "q": q,
        "k_cache": keys,
        "v_cache": torch.cat(v),
        "block_table": table,
        "kv_len": ints(*(c.prefix for c in cases)),
        "first_node": ints(*(0 for _ in cases)),
        "num_nodes": ints(*(len(c.parents) for c in cases)),
        "ancestors": bits,
        "scale": cases[0].scale,
        "out": torch.full(q.shape, float("nan"), dtype=dtype),
    }
    if backend.name == "cuda":
        fused = fused.to(backend.device)  # q stays a strided view
        args = {n: a.to(backend.device) if isinstance(a, Tensor) else a for n, a in args.items()}
        args["q"] = fused[:, :, 1 : heads + 1]
    if first_node is not None:
        args |= later_rows(args, first_node)
    args["workspace"] = workspace_for(backend, args["q"], table, keys)
    return args


def later_rows(args: dict[str, Any], first_node: tuple[int, ...]) -> dict[str, Tensor]:
    first = ints(*first_node).to(args["q"].device)
    rows = args["q"].shape[1] - max(first_node)
    pieces = {
        name: torch.stack([t[i : i + rows] for t, i in zip(args[name], first_node, strict=True)])
        for name in ("q", "ancestors", "out")
    }
    return pieces | {"first_node": first, "num_nodes": args["num_nodes"] - first}


@pytest.mark.tensor_cores("sm_80", "sm_90")
@pytest.mark.parametrize("first_node", [(0, 0, 0), (3, 5, 0)], ids=str)
def test_a_ragged_batch_gives_each_sequence_its_own_bits(
    backend: Backend, first_node: tuple[int, ...]
) -> None:
    sizes = ((0, first_node[0] + 1), (63, 65), (300, 17))
    cases = [make_case(p, n, seed=p, dtype=torch.bfloat16) for p, n in sizes]
    cases = [queries(case, backend, torch.bfloat16) for case in cases]
    out = tree_attention(**batch_arguments(cases, backend, first_node)).cpu()  # type: ignore[arg-type]
    for b, (case, first) in enumerate(zip(cases, first_node, strict=True)):
        rows = len(case.parents) - first
        assert torch.equal(out[b, :rows], run(case, backend=backend)[first:])
        assert (out[b, rows:] == 0).all()


def test_counts_are_read_when_it_runs() -> None:
    args = batch_arguments([make_case(40, 8)])
    graph = _C.CpuGraph()
    graph.begin()
    tree_attention(**args)  # type: ignore[arg-type]
    graph.end()
    args["kv_len"][0], args["num_nodes"][0] = 20, 3  # type: ignore[index]
    args["out"].fill_(float("nan"))  # type: ignore[union-attr]
    graph.replay()
    replayed = args["out"].clone()  # type: ignore[union-attr]
    assert torch.equal(replayed, tree_attention(**args))  # type: ignore[arg-type]
    assert (replayed[0, 3:] == 0).all()


@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_nan_stays_in_the_rows_that_see_it(backend: Backend, what: str) -> None:
    case = queries(make_case(70, 12, dtype=torch.bfloat16), backend, torch.bfloat16)
    expected = run(case, backend=backend)
    getattr(case, what)[5 if what == "q" else 75] = float("nan")  # of node 5
    out = run(case, backend=backend)
    sees = [i for i in range(12) if i == 5 or (what != "q" and 5 in lineage(case.parents, i))]
    assert out[sees].isnan().all()
    keep = [i for i in range(12) if i not in sees]
    assert keep and torch.equal(out[keep], expected[keep])


def test_a_row_that_sees_nothing_is_zero(backend: Backend) -> None:
    case = queries(make_case(0, 3, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    args["ancestors"][0, 1] = 0  # type: ignore[index]
    out = tree_attention(**args)  # type: ignore[arg-type]
    assert (out[0, 1] == 0).all() and (out[0, [0, 2]] != 0).all()


def test_stray_bits_above_a_node_show_nothing(backend: Backend) -> None:
    case = queries(make_case(20, 70, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    expected = tree_attention(**args).clone()  # type: ignore[arg-type]
    for node in range(70):
        stray = [*lineage(case.parents, node), *range(node + 1, 128)]
        args["ancestors"][0, node] = pack_bits([stray], 2)[0]  # type: ignore[index]
    assert torch.equal(tree_attention(**args), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 8), (1, 0)])
def test_no_sequences_or_no_rows_are_nothing_to_do(
    backend: Backend, shape: tuple[int, int]
) -> None:
    case = queries(make_case(24, 8, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    batch, rows = (slice(0, size) for size in shape)
    for name in ("q", "out", "ancestors"):
        args[name] = args[name][batch, rows]  # type: ignore[index]
    for name in ("block_table", "kv_len", "first_node", "num_nodes"):
        args[name] = args[name][batch]  # type: ignore[index]
    assert tree_attention(**args).shape[:2] == shape  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_strides_of_one_sequence_may_be_anything(backend: Backend, heads: tuple[int, int]) -> None:
    case = queries(make_case(24, 8, heads, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    expected = tree_attention(**args).clone()  # type: ignore[arg-type]
    for name in ("q", "out"):
        tensor = args[name]
        assert isinstance(tensor, Tensor)
        args[name] = tensor.as_strided(tensor.shape, (1, *tensor.stride()[1:]))
    assert torch.equal(tree_attention(**args), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kv_len", "first_node", "num_nodes"),
    [(24, 100, 70), (24, 2**31 - 1, 70), (24, -5, 70), (24, 0, 1000), (2**31 - 1, 0, 70)],
)
def test_counts_that_cannot_be_touch_no_other_memory(
    backend: Backend, kv_len: int, first_node: int, num_nodes: int
) -> None:
    """The shim's memory is guarded; the next launch must come out as before."""
    case = queries(make_case(24, 70, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    expected = tree_attention(**args).clone()  # type: ignore[arg-type]
    wrong = dict(args, out=torch.empty_like(expected))
    for name, value in (("kv_len", kv_len), ("first_node", first_node), ("num_nodes", num_nodes)):
        wrong[name] = ints(value).to(backend.device)
    tree_attention(**wrong)  # type: ignore[arg-type]
    if backend.runs_cuda_source:
        assert (args["workspace"][:NUM_TICKETS] == 0).all()  # type: ignore[index]
    assert torch.equal(tree_attention(**args), expected)  # type: ignore[arg-type]


@pytest.mark.tensor_cores("sm_90")
@pytest.mark.parametrize("prefix", [240, 256])
def test_rows_past_the_pages_disturb_no_others(backend: Backend, prefix: int) -> None:
    """At the context's limit a tree's last nodes have no slots, and never count."""
    case = queries(make_case(prefix, 40, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    expected = tree_attention(**args).clone()  # type: ignore[arg-type]
    args["block_table"] = args["block_table"][:, :16].contiguous()  # type: ignore[index]
    args["workspace"] = workspace_for(backend, args["q"], args["block_table"], args["k_cache"])  # type: ignore[arg-type]
    out = tree_attention(**args)  # type: ignore[arg-type]
    assert torch.equal(out[0, : 256 - prefix], expected[0, : 256 - prefix])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(1, 8, 4, 40)),
        ("q", torch.zeros(1, 8, 4, 64, dtype=torch.float64)),
        ("q", torch.zeros(1, 8, 3, 64)),
        ("k_cache", torch.zeros(4, 16, 2, 32)),
        ("k_cache", torch.zeros(4, 2, 16, 64).transpose(1, 2)),
        ("v_cache", torch.zeros(4, 16, 2, 64, dtype=torch.bfloat16)),
        ("block_table", torch.zeros(2, 3, dtype=torch.int32)),
        ("block_table", torch.zeros(1, 0, dtype=torch.int32)),
        ("kv_len", torch.zeros(1, dtype=torch.int64)),
        ("first_node", torch.zeros(2, dtype=torch.int32)),
        ("num_nodes", torch.zeros(1, 1, dtype=torch.int32)),
        ("ancestors", torch.zeros(1, 8, 3, dtype=torch.int64)),
        ("ancestors", torch.zeros(1, 8, 0, dtype=torch.int64)),
        ("ancestors", torch.zeros(1, 7, 1, dtype=torch.int64)),
        ("out", torch.zeros(1, 8, 4, 32)),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Tensor) -> None:
    args = batch_arguments([make_case(24, 8)])
    args[name] = value
    with pytest.raises(ValueError, match=f"^{name}:"):
        tree_attention(**args)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda q: q.float()),
        ("q", lambda q: q.new_zeros(*q.shape[:3], 65)[..., 1:]),
        ("out", lambda out: out.new_zeros(*out.shape[:3], 65)[..., :64]),
        ("block_table", lambda table: table[:, :0]),
        ("workspace", lambda workspace: workspace[:-1]),
        ("workspace", lambda workspace: None),
    ],
)
def test_what_a_gpu_asks_beyond_the_cpu_is_named(
    backend: Backend, name: str, change: Callable[[Tensor], Tensor | None]
) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("of the GPU's kernel")
    case = queries(make_case(600, 8, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    args[name] = change(args[name])  # type: ignore[arg-type]
    if name == "q" and args["q"].dtype == torch.float32:  # type: ignore[union-attr]
        args["out"] = torch.zeros_like(args["q"])  # type: ignore[arg-type]
    kernel = simt() if backend.name == "simt" else _C
    with pytest.raises(ValueError, match=f"^{name}:"):
        kernel.tree_attention(*args.values(), *[None] * 4, 0, 0, 0, 0, None, 0, 0.0)  # type: ignore[attr-defined]


def test_more_rows_than_a_tree_has_are_refused(backend: Backend) -> None:
    if not backend.runs_cuda_source:
        pytest.skip("the CPU takes any number of rows")
    case = queries(make_case(24, 8, dtype=torch.bfloat16), backend, torch.bfloat16)
    args = batch_arguments([case], backend)
    for name in ("q", "out", "ancestors"):
        tensor = args[name]
        assert isinstance(tensor, Tensor)
        args[name] = tensor.new_zeros(1, 129, *tensor.shape[2:])
    with pytest.raises(ValueError, match=r"^q: expected at most 128 nodes"):
        tree_attention(**args)  # type: ignore[arg-type]


def test_compiles() -> None:
    args = batch_arguments([make_case(24, 8)])
    expected = tree_attention(**args).clone()  # type: ignore[arg-type]
    args["out"] = torch.full_like(expected, float("nan"))
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**args), expected)
