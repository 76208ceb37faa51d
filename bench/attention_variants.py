"""Layouts of ``tree_attention`` on a GPU, measured against the one in use."""

from __future__ import annotations

from collections.abc import Iterator

from bench import limits
from bench.gpu import Contender, Device
from bench.gpu_report import Measured
from bench.harness import Row
from bench.tree_attention_cuda import PAGE_SIZE, Bench, Case, Outputs
from bench.variant_table import AGAIN, IN_USE, Tabled, judged
from specrt.ops import AttentionPlan


def name_of(plan: AttentionPlan) -> str:
    """As it stands in a result."""
    return f"{plan.num_warps} warps, {plan.blocks_per_sm} blocks/SM"


def key_of(row: Row) -> tuple[int, ...]:
    """Head size, rows of a sequence and KV head, such pairs, slots of the pages."""
    model = limits.MODELS[row["model"]]
    rows = row["nodes"] * (model.num_heads // model.num_kv_heads)
    keys = -(-(row["prefix"] + row["nodes"]) // PAGE_SIZE) * PAGE_SIZE
    return model.head_dim, rows, row["batch"] * model.num_kv_heads, keys


PLANS = {
    name_of(plan): plan
    for plan in (AttentionPlan(warps, blocks) for warps in (4, 8) for blocks in (1, 2, 4))
}
CHOICES = {name: (plan.num_warps, plan.blocks_per_sm) for name, plan in PLANS.items()}
TABLED = Tabled("tree_attention", "variants", CHOICES, key_of, num_exact=1)


def cases(is_quick: bool, device: Device) -> Iterator[Case]:
    """Single sequences first, the tree of 60 nodes before others."""
    for batch in (1,) if is_quick else (1, 4, 16):
        for nodes in (60,) if is_quick else (60, 8, 1):
            for prefix in (2048,) if is_quick else (2048, 8192, 512, 32768):
                for name, model in device.models.items():
                    yield Case(name, model, batch, prefix, nodes)


def one_case(case: Case, device: Device, ceilings: limits.Ceilings, l2_bytes: int) -> Measured:
    """Microseconds of every variant; no row if there is no memory for it."""
    free = device.free_bytes() * 4 // 5
    num_sets = limits.input_sets(case.work.num_bytes, case.work.num_bytes, l2_bytes, free)
    if num_sets == 0:
        return None, {IN_USE: f"{case.work.num_bytes / 1e9:.0f} GB of {free / 1e9:.0f} GB"}
    timings = device.measure(same_bits(Bench(case, num_sets, device.place)))
    row: Row = {
        "model": case.name,
        "batch": case.batch,
        "prefix": case.prefix,
        "nodes": case.nodes,
        **judged(timings.graph).columns,
        **limits.figures(case.work, timings.graph[IN_USE], ceilings),
    }
    others = {f"{name}_us": 1e6 * s for name, s in timings.graph.items() if name != IN_USE}
    return row | others, timings.failures


def same_bits(bench: Bench) -> dict[str, Contender]:
    """The variants, when each has given the bits of the one in use.

    Raises:
        AssertionError: one has not.
    """
    made: dict[str, tuple[Contender, Outputs]] = {IN_USE: bench.ours(), AGAIN: bench.ours()}
    made |= {name: bench.ours(plan) for name, plan in PLANS.items()}
    expected = made[IN_USE][1]().clone()
    for name, (_, output) in made.items():
        bench.sets[0].out.fill_(float("nan"))  # what the one before wrote must not count
        assert output().equal(expected), f"{name}: other bits than the one in use"
    return {name: contender for name, (contender, _) in made.items()}


def once(case: Case, device: Device) -> None:
    """One launch, for a profiler."""
    Bench(case, 1, device.place).ours()[0].run()
