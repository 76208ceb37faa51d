"""Rows as the probes' program prints them on a GPU that is made up."""

from __future__ import annotations

from typing import Any

from bench.probes.facts import AMPERE, HOPPER

Row = dict[str, Any]
SUMS = 1048576


def sums(differ: dict[tuple[str, str], int] | None = None, *, has_wgmma: bool = True) -> list[Row]:
    """P1: a GPU of the model of sm_90, but for what differs: {(unit, against): count}."""
    counts = {("mma", AMPERE): 200000, **(differ or {})}
    pairs = [("mma", name) for name in (HOPPER, AMPERE, "permuted within 16", "permuted within 8")]
    if has_wgmma:
        pairs += [(unit, "mma") for unit in ("wgmma", "wgmma, A in registers")]
    rows = []
    for dtype in ("bf16", "f16"):
        for unit, against in pairs:
            row = {"check": "sums", "dtype": dtype, "unit": unit, "against": against, "sums": SUMS}
            count = counts.get((unit, against), 0)
            row |= {"differ": count} | ({"subnormal": count} if count else {})
            rows.append(row)
        zeros = counts.get(("mma", "zero products"), 0)
        row = {"check": "zero products", "dtype": dtype, "unit": "mma", "sums": SUMS // 8}
        rows.append(row | {"differ": zeros})
        for name, count in (("16 x 24 bits", 900), ("16 x 26 bits", 7)):
            row = {"check": "model", "dtype": dtype, "unit": "mma", "model": name, "sums": 33825}
            rows.append(row | {"differ": count})
    return rows


def placement(differ: dict[tuple[str, str, int], int] | None = None) -> list[Row]:
    """P2: equal everywhere, but for {(check, unit, n): count}."""
    rows: list[Row] = [
        {"check": "model", "model": HOPPER, "compared": 2048, "differ": 0},
        {"check": "model", "model": AMPERE, "compared": 2048, "differ": 1900},
    ]
    for unit in ("mma", "wgmma"):
        for n in (8, 64):
            for check in ("placement", "rows"):
                count = (differ or {}).get((check, unit, n), 0)
                row = {"check": check, "unit": unit, "n": n, "compared": 1000}
                rows.append(row | {"differ": count})
    return rows


def read(variant: str, layout: str, gb_s: float, **more: Any) -> Row:
    row = {"variant": variant, "layout": layout, "gb_s": gb_s, "blocks_per_sm": 1}
    return row | {"evict_first": True, "spread": 0.002, "stage_kb": 16, "stages": 6} | more


def streams(packed: float = 2800.0) -> list[Row]:
    """P3: rows at 2750 GB/s."""
    return [
        {"variant": "copy", "gb_s": 3000.0, "spread": 0.001},
        {key: value for key, value in read("ldg", "packed", 2700.0).items() if "stage" not in key},
        read("cp.async", "rows", 2600.0, segment=128, blocks_per_sm=2),
        read("tma box", "rows", 2750.0, l2_promotion=True),
        read("tma box", "rows", 2740.0, stages=3, l2_promotion=True),
        read("bulk", "packed", packed),
        read("bulk", "packed", packed * 0.99, evict_first=False),
        {"variant": "copy", "gb_s": 3100.0, "spread": 0.001},
    ]


def pieces(saved_us: float = 2.0, *, has_programmatic: bool = True) -> list[Row]:
    """P4: launches cost 3 us; programmatic ones so much less."""
    rows = []
    for piece_mb, base in ((33.5544, 12.0), (117.441, 42.0)):
        for variant, slower in (("bulk", 1.0), ("cp.async", 1.1)):
            us = {"one launch": base, "plain": base + 3, "plain, small between": base + 6}
            if has_programmatic:
                us["programmatic"] = us["plain"] - saved_us
                us["programmatic, small between"] = us["plain, small between"] - 2 * saved_us
            for mode, took in us.items():
                row = {"variant": variant, "blocks_per_sm": 1, "shared_kb": 97}
                row |= {"piece_mb": piece_mb, "mode": mode, "spread": 0.001}
                rows.append(row | {"us_per_piece": slower * took})
    return rows


def nodes(programmatic_us: float = 0.6, *, edges: int = 299) -> list[Row]:
    """P5: 1.3 us a node with plain edges."""
    rows: list[Row] = [
        {"what": "eager launch, one of many", "host_us": 2.1, "us": 2.3},
        {"what": "graph of 1 and wait", "host_us": 4.0, "us": 9.0},
    ]
    for blocks in (1, 132, 528):
        for name, us, count in (("plain", 1.3, 0), ("programmatic", programmatic_us, edges)):
            row = {"what": "node of a graph", "edges": name, "blocks": blocks}
            rows.append(row | {"us": us, "programmatic_edges": count, "spread": 0.01})
    return rows


def merges(in_cluster_us: float = 2.0) -> list[Row]:
    """P6: through the L2 cache 6 us at once, 3 and 2 in two steps."""
    rows: list[Row] = []
    for ranks, us in ((2, 2.0), (4, 3.0), (8, 6.0)):
        rows.append({"what": "L2 tickets", "ranks": ranks, "merge_us": us})
        rows.append({"what": "resident clusters", "ranks": ranks, "shared_kb": 200, "clusters": 16})
    rows.append({"what": "resident clusters", "ranks": 16, "shared_kb": 200, "error": "no"})
    rows.append({"what": "cluster", "ranks": 8, "merge_us": in_cluster_us})
    rows.append({"what": "cluster barrier", "ranks": 8, "us": 0.21})
    rows.append({"what": "reads of peers", "ranks": 8, "bytes": 58240, "us": 0.9})
    return rows


def conditional(if_us: float = 1.5, flags_us: float = 14.0) -> list[Row]:
    """P7: an IF costs so much, taken or not; 14 kernels that return at once take ``flags_us``."""
    rows: list[Row] = []
    for kernels in (1, 14):
        inline = 2.0 * kernels
        costs = {"if": (inline + if_us, if_us), "predicated": (inline, flags_us * kernels / 14)}
        for what, (taken, skipped) in costs.items():
            rows.append({"what": what, "kernels": kernels, "taken": True, "us": taken})
            rows.append({"what": what, "kernels": kernels, "taken": False, "us": skipped})
        rows.append({"what": "while", "kernels": kernels, "us": inline + 2.5})
    return rows


ALL = {
    "p1": sums(),
    "p2": placement(),
    "p3": streams(),
    "p4": pieces(),
    "p5": nodes(),
    "p6": merges(),
    "p7": conditional(),
}
