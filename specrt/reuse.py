"""What lets buffers and graphs be used again: few sizes, and those kept that come up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, ValuesView
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def power_of_two(at_least: int) -> int:
    """The least one: what grows by them has few sizes, and drops few captured graphs."""
    return 1 << max(0, at_least - 1).bit_length()


class Recent(Generic[K, V]):
    """Values by key, of which those that were asked for last are kept.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()
        self._last: V | None = None  # asked for: rounds mostly ask for one again

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value of ``key``, if it is kept."""
        value = self._values.get(key)
        if value is not None and value is not self._last:
            self._values.move_to_end(key)
            self._last = value
        return value

    def put(self, key: K, value: V) -> V:
        """Keep ``value``; where there are too many, the one not asked for for longest goes."""
        self._values[key] = self._last = value
        if len(self._values) > self._most:
            self._values.popitem(last=False)
        return value

    def values(self) -> ValuesView[V]:
        """Those that are kept."""
        return self._values.values()

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()
        self._last = None
