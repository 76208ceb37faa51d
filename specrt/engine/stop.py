"""Where a sequence's output ends, token by token, also in the middle of an accepted path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Literal

FinishReason = Literal["stop", "length", "context", "error", "abort"]
"""A stop token or string; ``max_new_tokens``; the model's context; a failure (see ``error``)."""

# A character has at most 4 bytes, so tokens further back cannot change the text any more.
_CONTEXT_SIZE = 8
_WINDOW_SIZE = 16  # the larger, the more seldom it is cut down; the smaller, the less is decoded
_HALF = "\ufffd"


class TextTracker:
    """Turns tokens into the text that they add to a prompt, as they come.

    The text is what decoding the prompt's tail and all the tokens gives behind the prompt's own
    text: a token's text depends on its neighbours (spaces, multi-byte characters). Only the last
    few tokens are decoded with each new one. What was given out stays: a U+FFFD at the end may be
    half a character, and waits for the next token.

    Args:
        decode: text of token ids, ``special_tokens`` left out. A byte that is no character spoils
            nothing but itself (:meth:`specrt.models.tokenizer.Tokenizer.decode`).
        context: the prompt.
        special_tokens: those that ``decode`` leaves out, with their text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: Sequence[int] = (),
        special_tokens: Mapping[int, str] | None = None,
    ) -> None:
        self.special_tokens = special_tokens or {}
        self._decode = decode
        spoken = (token for token in reversed(context) if token not in self.special_tokens)
        self._ids = list(islice(spoken, _CONTEXT_SIZE))[::-1]
        self._context = 0  # decoding starts here
        self._window = decode(self._ids) if self._ids else ""  # text of the tokens from there on
        self._known = self._window  # its beginning that is the prompt's or was given out

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain."""
        return self.extend((token,))

    def extend(self, tokens: Sequence[int]) -> str:
        """Add tokens; return the text that became certain, the same as one by one."""
        spoken = [token for token in tokens if token not in self.special_tokens]
        if not spoken:
            return ""
        self._ids += spoken
        self._window = self._decode(self._ids[self._context :])
        text = self._give(self._window.removesuffix(_HALF))
        if len(self._ids) - self._context > _WINDOW_SIZE:
            self._cut_window()
        return text

    def flush(self) -> str:
        """Give out what still waits, half a character."""
        return self._give(self._window)

    def _give(self, certain: str) -> str:
        if self._known.startswith(certain):
            return ""
        start = len(self._known)
        if not certain.startswith(self._known):  # a character that the prompt began is complete
            start -= 1
        self._known = certain
        return certain[start:]

    def _cut_window(self) -> None:
        num_waiting = len(self._window) - len(self._known)
        self._context = len(self._ids) - _CONTEXT_SIZE
        self._window = self._decode(self._ids[self._context :])
        self._known = self._window[: len(self._window) - num_waiting]


class OutputEnd:
    """Decides after each token whether the output ends with it, and what text may be shown.

    Stop strings are looked for in the text with those special tokens written out that are part of
    one; what is shown leaves them out, but for those that the tracker has in its text. Of several
    the one that is complete first ends the output, of those that end together the longest: the same
    however the text is split into tokens. The text of a stop token counts for nothing, unless
    ``keeps_stop``.

    Args:
        tracker: of this output.
        stop_ids: tokens that end the output (they are kept as its last token), each with the
            ``stop_reason`` it gives.
        stop_strings: texts that end the output.
        special_tokens: with their text, those that the tracker has in the text too; None: it has
            none of them.
        keeps_stop: whether what ended the output, token or string, is part of the text.
        num_left: tokens that may come.
        num_sure: tokens before which no stop string counts.
        limit_reason: the reason when they are used up.
        is_streamed: whether text is shown before the end; else, and without stop strings, all of it
            is decoded at once.
    """

    def __init__(
        self,
        tracker: TextTracker,
        *,
        stop_ids: Mapping[int, int | None],
        stop_strings: Sequence[str],
        special_tokens: Mapping[int, str] | None = None,
        keeps_stop: bool,
        num_left: int,
        num_sure: int = 0,
        limit_reason: FinishReason,
        is_streamed: bool,
    ) -> None:
        self._tracker = tracker
        self.stop_ids = stop_ids
        """Tokens that end the output."""
        self._keeps_stop = keeps_stop
        self._num_left = num_left
        self._num_unsure = num_left - num_sure
        """Tokens that may still come once stop strings count."""
        self._limit_reason: FinishReason = limit_reason
        unshown = tracker.special_tokens
        if special_tokens is not None and not keeps_stop:
            stops = special_tokens.keys() & stop_ids.keys()
            unshown = {**unshown, **{token: special_tokens[token] for token in stops}}
        self._marks = _marks(unshown, stop_strings)
        self._unmark = dict.fromkeys(map(ord, self._marks.values()))
        self._stops = _spellings(stop_strings, self._marks, unshown)
        self._is_followed = is_streamed or bool(stop_strings)
        self._unread: list[int] = []  # tokens to be decoded at the end
        self._text = ""  # not shown yet, with marks
        self._shown: list[str] = []
        self.reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        """The stop string or the stop token's id; None for the end of the sequence."""

    def push(self, token: int) -> bool:
        """Add a token; True if the output ends with it."""
        self._num_left -= 1
        is_stop = token in self.stop_ids
        is_over = is_stop or self._num_left <= 0
        if self._is_followed:
            self._follow(token, is_over)
        elif self._keeps_stop or not is_stop:
            self._unread.append(token)
        if self.reason is None and is_over:
            self.reason = "stop" if is_stop else self._limit_reason
            self.stop_reason = self.stop_ids.get(token)
        return self.reason is not None

    def fail(self, reason: FinishReason = "error") -> None:
        """The sequence cannot go on, or is not to; what text there is may be shown."""
        self.reason = reason
        if self._is_followed:
            self._text += self._tracker.flush()

    def forget_unread(self) -> None:
        """Leave out of the text what could not be decoded."""
        self._unread = []

    def take_text(self) -> str:
        """Text that can be shown now and was not before.

        What might be the beginning of a stop string is held back until the next tokens tell.
        """
        end = len(self._text) - (self._num_held_back() if self.reason is None else 0)
        text, self._text = self._text[:end].translate(self._unmark), self._text[end:]
        self._shown.append(text)
        return text

    def whole_text(self) -> str:
        """The whole output's text, once it has ended."""
        if self._unread:
            self._text += self._tracker.extend(self._unread) + self._tracker.flush()
            self._unread = []
        self.take_text()
        return "".join(self._shown)

    def _follow(self, token: int, is_over: bool) -> None:
        if token in self._marks:
            # Half a character stands before the special token, not behind it.
            text = self._tracker.flush() + self._marks[token]
        elif token in self.stop_ids and not self._keeps_stop:
            text = ""
        else:
            text = self._tracker.push(token)
        if not self._ends_with(text) and is_over:
            self._ends_with(self._tracker.flush())

    def _ends_with(self, new: str) -> bool:
        """Add text; True if a stop string is complete with it, behind which nothing counts."""
        size = len(self._text)
        self._text += new
        if self._num_left > self._num_unsure:
            return False
        found = []
        for spelling, stop in self._stops:
            start = self._text.find(spelling, max(0, size - len(spelling) + 1))
            if start >= 0:
                found.append((start + len(spelling), start, stop))
        if not found:
            return False
        _, start, stop = min(found)
        self._text = self._text[:start].translate(self._unmark) + (stop if self._keeps_stop else "")
        self.reason, self.stop_reason = "stop", stop
        return True

    def _num_held_back(self) -> int:
        longest = 0
        for spelling, _ in self._stops:
            for size in range(min(len(spelling) - 1, len(self._text)), longest, -1):
                if self._text.endswith(spelling[:size]):
                    longest = size
                    break
        return longest


def _marks(special_tokens: Mapping[int, str], stop_strings: Sequence[str]) -> dict[int, str]:
    """A character that no text has for each special token that is part of a stop string."""
    stops = "\0".join(stop_strings)
    tokens = [token for token, text in special_tokens.items() if text and text in stops]
    return {token: chr(0xD800 + index) for index, token in enumerate(tokens)}


def _spellings(
    stop_strings: Sequence[str], marks: Mapping[int, str], special_tokens: Mapping[int, str]
) -> list[tuple[str, str]]:
    """How each stop string may come: letter by letter, or with its special tokens as such."""
    spellings = [(stop, stop) for stop in stop_strings]
    # The longest first: one special token's text may be part of another's.
    tokens = sorted(marks, key=lambda token: len(special_tokens[token]), reverse=True)
    for stop in stop_strings:
        spelling = stop
        for token in tokens:
            spelling = spelling.replace(special_tokens[token], marks[token])
        if spelling != stop:
            spellings.append((spelling, stop))
    return spellings
