"""Edits of logits that one request asked for: functions of the tokens before them.

What is edited is the row that acceptance reads, before biases, penalties and filters: so a token
is the target's under the edited law whoever drafted it. Nothing is kept of a path that was not
taken: what an edit knows follows from the tokens it is given.

Rows are numpy's here: torch would have all threads share one, and wait for the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from specrt.sampling import LogitsProcessor

Row: TypeAlias = npt.NDArray[np.float32]
"""``[V]``: logits."""


class EditError(Exception):
    """An edit has failed, and its request ends; the message names the option."""


class Mask(Protocol):
    """Which tokens may not come."""

    name: str
    """The option that asked for it."""

    def forbid(self, output: Sequence[int], row: Row) -> None:
        """Set the logits of tokens that may not come behind ``output`` to -inf.

        Raises:
            EditError: that cannot be told.
        """


class AllowedTokens:
    """Tokens besides which none comes.

    Args:
        ids: they.
        vocab_size: V.
    """

    name = "allowed_token_ids"

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._is_out = np.ones(vocab_size, dtype=np.bool_)
        self._is_out[list(ids)] = False

    def forbid(self, output: Sequence[int], row: Row) -> None:
        """As :class:`Mask`."""
        row[self._is_out] = -math.inf


class LeastTokens:
    """No stop token before so many tokens.

    Args:
        count: how many.
        stop_ids: tokens that end the output.
    """

    name = "min_new_tokens"

    def __init__(self, count: int, stop_ids: Sequence[int]) -> None:
        self._count = count
        self._stop_ids = list(stop_ids)

    def forbid(self, output: Sequence[int], row: Row) -> None:
        """As :class:`Mask`."""
        if len(output) < self._count:
            row[self._stop_ids] = -math.inf


class BadWords:
    """Runs of tokens that do not come to be in the output: their last token does not come.

    Args:
        spellings: runs of token ids.
    """

    name = "bad_words"

    def __init__(self, spellings: Sequence[Sequence[int]]) -> None:
        self._spellings = [(list(spelling[:-1]), spelling[-1]) for spelling in spellings]

    def forbid(self, output: Sequence[int], row: Row) -> None:
        """As :class:`Mask`."""
        for before, last in self._spellings:
            if list(output[len(output) - len(before) :]) == before:
                row[last] = -math.inf


class Editor:
    """The edits of one request.

    Args:
        prompt: its token ids.
        processor: edits raw logits first.
        masks: what comes behind, and cannot be undone.
        stop_ids: tokens that end the output.
        max_new_tokens: tokens that may come.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        processor: LogitsProcessor | None,
        masks: Sequence[Mask],
        stop_ids: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self._prompt = list(prompt)
        self._processor = processor
        self._masks = masks
        self._stop_ids = frozenset(stop_ids)
        self._max_new_tokens = max_new_tokens

    def is_over(self, output: Sequence[int]) -> bool:
        """Whether nothing comes behind ``output``: there is nothing to edit."""
        return len(output) >= self._max_new_tokens or not self._stop_ids.isdisjoint(output)

    def edited(self, output: Sequence[int], raw: Row) -> Row:
        """The logits to go on with behind ``output``.

        Args:
            output: output tokens, accepted or on the path to a drafted one.
            raw: the target's; left as it is.

        Raises:
            EditError: an edit fails, or leaves no token.
        """
        row: Row = raw.copy()
        if self._processor is not None:
            row = self._processed([*self._prompt, *output], row)
        for mask in self._masks:
            mask.forbid(output, row)
        if row.max() == -math.inf:
            raise EditError(f"{', '.join(self._names())}: no token is left")
        return row

    def _names(self) -> list[str]:
        first = [] if self._processor is None else ["logits_processor"]
        return first + [mask.name for mask in self._masks]

    def _processed(self, ids: list[int], row: Row) -> Row:
        assert self._processor is not None, "asked for"
        shape = row.shape
        try:
            with torch.no_grad():
                given = self._processor(ids, torch.from_numpy(row))
        except Exception as error:
            raise EditError(f"logits_processor: {type(error).__name__}: {error}") from error
        if not isinstance(given, torch.Tensor):
            raise EditError(f"logits_processor: expected a tensor, got {type(given).__name__}")
        if (
            tuple(given.shape) != shape
            or given.dtype != torch.float32
            or given.device.type != "cpu"
        ):
            raise EditError(
                f"logits_processor: expected {list(shape)} float32 on the host, got "
                f"{list(given.shape)} {str(given.dtype).removeprefix('torch.')} on {given.device}"
            )
        found: Row = np.array(given.detach().numpy())  # a copy: it may keep what it gave
        if not found.max() < math.inf:
            raise EditError("logits_processor: expected numbers or -inf, got NaN or +inf")
        return found
