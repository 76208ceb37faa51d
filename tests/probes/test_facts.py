"""The rules that turn a probe's rows into a fact and a choice, on made-up rows."""

from __future__ import annotations

from typing import Any

import pytest

from bench.probes import facts
from bench.probes.catalogue import PROBES
from tests.probes import measured


def fact(name: str, rows: list[dict[str, Any]]) -> str:
    return facts.line(name, rows, "")


def test_every_probe_has_a_rule() -> None:
    assert [probe.name for probe in PROBES] == list(facts.RULES) == list(measured.ALL)


@pytest.mark.parametrize("name", facts.RULES)
def test_each_ends_in_a_fact_and_a_choice(name: str) -> None:
    said = fact(name, measured.ALL[name])
    assert said.startswith(f"{name.upper()}: ") and said.count(" -> ") == 1
    assert "no answer" not in said and "\n" not in said


# --- P1 and P2 --------------------------------------------------------------------------------


def test_sums_as_hopper_is_modelled() -> None:
    said = fact("p1", measured.sums())
    assert "bf16: mma.sync = one fused sum of 16, 25 bits (1048576 of 1048576)" in said
    assert "order within 16 never shows, zero products change nothing" in said
    assert said.endswith("-> all unsplit variants have equal bits: pick by speed")


def test_sums_as_ampere_is_modelled() -> None:
    differ = {("mma", facts.HOPPER): 5, ("mma", facts.AMPERE): 0, ("mma", "permuted within 16"): 9}
    said = fact("p1", measured.sums(differ, has_wgmma=False))
    assert "two fused sums of 8, 24 bits" in said and "order within 16 shows in 9" in said
    assert said.endswith("-> no wgmma here: variants of mma.sync alone")


def test_wgmma_that_differs_must_not_be_mixed() -> None:
    said = fact("p1", measured.sums({("wgmma", "mma"): 3}))
    assert "wgmma differs from it (bf16: 3 of 1048576: subnormal 3)" in said
    assert said.endswith("-> variants must not be mixed within an op")


def test_sums_of_no_model() -> None:
    said = fact("p1", measured.sums({("mma", facts.HOPPER): 11, ("mma", "zero products"): 2}))
    assert "none of the models; one fused sum of 16, 25 bits differs in 11 of 1048576" in said
    assert (
        "nearest of a sample: 16 x 26 bits, 7 differ" in said and "zero products change 2" in said
    )


def test_places() -> None:
    said = fact("p2", measured.placement())
    assert "equal bits at every place, mma and wgmma, 8000 comparisons" in said
    assert "a chain of one fused sum of 16, 25 bits" in said and "rows are invariant" in said
    said = fact("p2", measured.placement({("rows", "wgmma", 64): 4}))
    assert "bits differ: rows wgmma n 64: 4" in said and "one tile and one instruction" in said


# --- P3 and P4 --------------------------------------------------------------------------------


def test_packing_must_pay() -> None:
    said = fact("p3", measured.streams(packed=2800))
    assert "copy 3050 GB/s; read ceiling 2800 (92% of it) by bulk" in said
    assert "evict-first +1.0% to +1.0%" in said
    # As good as with twice the memory: 3 stages are enough.
    assert "rows stay: packing +1.8%" in said and "3 x 16 KB): 48 KB in flight an SM" in said
    assert "pack: packing +9.1%" in fact("p3", measured.streams(packed=3000))


def test_a_gain_within_the_spread_is_none() -> None:
    rows = [row | {"spread": 0.03} for row in measured.streams(packed=3000)]
    assert "rows stay: packing +9.1%, noise 12.0%" in fact("p3", rows)
    rows = [row | {"spread": 0.1} for row in measured.pieces()]
    assert "plain launches will do: +0.0%" in fact("p4", rows)


def test_pieces() -> None:
    said = fact("p4", measured.pieces(saved_us=2))
    assert (
        "34 MB by bulk (1 an SM, 97 KB): 12.0 us in one launch; plain +3.0, programmatic +1.0"
        in said
    )
    assert "let launches overlap and fetch weights ahead: +22.2% of a matrix" in said
    assert "plain launches will do" in fact("p4", measured.pieces(saved_us=0.01))
    said = fact("p4", measured.pieces(has_programmatic=False))
    assert said.endswith("-> no programmatic launches here")


# --- P5 to P7 ---------------------------------------------------------------------------------


def test_nodes() -> None:
    said = fact("p5", measured.nodes(0.6))
    assert "a node 1.30 us with plain edges, 0.60 with programmatic ones" in said
    assert "-> programmatic edges: they save 0.22 of 0.41 ms of 314 nodes" in said
    assert "-> plain edges: they save 0.00" in fact("p5", measured.nodes(1.29))
    assert "not recorded as programmatic -> plain edges" in fact("p5", measured.nodes(edges=0))
    plain = [row for row in measured.nodes() if row.get("edges") != "programmatic"]
    assert fact("p5", plain).endswith("-> 314 nodes of a round: 0.41 ms")


def test_merges() -> None:
    said = fact("p6", measured.merges(2.0))
    assert "6.0 us at once, 5.0 by 4 and 2; in a cluster of 8: 2.0" in said
    assert (
        "resident with 200 KB: 16 of 2, 16 of 4, 16 of 8 -> merge in clusters: 3.0 us less" in said
    )
    assert "tickets stay: a cluster saves 0.2 us" in fact("p6", measured.merges(4.8))
    ampere = [row for row in measured.merges() if row["what"] == "L2 tickets"]
    assert fact("p6", ampere).endswith("-> no clusters here: tickets")


def test_conditional_nodes() -> None:
    said = fact("p7", measured.conditional(1.5, 14.0))
    assert "an IF costs 1.5 us; skipping 14 kernels 1.5 us by it, 14.0 by flags" in said
    assert said.endswith("-> IF nodes around a level's kernels")
    assert "-> predication" in fact("p7", measured.conditional(4.0, 14.0))
    assert "-> predication" in fact("p7", measured.conditional(2.0, 1.8))
    said = fact("p7", [{"what": "unsupported", "driver": 12030}])
    assert said == "P7: driver 12030 has no conditional nodes -> predication"


# --- rows that are not all there --------------------------------------------------------------


@pytest.mark.parametrize("name", facts.RULES)
def test_each_row_may_be_missing(name: str) -> None:
    """Also each may be the last before the program died."""
    rows = measured.ALL[name]
    for i in range(len(rows)):
        for left in (rows[:i], rows[:i] + rows[i + 1 :]):
            said = facts.line(name, left, "killed by signal 11")
            assert said.startswith(f"{name.upper()}: FAILED, killed by signal 11; until then: ")
    assert facts.line(name, [], "no time was left").endswith("until then: no answer")
    assert "no answer: not measured: " in fact(name, [])


@pytest.mark.parametrize("name", facts.RULES)
@pytest.mark.parametrize("value", [None, "text", [], {}, 0])
def test_each_value_may_be_anything(name: str, value: object) -> None:
    for key in {key for row in measured.ALL[name] for key in row}:
        rows = [row | {key: value} if key in row else row for row in measured.ALL[name]]
        assert fact(name, rows).startswith(f"{name.upper()}: ")
