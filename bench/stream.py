"""What memory gives: STREAM's triad ``a = b + s c`` by torch, on all of its threads."""

from __future__ import annotations

import torch

from bench.harness import l3_bytes

_LEAST_BYTES = 128 << 20
_TIMES_CACHE = 4  # of the caches, as STREAM's rules ask of each array


class Triad:
    """Three arrays, each several times as large as the caches.

    Args:
        num_bytes: of one of them; None: four times the last cache, 128 MiB at the least.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        size = (num_bytes or max(_LEAST_BYTES, _TIMES_CACHE * l3_bytes())) // 4
        self._a, self._b, self._c = (torch.rand(size) for _ in range(3))
        self.num_bytes = 3 * 4 * size
        """As STREAM counts: two arrays read, one written. The stores are ordinary ones, so a line
        that is written is read before, and memory moves 4/3 of this."""

    def run(self) -> None:
        """One pass."""
        torch.add(self._b, self._c, alpha=3.0, out=self._a)
