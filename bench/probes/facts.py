"""From a probe's rows to one line: the fact, and the choice that follows from it.

Rules are functions of rows alone. A row that a rule needs and does not find is :class:`Missing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.probes.run import Row

Rule = Callable[[Sequence[Row]], str]
HOPPER, AMPERE = "16 x 25 bits", "8 x 24 bits"
_MODELS = {
    HOPPER: "one fused sum of 16, 25 bits",
    AMPERE: "two fused sums of 8, 24 bits",
}
_DTYPES = ("bf16", "f16")
_GROUPS_OF_SUMS = frozenset(
    {"normal", "wide", "cancellation", "tiny c", "large c", "subnormal", "zero products"}
)
_PACKING_PAYS = 0.03
_OVERLAP_PAYS = 0.01
_ENOUGH = 0.98
"""Of the best rate: with so much a cheaper variant is as good."""
_FEWER_US = 0.5
"""By so much a merge has to be shorter to be worth another mechanism."""
_IF_US = 3.0
"""A conditional node may cost so much."""
_NODES_OF_A_ROUND = 314


class Missing(Exception):
    """What a rule needs was not measured."""


def find(rows: Sequence[Row], **where: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def one(rows: Sequence[Row], **where: Any) -> Row:
    """The last of them.

    Raises:
        Missing: there is none.
    """
    found = find(rows, **where)
    if not found:
        raise Missing(", ".join(f"{key} {value}" for key, value in where.items()))
    return found[-1]


def line(name: str, rows: Sequence[Row], failure: str) -> str:
    """A probe's line, whatever its rows are: never raises.

    Args:
        name: of the probe.
        rows: what it printed.
        failure: why it did not come to its end; empty if it did.
    """
    try:
        said = RULES[name](rows)
    except Missing as missing:
        said = f"no answer: not measured: {missing}"
    except Exception as error:  # of rows that a broken program printed
        said = f"no answer: rows are not what was expected ({type(error).__name__}: {error})"
    if failure and not rows:
        said = "no answer"
    return f"{name.upper()}: " + (f"FAILED, {failure}; until then: {said}" if failure else said)


# --- P1 and P2: sums --------------------------------------------------------------------------


def _sums(rows: Sequence[Row]) -> str:
    parts, is_equal = [], True
    for dtype in _DTYPES:
        found = find(rows, dtype=dtype)
        parts.append(f"{dtype}: mma.sync = {_model(found)}, {_side_facts(found)}")
    wgmma = [row for row in find(rows, check="sums", against="mma") if row["unit"] != "mma"]
    for row in wgmma:
        if row["differ"]:
            is_equal = False
            parts.append(f"{row['unit']} differs from it ({row['dtype']}: {_count(row)})")
    if not wgmma:
        return "; ".join(parts) + " -> no wgmma here: variants of mma.sync alone"
    if is_equal:
        parts.append(f"wgmma equal to it in all ({len(wgmma)} comparisons)")
        return "; ".join(parts) + " -> all unsplit variants have equal bits: pick by speed"
    return "; ".join(parts) + " -> variants must not be mixed within an op"


def _model(rows: Sequence[Row]) -> str:
    against = {name: one(rows, check="sums", unit="mma", against=name) for name in _MODELS}
    for name, row in against.items():
        if row["differ"] == 0:
            return f"{_MODELS[name]} ({row['sums']} of {row['sums']})"
    best = min(against, key=lambda name: against[name]["differ"])
    said = f"none of the models; {_MODELS[best]} differs in {_count(against[best])}"
    tried = find(rows, check="model")
    if tried:
        nearest = min(tried, key=lambda row: row["differ"])
        said += f"; nearest of a sample: {nearest['model']}, {nearest['differ']} differ"
    return said


def _count(row: Row) -> str:
    """How many differ, and in which kinds of sums."""
    kinds = [f"{key} {row[key]}" for key in row if key in _GROUPS_OF_SUMS]
    return f"{row['differ']} of {row['sums']}" + (f": {', '.join(kinds)}" if kinds else "")


def _side_facts(rows: Sequence[Row]) -> str:
    order = one(rows, check="sums", unit="mma", against="permuted within 16")["differ"]
    zeros = sum(row["differ"] for row in find(rows, check="zero products"))
    return (
        ("order within 16 never shows" if order == 0 else f"order within 16 shows in {order}")
        + ", "
        + ("zero products change nothing" if zeros == 0 else f"zero products change {zeros}")
    )


def _placement(rows: Sequence[Row]) -> str:
    places = [row for row in rows if row.get("check") in ("placement", "rows", "operands swapped")]
    if not places:
        raise Missing("a comparison of places")
    units = list(dict.fromkeys(row["unit"] for row in places))
    compared = sum(row["compared"] for row in places)
    bad = [row for row in places if row["differ"]]
    chains = [_MODELS[row["model"]] for row in find(rows, check="model", differ=0)]
    chain = f"; over K = 4096 a chain of {chains[0]}" if chains else "; no model of the chain holds"
    if not bad:
        fact = f"equal bits at every place, {' and '.join(units)}, {compared} comparisons{chain}"
        return fact + " -> rows are invariant: the tile may follow the number of rows"
    named = ", ".join(f"{row['check']} {row['unit']} n {row['n']}: {row['differ']}" for row in bad)
    return f"bits differ: {named}{chain} -> one tile and one instruction for all numbers of rows"


# --- P3 and P4: reading -----------------------------------------------------------------------


def _streams(rows: Sequence[Row]) -> str:
    copies = [row["gb_s"] for row in find(rows, variant="copy")]
    if not copies:
        raise Missing("variant copy")
    copy = sum(copies) / len(copies)
    reads = [row for row in rows if row.get("layout") in ("rows", "packed") and "gb_s" in row]
    best = _fastest(reads, "any read")
    tiled = [row for row in reads if row["variant"] != "ldg"]
    in_rows = _fastest([row for row in tiled if row["layout"] == "rows"], "reads of rows")
    packed = _fastest([row for row in tiled if row["layout"] == "packed"], "reads of packed tiles")
    gain = packed["gb_s"] / in_rows["gb_s"] - 1
    pays = gain > max(_PACKING_PAYS, _noise(packed, in_rows))
    chosen = _cheapest(tiled, packed if pays else in_rows)
    fact = (
        f"copy {copy:.0f} GB/s; read ceiling {best['gb_s']:.0f} ({best['gb_s'] / copy:.0%} of it)"
    )
    fact += f" by {_way(best)}; rows {in_rows['gb_s']:.0f} by {_way(in_rows)}"
    fact += f"; packed {packed['gb_s']:.0f} by {_way(packed)}; evict-first {_hint(tiled)}"
    choice = "pack" if pays else "rows stay"
    choice += f": packing {gain:+.1%}, noise {_noise(packed, in_rows):.1%}"
    return f"{fact} -> {choice}; stages as {_way(chosen)}: {_in_flight(chosen)} KB in flight an SM"


def _noise(*rows: Row) -> float:
    """A share below which a difference between two rows is none."""
    return 2 * sum(float(row["spread"]) for row in rows)


def _fastest(rows: Sequence[Row], what: str) -> Row:
    if not rows:
        raise Missing(what)
    return max(rows, key=lambda row: row["gb_s"])


def _cheapest(rows: Sequence[Row], best: Row) -> Row:
    """The least in flight that is as good as the best of its layout."""
    same = [row for row in rows if row["layout"] == best["layout"] and row["evict_first"]]
    good = [row for row in same if row["gb_s"] >= _ENOUGH * best["gb_s"]]
    return min(good or [best], key=lambda row: (_in_flight(row), -row["gb_s"]))


def _in_flight(row: Row) -> int:
    return int(row["stage_kb"] * row["stages"] * row["blocks_per_sm"])


def _way(row: Row) -> str:
    stages = f", {row['stages']} x {row['stage_kb']} KB" if "stages" in row else ""
    segment = f" of {row['segment']} B" if row["layout"] == "rows" and "segment" in row else ""
    return f"{row['variant']}{segment} ({row['blocks_per_sm']} an SM{stages})"


def _hint(rows: Sequence[Row]) -> str:
    """What the hint changes where both were measured, at the most and at the least."""
    changes = [with_hint / without - 1 for with_hint, without in _pairs(rows)]
    return f"{min(changes):+.1%} to {max(changes):+.1%}" if changes else "not compared"


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[float, float]]:
    without = {_key(row): row["gb_s"] for row in rows if not row["evict_first"]}
    for row in rows:
        if row["evict_first"] and _key(row) in without:
            yield row["gb_s"], without[_key(row)]


def _key(row: Row) -> tuple[Any, ...]:
    names = ("variant", "layout", "segment", "stage_kb", "stages", "blocks_per_sm", "l2_promotion")
    return tuple(row.get(name) for name in names)


def _pieces(rows: Sequence[Row]) -> str:
    sizes = sorted({row["piece_mb"] for row in rows if "piece_mb" in row})
    if not sizes:
        raise Missing("any piece")
    parts, saved = [], []
    for size in sizes:
        reader = _best_reader(find(rows, piece_mb=size))
        gains, said = _overheads(reader)
        saved += gains
        parts.append(f"{size:.0f} MB by {_reader_name(reader[0])}: {said}")
    fact = "; ".join(parts)
    if not saved:
        return f"{fact} -> no programmatic launches here"
    worth = max(saved) > _OVERLAP_PAYS
    how = "let launches overlap and fetch weights ahead" if worth else "plain launches will do"
    return f"{fact} -> {how}: {max(saved):+.1%} of a matrix at the most"


def _best_reader(rows: Sequence[Row]) -> list[Row]:
    """The rows of the way of reading that is the fastest in its fastest mode."""
    fastest = min((row for row in rows if row["mode"] != "one launch"), key=_us, default=None)
    if fastest is None:
        raise Missing("pieces")
    keys = ("variant", "blocks_per_sm", "shared_kb")
    return find(rows, **{key: fastest[key] for key in keys})


def _us(row: Row) -> float:
    # A norm between makes a mode longer, so it is never the fastest.
    return float(row["us_per_piece"])


def _overheads(rows: Sequence[Row]) -> tuple[list[float], str]:
    """Shares of a piece that programmatic edges save, beyond noise, and what launches cost."""
    base = one(rows, mode="one launch")["us_per_piece"]
    gains, said = [], [f"{base:.1f} us in one launch"]
    for mode in ("plain", "plain, small between"):
        plain = one(rows, mode=mode)["us_per_piece"]
        text = f"{mode} {plain - base:+.1f}"
        overlapped = find(rows, mode=mode.replace("plain", "programmatic"))
        if overlapped:
            programmatic = overlapped[-1]["us_per_piece"]
            gain = (plain - programmatic) / plain
            is_noise = abs(gain) <= _noise(one(rows, mode=mode), overlapped[-1])
            gains.append(0.0 if is_noise else gain)
            text += f", programmatic {programmatic - base:+.1f}"
        said.append(text)
    return gains, "; ".join(said)


def _reader_name(row: Row) -> str:
    return f"{row['variant']} ({row['blocks_per_sm']} an SM, {row['shared_kb']} KB)"


# --- P5 to P7: launches -----------------------------------------------------------------------


def _nodes(rows: Sequence[Row]) -> str:
    nodes = find(rows, what="node of a graph")
    plain = _middle(find(nodes, edges="plain"), "plain edges")
    eager = one(rows, what="eager launch, one of many")
    graph = one(rows, what="graph of 1 and wait")
    fact = f"a node {plain['us']:.2f} us with plain edges"
    host = f"; an eager launch {eager['host_us']:.1f} us of the host"
    host += f"; a graph and wait {graph['us']:.1f}"
    of_round = plain["us"] * _NODES_OF_A_ROUND / 1e3
    overlapped = find(nodes, edges="programmatic")
    if not overlapped:
        return f"{fact}{host} -> {_NODES_OF_A_ROUND} nodes of a round: {of_round:.2f} ms"
    programmatic = _middle(overlapped, "programmatic edges")
    if programmatic["programmatic_edges"] == 0:
        return f"{fact}{host}; edges were not recorded as programmatic -> plain edges"
    saved = of_round - programmatic["us"] * _NODES_OF_A_ROUND / 1e3
    fact += f", {programmatic['us']:.2f} with programmatic ones{host}"
    choice = "programmatic edges" if saved > 0.1 * of_round else "plain edges"
    return (
        f"{fact} -> {choice}: they save {saved:.2f} of {of_round:.2f} ms of "
        f"{_NODES_OF_A_ROUND} nodes of a round"
    )


def _middle(rows: Sequence[Row], what: str) -> Row:
    """Of the numbers of blocks the middle one: one an SM."""
    if not rows:
        raise Missing(what)
    return sorted(rows, key=lambda row: row["blocks"])[len(rows) // 2]


def _merges(rows: Sequence[Row]) -> str:
    tickets = {ranks: one(rows, what="L2 tickets", ranks=ranks)["merge_us"] for ranks in (2, 4, 8)}
    in_l2 = min(tickets[8], tickets[4] + tickets[2])
    fact = f"66 KB states of 8 through the L2 cache: {tickets[8]:.1f} us at once"
    fact += f", {tickets[4] + tickets[2]:.1f} by 4 and 2"
    if not find(rows, what="cluster"):
        return f"{fact} -> no clusters here: tickets"
    merge = one(rows, what="cluster", ranks=8)
    barrier = one(rows, what="cluster barrier", ranks=8)
    peers = one(rows, what="reads of peers")
    fact += f"; in a cluster of 8: {merge['merge_us']:.1f} (a barrier {barrier['us']:.2f}"
    fact += f", {peers['bytes'] / 1000:.0f} KB of peers {peers['us']:.1f}); {_resident(rows)}"
    saved = in_l2 - merge["merge_us"]
    if saved > _FEWER_US:
        return f"{fact} -> merge in clusters: {saved:.1f} us less"
    return f"{fact} -> tickets stay: a cluster saves {saved:.1f} us"


def _resident(rows: Sequence[Row]) -> str:
    found = find(rows, what="resident clusters", shared_kb=200)
    counts = [f"{row['clusters']} of {row['ranks']}" for row in found if "clusters" in row]
    return "resident with 200 KB: " + (", ".join(counts) or "none")


def _conditional(rows: Sequence[Row]) -> str:
    if unsupported := find(rows, what="unsupported"):
        return f"driver {unsupported[0].get('driver')} has no conditional nodes -> predication"
    cost, skipped = {}, {}
    for kernels in (1, 14):
        taken, passed = ({"kernels": kernels, "taken": taken} for taken in (True, False))
        extra = one(rows, what="if", **taken)["us"] - one(rows, what="predicated", **taken)["us"]
        skip = one(rows, what="if", **passed)["us"]
        skipped[kernels] = (skip, one(rows, what="predicated", **passed)["us"])
        cost[kernels] = max(extra, skip)
    loop = one(rows, what="while", kernels=14)["us"]
    inline = one(rows, what="predicated", kernels=14, taken=True)["us"]
    fact = f"an IF costs {cost[14]:.1f} us; skipping 14 kernels {skipped[14][0]:.1f} us by it"
    fact += (
        f", {skipped[14][1]:.1f} by flags; skipping one {skipped[1][0]:.1f}, {skipped[1][1]:.1f}"
    )
    fact += f"; a round of a WHILE {loop - inline:+.1f} us over its 14 kernels"
    if cost[14] < _IF_US and skipped[14][0] < skipped[14][1]:
        return f"{fact} -> IF nodes around a level's kernels"
    return f"{fact} -> predication: kernels read a flag"


RULES: Mapping[str, Rule] = {
    "p1": _sums,
    "p2": _placement,
    "p3": _streams,
    "p4": _pieces,
    "p5": _nodes,
    "p6": _merges,
    "p7": _conditional,
}
