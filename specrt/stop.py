"""Where a sequence's output ends, token by token, also in the middle of an accepted path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

FinishReason = Literal["stop", "length", "context", "error"]
"""A stop token or string; ``max_new_tokens``; the model's context; a failure (see ``error``)."""


class TextTracker:
    """Turns tokens into text as they come.

    A token's text can depend on its neighbours (spaces, multi-byte characters), so the last few
    tokens are decoded again with each new one, and half a character waits for its other half.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # decoding starts here, so that joins come out right
        self._done = 0  # tokens whose text has been given out
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._done])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._context, self._done = self._done, len(self._ids)
        self.text += now[len(before) :]
        return now[len(before) :]

    def flush(self) -> str:
        """Give out what still waits, half characters included."""
        before = self._decode(self._ids[self._context : self._done])
        rest = self._decode(self._ids[self._context :])[len(before) :]
        self._context = self._done = len(self._ids)
        self.text += rest
        return rest


class OutputEnd:
    """Decides after each token whether the output ends with it, and what text may be shown.

    Args:
        stop_ids: tokens that end the output (they are kept as its last token).
        stop_strings: texts that end the output; the text is cut before them.
        num_left: tokens that may come.
        limit_reason: the reason when they are used up.
        tracker: needed for stop strings and for streaming; None if nobody asks for text.
    """

    def __init__(
        self,
        stop_ids: Collection[int],
        stop_strings: Sequence[str],
        num_left: int,
        limit_reason: FinishReason,
        tracker: TextTracker | None,
    ) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._stop_strings = tuple(stop_strings)
        self._num_left = num_left
        self._limit_reason: FinishReason = limit_reason
        self._tracker = tracker
        self._num_shown = 0
        self.reason: FinishReason | None = None
        self.cut: int | None = None
        """Where in the text a stop string begins, once one was found."""

    def push(self, token: int) -> bool:
        """Add a token; True if the output ends with it."""
        self._num_left -= 1
        # The text must be tracked even where a token decides.
        found = self._found_stop_string(lambda tracker: tracker.push(token))
        is_stop_id = token in self._stop_ids
        if not found and (is_stop_id or self._num_left <= 0):
            # Half a character at the end made the text before it wait, a stop string maybe.
            found = self._found_stop_string(TextTracker.flush)
        if found or is_stop_id:
            self.reason = "stop"
        elif self._num_left <= 0:
            self.reason = self._limit_reason
        return self.reason is not None

    def fail(self) -> None:
        """The sequence cannot go on; what text there is may be shown."""
        self.reason = "error"
        if self._tracker is not None:
            self._tracker.flush()

    def take_text(self) -> str:
        """Text that can be shown now and was not before.

        What might be the beginning of a stop string is held back until the next tokens tell.
        """
        if self._tracker is None:
            return ""
        text = self._tracker.text
        end = self.cut if self.cut is not None else len(text)
        if self.reason is None:
            end -= self._held_back(text)
        shown, self._num_shown = text[self._num_shown : end], max(end, self._num_shown)
        return shown

    def text(self, ids: list[int], decode: Callable[[list[int]], str]) -> str:
        """The whole output's text, once it has ended."""
        if self._tracker is None:
            return decode(ids)
        self._tracker.flush()
        return self._tracker.text[: self.cut]

    def _found_stop_string(self, advance: Callable[[TextTracker], str]) -> bool:
        """Let the tracker move on; True if a stop string is in what it gives out."""
        if self._tracker is None:
            return False
        start = len(self._tracker.text)
        if not advance(self._tracker):
            return False
        text = self._tracker.text
        found = [text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop_strings]
        hits = [position for position in found if position >= 0]
        if hits:
            self.cut = min(hits)
        return bool(hits)

    def _held_back(self, text: str) -> int:
        longest = 0
        for stop in self._stop_strings:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
