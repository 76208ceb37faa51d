"""The probes: what each asks, what its answer decides, how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """One question, one process."""

    name: str
    """Of the program's subcommand."""
    question: str
    decides: str
    seconds: float
    """After which it is stopped. A context, memory and clocks take some two of them."""


PROBES = (
    Probe(
        "p1",
        "is a tensor core's sum the one of sixteen that is modelled, by mma.sync and by wgmma?",
        "whether variants of a product may be mixed",
        15,
    ),
    Probe(
        "p2",
        "is a dot product the same for every row, column, number of rows and tile?",
        "whether the tile may follow the number of rows",
        12,
    ),
    Probe(
        "p3",
        "which way of reading weights is the fastest?",
        "the read ceiling; whether weights are packed; bytes in flight",
        14,
    ),
    Probe(
        "p4",
        "what does it cost to read in pieces, a launch each?",
        "whether launches overlap and fetch weights ahead",
        12,
    ),
    Probe(
        "p5",
        "what does a launch cost that does nothing?",
        "what a launch less is worth",
        8,
    ),
    Probe(
        "p6",
        "how do the parts of a split sum meet?",
        "a cluster's shared memory, or tickets in the L2 cache",
        8,
    ),
    Probe(
        "p7",
        "what does a conditional node of a graph cost?",
        "conditional nodes, or kernels that read a flag",
        10,
    ),
)
BUDGET = 60.0
"""Seconds for all of them and for building their program, if no other is given."""
