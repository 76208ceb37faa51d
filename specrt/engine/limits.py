"""What an engine holds and does at once."""

from __future__ import annotations

from dataclasses import dataclass

from specrt.tree import MAX_NODES

_MAY_BE_NONE = "max_cached_tokens", "max_waiting", "max_shared_tokens"


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds and does at once.

    Raises:
        ValueError: a field is out of range; names it.
    """

    max_batch: int = 8
    """Requests that are answered at the same time; further ones wait."""
    max_nodes: int = 64
    """The largest tree that is verified, its root included."""
    prefill_chunk: int = 512
    """Tokens of prompts that are run between two rounds of those that decode, at most; on a CPU
    fewer, as many as take one and a half rounds' time, so that these do not wait long."""
    max_cached_tokens: int | None = None
    """Tokens of all sequences whose keys and values are held, in whole pages; who came last gives
    way where they run out. Of layers that see a window this holds by itself, of what they keep.
    None: as memory allows."""
    max_waiting: int | None = None
    """Requests that may wait for a place; None: any number."""
    max_shared_tokens: int | None = None
    """Tokens that no request uses and that are kept for those that begin alike, in whole pages; 0:
    nothing is shared. None: on a GPU, and with ``max_cached_tokens``, as many as there are pages
    for, else what fits in 1 GiB, 65536 at most. They are given up as soon as pages are needed."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_batch", 1, None),
            ("max_nodes", 1, MAX_NODES),
            ("prefill_chunk", 1, None),
            ("max_cached_tokens", 1, None),
            ("max_waiting", 1, None),
            ("max_shared_tokens", 0, None),
        ):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            is_none = value is None and name in _MAY_BE_NONE
            if is_none or (is_int and value >= least and (most is None or value <= most)):
                continue
            bounds = f"at least {least}" if most is None else f"{least}..{most}"
            raise ValueError(f"{name}: expected {bounds}, got {value!r}")
