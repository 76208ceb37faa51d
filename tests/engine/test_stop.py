"""Where output ends, and what of its text may be shown before it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specrt.engine.stop import FinishReason, OutputEnd, TextTracker

Decode = Callable[[list[int]], str]


def byte_decode(pieces: Sequence[bytes]) -> Decode:
    """Token i stands for ``pieces[i]``; tokens may hold parts of characters, as in real BPE."""
    return lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")


class Output:
    """One output token by token, as the engine drives it.

    Token i stands for ``pieces[i]``; where that is text, it is a special token.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | str],
        stop: Sequence[str] = (),
        *,
        stop_ids: Mapping[int, int | None] | None = None,
        num_left: int = 1000,
        reason: FinishReason = "length",
        keeps_stop: bool = False,
        is_streamed: bool = True,
    ) -> None:
        special = {i: piece for i, piece in enumerate(pieces) if isinstance(piece, str)}
        self.decode = byte_decode([p if isinstance(p, bytes) else b"" for p in pieces])
        self.end = OutputEnd(
            TextTracker(self.decode, (), special),
            stop_ids=stop_ids or {},
            stop_strings=stop,
            keeps_stop=keeps_stop,
            num_left=num_left,
            limit_reason=reason,
            is_streamed=is_streamed,
        )
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
        return self.end.whole_text()

    @property
    def outcome(self) -> tuple[str, FinishReason | None, int | str | None]:
        """The text, which is what was shown, and what ended it."""
        assert "".join(self.shown) == self.text
        return self.text, self.end.reason, self.end.stop_reason


def said(
    pieces: Sequence[bytes | str],
    stop: Sequence[str] = (),
    num_left: int | None = None,
    *,
    stop_ids: Mapping[int, int | None] | None = None,
    keeps_stop: bool = False,
) -> Output:
    """All the pieces in their order; the last one is the last that may come."""
    limit = num_left or len(pieces)
    output = Output(pieces, stop, stop_ids=stop_ids, num_left=limit, keeps_stop=keeps_stop)
    return output.run(range(len(pieces)))


def test_characters_wait_for_all_their_bytes() -> None:
    euro, grin = "€".encode(), "😀".encode()
    pieces = [b"a", euro[:1], euro[1:], grin[:2], grin[2:3], grin[3:] + euro[:2], euro[2:]]
    output = said(pieces)
    assert output.shown == ["a", "", "€", "", "", "😀", "€"]
    assert output.text == "a€😀€"


def test_half_a_character_is_shown_at_the_end() -> None:
    output = said([b"a", "€".encode()[:2]])
    assert output.shown == ["a", "\ufffd"]
    assert output.text == "a\ufffd"


def test_flush_gives_what_waits_once() -> None:
    tracker = TextTracker(byte_decode([b"ab", b"\xf0\x9f"]))
    assert [tracker.push(0), tracker.push(1)] == ["ab", ""]
    assert [tracker.flush(), tracker.flush()] == ["\ufffd", ""]


def test_broken_bytes_do_not_block_the_text() -> None:
    output = said([b"a", b"\xff", b"\xe2", b"b", b"c"])
    assert output.shown == ["a", "", "\ufffd", "\ufffdb", "c"]


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


def test_the_stop_string_that_is_complete_first_decides() -> None:
    # "b" is complete before "abc" can be, also within one token.
    for pieces in ([b"x", b"a", b"b", b"c"], [b"xabc"], [b"x", b"abc"]):
        assert said(pieces, ["abc", "b"]).outcome == ("xa", "stop", "b")
    # Complete together: the longest.
    for pieces in ([b"x", b"a", b"bc"], [b"x", b"a", b"b", b"c"], [b"xabcbc"]):
        assert said(pieces, ["bc", "abc", "c"]).outcome == ("x", "stop", "abc")
    assert said([b"xaaa"], ["aa"]).outcome == ("x", "stop", "aa")


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


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("keeps_stop", [False, True])
def test_stop_ids_end_the_output(keeps_stop: bool, is_streamed: bool) -> None:
    for stop_reason in (2, None):  # the end of the sequence has none
        output = Output(
            [b"a", b"b", b"</s>"],
            ["never"] if is_streamed else [],
            stop_ids={2: stop_reason},
            num_left=3,
            keeps_stop=keeps_stop,
            is_streamed=is_streamed,
        ).run([0, 1, 2, 0])
        assert (output.ids, output.end.reason) == ([0, 1, 2], "stop")
        assert output.text == ("ab</s>" if keeps_stop else "ab")
        assert output.end.stop_reason == stop_reason
        assert "".join(output.shown) == (output.text if is_streamed else "")


def test_a_stop_token_is_no_text_unless_it_is_kept() -> None:
    pieces = [b"a", b"b!"]
    assert said(pieces, ["!"], stop_ids={1: 1}).outcome == ("a", "stop", 1)
    assert said(pieces, ["!"], stop_ids={1: 1}, keeps_stop=True).outcome == ("ab!", "stop", "!")
    # Half a character before it is shown all the same.
    assert said([b"a\xf0", b"\x9f"], stop_ids={1: 1}).outcome == ("a\ufffd", "stop", 1)


def test_the_stop_string_is_kept_if_asked_for() -> None:
    pieces = [b"a", b"b-E", b"NDx"]
    for stop, shown in (("END", ["a", "b-", "END"]), ("-E", ["a", "b-E"])):
        output = said(pieces, [stop], keeps_stop=True)
        assert (output.shown, output.outcome) == (shown, ("ab-" + stop.strip("-"), "stop", stop))


SPECIAL = [b"a", b"b", b"<x>", "<x>", "</s>", b"\xf0\x9f"]


@pytest.mark.parametrize(
    ("tokens", "stop", "shown"),
    [
        ([0, 1, 3], "<x>", ["a", "b", ""]),
        ([0, 1, 3], "b<x>", ["a", "", ""]),
        ([0, 1, 3, 0], "b<x>a", ["a", "", "", ""]),
        ([0, 3, 4, 1], "<x></s>b", ["a", "", "", ""]),
        ([0, 3, 3, 4], "<x></s>", ["a", "", "", ""]),
        # Held back in vain; special tokens are not shown.
        ([1, 3, 1, 3, 0], "b<x>a", ["", "", "b", "", ""]),
        # Spelled letter by letter.
        ([0, 1, 2], "b<x>", ["a", "", ""]),
        # Half a character is text.
        ([1, 5, 1, 5, 3], "\ufffd<x>", ["b", "", "\ufffdb", "", ""]),
    ],
)
def test_a_special_token_is_part_of_a_stop_string(
    tokens: list[int], stop: str, shown: list[str]
) -> None:
    output = Output(SPECIAL, ["never", stop]).run(tokens)
    assert output.shown == shown
    assert output.outcome == ("".join(shown), "stop", stop)
    kept = Output(SPECIAL, [stop], keeps_stop=True).run(tokens)
    assert kept.outcome == ("".join(shown) + stop, "stop", stop)


def test_special_tokens_stop_nothing_by_a_part_of_their_name() -> None:
    for stop in ("x", "<", "bx", "ab", "<x>>"):
        output = Output(SPECIAL, ["<x>never", stop], num_left=3).run([0, 3, 1])
        assert output.outcome == ("ab", "length", None)
    output = Output(SPECIAL, ["b<x>"], num_left=3).run([1, 5, 3])
    assert output.outcome == ("b\ufffd", "length", None)


@pytest.mark.parametrize("stop_reason", [3, None])
def test_a_stop_string_of_a_stop_token_decides(stop_reason: int | None) -> None:
    def outcome(stop: str) -> tuple[str, FinishReason | None, int | str | None]:
        return Output(SPECIAL, [stop], stop_ids={3: stop_reason}).run([0, 1, 3]).outcome

    assert outcome("b<x>") == ("a", "stop", "b<x>")
    assert outcome("<x>") == ("ab", "stop", "<x>")
    assert outcome("a<x>") == ("ab", "stop", stop_reason)


def test_stop_ids_win_over_the_limit() -> None:
    output = Output([b"a", b"b"], stop_ids={1: 1}, num_left=2, reason="context").run([0, 1])
    assert output.end.reason == "stop"


@pytest.mark.parametrize("reason", ["length", "context"])
def test_limits_give_their_reason(reason: FinishReason) -> None:
    output = Output([b"a"], num_left=3, reason=reason).run([0] * 5)
    assert (output.ids, output.end.reason, output.text) == ([0, 0, 0], reason, "aaa")


CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=40)


def cut_up(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [piece for piece in [*pieces, data[start:]] if piece]


@settings(max_examples=300, deadline=None)
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
        assert "".join(output.shown) == certain


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab€<x>", min_size=1, max_size=30),
    st.lists(st.text("ab€<x>", min_size=1, max_size=4) | st.just("b<x>"), min_size=1, max_size=4),
    CUTS,
)
@example("xabc", ["abc", "b"], [4])
@example("xabc", ["bc", "abc"], [2])
def test_where_it_stops_does_not_depend_on_the_tokens(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    _, start, found = min(ends, default=(0, len(text), None))
    expected = (text[:start], "stop" if found else "length", found)
    assert said(cut_up(text.encode(), sizes), stop).outcome == expected
