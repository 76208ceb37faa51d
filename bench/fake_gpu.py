"""A GPU that is made up: small shapes on the CPU, a clock that always says the same.

Benchmarks go through all of their code on it (``--dry``), so that nothing but the figures is
missing where there is no GPU. It can fail at any of the things that a GPU is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.gpu import Contender, Place, Timings
from bench.limits import MODELS, TARGETS, Ceilings, Model

_SMALL = Model(256, 208, 2, 4, 2, 64)
_LAUNCH = 1e-6


class FakeGpu:
    """A :class:`bench.gpu.Device` whose every launch takes a microsecond.

    Args:
        fail_at: the number, from 1 on, of the question at which it fails; the first few are its
            facts, ceilings and clocks, then come memory and measurements. 0 for never.
        stays_broken: whether all that is asked later fails too, as after an illegal access.
    """

    place = Place("cpu", torch.float32)
    models: Mapping[str, Model] = dict.fromkeys(MODELS, _SMALL)
    targets: Mapping[str, Model] = dict.fromkeys(TARGETS, _SMALL)

    def __init__(self, fail_at: int = 0, *, stays_broken: bool = False) -> None:
        self.num_asked = 0
        self._fail_at = fail_at
        self._stays_broken = stays_broken

    def _asked(self) -> None:
        self.num_asked += 1
        is_past = self._stays_broken and 0 < self._fail_at < self.num_asked
        if self.num_asked == self._fail_at or is_past:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def facts(self) -> dict[str, Any]:
        self._asked()
        return {
            "device": "no GPU: a dry run, no figure is real",
            "capability": "9.0",
            "num_sms": 132,
            "l2_bytes": 1 << 20,
            "memory_bytes": 1 << 33,
            "cuda": torch.version.cuda,
        }

    def clocks(self) -> dict[str, Any]:
        self._asked()
        return {"clocks": "none"}

    def ceilings(self) -> Ceilings:
        self._asked()
        return Ceilings(1e12, 1e14)

    def free_bytes(self) -> int:
        self._asked()
        return 1 << 30

    def measure(self, contenders: Mapping[str, Contender]) -> Timings:
        """Runs each contender once."""
        self._asked()
        for contender in contenders.values():
            contender.run()
        seconds = dict.fromkeys(contenders, _LAUNCH)
        return Timings(seconds, seconds, {})
