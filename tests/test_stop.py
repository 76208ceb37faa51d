"""Where output ends, and what of its text may be shown before it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specrt.stop import FinishReason, OutputEnd, TextTracker

Decode = Callable[[list[int]], str]


def byte_decode(pieces: Sequence[bytes]) -> Decode:
    """Token i stands for ``pieces[i]``; tokens may hold parts of characters, as in real BPE."""
    return lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")


class Output:
    """One output token by token, as the engine drives it."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        stop: Sequence[str] = (),
        *,
        stop_ids: Sequence[int] = (),
        num_left: int = 1000,
        reason: FinishReason = "length",
    ) -> None:
        self.decode = byte_decode(pieces)
        self.end = OutputEnd(stop_ids, stop, num_left, reason, TextTracker(self.decode))
        self.ids: list[int] = []
        self.shown: list[str] = []

    def run(self, ids: Sequence[int]) -> Output:
        for token in ids:
            self.ids.append(token)
            is_over = self.end.push(token)
            self.shown.append(self.end.take_text())
            if is_over:
                break
        return self

    @property
    def text(self) -> str:
        return self.end.text(self.ids, self.decode)


def said(pieces: Sequence[bytes], stop: Sequence[str] = (), num_left: int | None = None) -> Output:
    """All the pieces in their order; the last one is the last that may come."""
    output = Output(pieces, stop, num_left=num_left or len(pieces))
    return output.run(range(len(pieces)))


def test_characters_wait_for_all_their_bytes() -> None:
    euro, grin = "€".encode(), "😀".encode()
    pieces = [b"a", euro[:1], euro[1:], grin[:2], grin[2:3], grin[3:] + euro[:2], euro[2:]]
    output = said(pieces)
    assert output.shown == ["a", "", "€", "", "", "", "😀€"]
    assert output.text == "a€😀€"


def test_half_a_character_is_shown_at_the_end() -> None:
    output = said([b"a", "€".encode()[:2]])
    assert output.shown == ["a", "\ufffd"]
    assert output.text == "a\ufffd"


def test_flush_gives_what_waits_once() -> None:
    tracker = TextTracker(byte_decode([b"ab", b"\xf0\x9f"]))
    assert [tracker.push(0), tracker.push(1)] == ["ab", ""]
    assert [tracker.flush(), tracker.flush()] == ["\ufffd", ""]
    assert tracker.text == "ab\ufffd"


def test_broken_bytes_do_not_block_the_text() -> None:
    output = said([b"a", b"\xff", b"\xe2", b"b", b"c"])
    assert output.shown == ["a", "", "", "\ufffd\ufffdb", "c"]


def test_stop_strings_span_tokens_and_are_held_back() -> None:
    output = said([b"one ", b"E", b"N", b"D", b"never"], ["END"])
    assert output.shown == ["one ", "", "", ""]
    assert (output.text, output.ids, output.end.reason) == ("one ", [0, 1, 2, 3], "stop")


def test_text_held_back_in_vain_is_shown() -> None:
    output = said([b"E", b"N", b"E", b"N", b"x", b"EN"], ["END"])
    assert output.shown == ["", "", "EN", "", "ENx", "EN"]
    assert (output.text, output.end.reason) == ("ENENxEN", "length")


def test_the_longest_possible_beginning_is_held_back() -> None:
    output = said([b"a", b"b", b"a", b"b", b"d"], ["ababc", "bx"])
    assert output.shown == ["", "", "", "", "ababd"]


def test_overlapping_stop_strings() -> None:
    # "b" is complete before "abc" can be.
    assert said([b"x", b"a", b"b", b"c"], ["abc", "b"]).text == "xa"
    # Complete with one token: the text is cut at the first.
    assert said([b"x", b"a", b"bc", b"c"], ["bc", "abc"]).text == "x"
    assert said([b"xaaa"], ["aa"]).text == "x"


def test_a_stop_string_with_multi_byte_characters() -> None:
    stop = "→é"
    data = f"ok{stop}".encode()
    output = said([data[i : i + 1] for i in range(len(data))] + [b"!"], [stop])
    assert (output.text, len(output.ids)) == ("ok", len(data))


def test_a_stop_string_with_the_last_token_allowed() -> None:
    output = said([b"a", b"b", b"!"], ["b!"], num_left=3)
    assert (output.text, output.end.reason) == ("a", "stop")


def test_a_stop_string_before_half_a_character_at_the_end() -> None:
    """The half character keeps the token's text waiting; the limit must not let it slip through."""
    for stop in (["!"], ["b!"]):
        output = said([b"a", b"b!\xf0\x9f"], stop)
        expected = "ab" if stop == ["!"] else "a"
        assert ("".join(output.shown), output.text, output.end.reason) == (
            expected,
            expected,
            "stop",
        )


def test_stop_ids_end_the_output() -> None:
    pieces = [b"a", b"b", b"</s>"]
    output = Output(pieces, ["never"], stop_ids=[2], num_left=3).run([0, 1, 2, 0])
    assert (output.ids, output.end.reason) == ([0, 1, 2], "stop")
    # Asking for text token by token must not change it.
    untracked = OutputEnd([2], [], 3, "length", None)
    for token in output.ids:
        untracked.push(token)
    assert output.text == untracked.text(output.ids, output.decode) == "ab</s>"
    assert "".join(output.shown) == output.text


def test_stop_ids_win_over_the_limit() -> None:
    output = Output([b"a", b"b"], stop_ids=[1], num_left=2, reason="context").run([0, 1])
    assert output.end.reason == "stop"


@pytest.mark.parametrize("reason", ["length", "context"])
def test_limits_give_their_reason(reason: FinishReason) -> None:
    output = Output([b"a"], num_left=3, reason=reason).run([0] * 5)
    assert (output.ids, output.end.reason, output.text) == ([0, 0, 0], reason, "aaa")


def test_without_a_tracker_nothing_is_shown() -> None:
    end = OutputEnd([], [], 1, "length", None)
    assert end.push(0)
    assert end.take_text() == ""
    assert end.text([0], byte_decode([b"xyz"])) == "xyz"


CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=40)


def cut_up(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [piece for piece in [*pieces, data[start:]] if piece]


@settings(max_examples=300)
@given(
    st.text("ab€é😀", min_size=1, max_size=30),
    CUTS,
    st.lists(st.text("ab€é😀", min_size=1, max_size=4), max_size=3),
    st.integers(1, 40),
)
@example("a€", [1, 2], ["a"], 2)
@example("a😀", [3], ["a"], 1)
def test_what_is_shown_is_the_text(
    text: str, sizes: list[int], stop: list[str], num_left: int
) -> None:
    pieces = cut_up(text.encode(), sizes)
    num_left = min(num_left, len(pieces))
    output = said(pieces, stop, num_left)
    whole = output.decode(output.ids)
    # What was shown stays: a character shown and cut off later would make these differ.
    assert "".join(output.shown) == output.text
    assert whole.startswith(output.text)
    found = [whole.find(s) for s in stop if s in whole]
    if found:
        assert output.end.reason == "stop"
        assert not any(s in output.text for s in stop)
        assert any(whole.startswith(s, len(output.text)) for s in stop)
    else:
        assert (output.end.reason, output.text) == ("length", whole)
        assert len(output.ids) == num_left


@given(st.text("ab€é😀", min_size=1, max_size=30), CUTS)
def test_text_without_stop_strings_is_complete_after_each_character(
    text: str, sizes: list[int]
) -> None:
    pieces = cut_up(text.encode(), sizes)
    output = Output(pieces)
    for token in range(len(pieces)):
        output.run([token])
        known = b"".join(pieces[: token + 1])
        certain = known.decode("utf-8", errors="ignore")
        # A character complete inside a token may wait with a half one behind it, never longer.
        if not output.decode(output.ids).endswith("\ufffd"):
            assert "".join(output.shown) == certain
        assert certain.startswith("".join(output.shown))
