"""How much of the prompts a step runs, so that those that decode do not wait long for it."""

from __future__ import annotations

_WAIT = 1.5  # rounds that prompts may take between two of them
_FIRST_CHUNK = 128  # tokens, before anything was measured
_LEAST_CHUNK = 32  # tokens; fewer would read all weights for next to nothing
_MEMORY = 0.9  # weight of the past
_MOST_JUMP = 4.0  # what a measurement counts at most, in what was known: a thread may have slept


class Pace:
    """Bounds a step's prompt tokens by time, on a CPU: there a prompt's row takes as long as a
    row of a round, so that a chunk that is right for one model keeps another's readers waiting.

    It moves times alone: a row's bits do not depend on how prompts are cut (law 1).

    Args:
        most: tokens of a step in any case (``prefill_chunk``).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._row_ms: float | None = None
        self._round_ms: float | None = None

    def observe_prompt(self, num_tokens: int, ms: float) -> None:
        """So many tokens of a prompt were run in one piece."""
        if num_tokens >= _LEAST_CHUNK:
            self._row_ms = _mean(self._row_ms, ms / num_tokens)

    def observe_round(self, ms: float) -> None:
        """A round of all that decode took so long."""
        self._round_ms = _mean(self._round_ms, ms)

    def chunk(self, *, is_waited_for: bool) -> int:
        """Tokens that the next step may run.

        Args:
            is_waited_for: whether any sequence decodes.
        """
        if not is_waited_for:
            return self._most
        if self._row_ms is None or self._round_ms is None:
            return min(self._most, _FIRST_CHUNK)
        tokens = int(_WAIT * self._round_ms / max(self._row_ms, 1e-6))
        return min(self._most, max(_LEAST_CHUNK, tokens))

    def price(self, num_tokens: int, *, is_waited_for: bool) -> int:
        """Tokens of a chunk that a piece takes up: a short one reads all weights as a long one
        does, and many prompts of which all but the end was found may join in one step.

        Args:
            num_tokens: of the piece.
            is_waited_for: whether any sequence decodes.
        """
        return max(_LEAST_CHUNK if is_waited_for else 1, num_tokens)


def _mean(known: float | None, ms: float) -> float:
    if known is None:
        return ms
    return _MEMORY * known + (1 - _MEMORY) * min(ms, _MOST_JUMP * known)
