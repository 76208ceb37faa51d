"""The text that tokens add to a prompt: one whole, however it is come by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specrt.engine.stop import OutputEnd, TextTracker
from specrt.models.tokenizer import Tokenizer
from tests.text_tokenizers import KINDS, SPECIAL, ids, letters, names

TOKENIZERS = {name: make() for name, make in KINDS.items()}
BYTE_LEVEL, LLAMA = TOKENIZERS["byte_level"], TOKENIZERS["llama"]


def tracker(
    tokenizer: Tokenizer, prompt: Sequence[int] = (), *, skips_special: bool = True
) -> TextTracker:
    if skips_special:
        return TextTracker(tokenizer.decode, prompt, tokenizer.special_tokens)
    return TextTracker(partial(tokenizer.decode, skip_special_tokens=False), prompt)


def said(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stop: Sequence[str] = (),
    *,
    is_streamed: bool = False,
    skips_special: bool = True,
) -> str:
    """An output's text; what was shown before its end is part of it."""
    end = OutputEnd(
        tracker(tokenizer, prompt, skips_special=skips_special),
        stop_ids={},
        stop_strings=stop,
        special_tokens=tokenizer.special_tokens,
        keeps_stop=False,
        num_left=len(tokens),
        limit_reason="length",
        is_streamed=is_streamed,
    )
    shown = ""
    for token in tokens:
        end.push(token)
        shown += end.take_text()
    assert end.reason == "length"
    assert shown == (end.whole_text() if is_streamed or stop else "")
    return end.whole_text()


# Halves of characters, lone bytes, what is decoded otherwise at a text's beginning.
HOT = {
    "byte_level": ids(BYTE_LEVEL, *SPECIAL, *map(letters, (b"\xe2", b"\x82\xac\xe2", b"\xff\xff")))
    + ids(BYTE_LEVEL, *map(letters, (b"a\xe2", b"\x82\xac", b"\xf0\x9f", b"\x98\x80b", b" the"))),
    "llama": ids(LLAMA, *SPECIAL, *names(b"\xe2\x82\xac\xf0\x9f\xff \xc3\xa9"))
    + ids(LLAMA, "▁", "▁▁▁▁", "▁a", "b", "\ufffd"),
    "metaspace": list(range(10)),
    "word_piece": list(range(16)),
}


def token_lists(name: str, min_size: int, max_size: int) -> st.SearchStrategy[list[int]]:
    either = st.sampled_from(HOT[name]) | st.integers(0, len(TOKENIZERS[name].inner) - 1)
    return st.lists(either, min_size=min_size, max_size=max_size)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_text_depends_on_the_tokens_alone(
    name: str, data: st.DataObject, skips_special: bool
) -> None:
    """Not on streaming, nor on stop strings that do not come, with special tokens or without."""
    tokenizer = TOKENIZERS[name]
    spoken = partial(said, tokenizer, skips_special=skips_special)
    decode = partial(tokenizer.decode, skip_special_tokens=skips_special)
    prompt = data.draw(token_lists(name, 0, 12))
    tokens = data.draw(token_lists(name, 1, 60))
    text = spoken(prompt, tokens)
    assert spoken(prompt, tokens, is_streamed=True) == text
    assert spoken(prompt, tokens, ["never", "\ufffd never"]) == text
    assert spoken(prompt, tokens, ["the never"], is_streamed=True) == text
    before = decode(prompt)
    if not before.endswith("\ufffd"):  # else the output may go on with a character of the prompt
        assert before + text == decode(prompt + tokens)


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        (["▁a", ":"], ["▁yes"], " yes"),
        (["▁a"], ["▁▁▁▁", "b"], "    b"),
        (["▁a", "</s>", "<|im_end|>"], ["▁yes"], " yes"),
        (["▁a", *["<|im_end|>"] * 100], ["<s>", "▁yes"], " yes"),
        # With nothing before it, the text begins here.
        ([], ["▁yes"], "yes"),
        (["<s>"], ["▁yes"], "yes"),
        (["<s>"], ["</s>", "▁▁▁▁", "b"], "   b"),
        # The piece that is left out is the prompt's.
        (["<s>", "▁"], ["▁yes"], " yes"),
        (["▁"] * 100, ["▁"] * 100, " " * 100),
        (["▁a", *names("é€".encode())], ["▁yes"], " yes"),
        (["▁a", *names("€".encode()[1:])], ["▁yes"], " yes"),
        # The prompt ends within a character: it is complete with the output, or never.
        (["▁a", *names("€".encode()[:2])], names("€".encode()[2:]), "€"),
        (["▁a", *names("€".encode()[:2])], ["▁yes"], " yes"),
        (["▁a", *names("€".encode()[:2])], [*names(b"\xff"), "b"], "\ufffdb"),
        (["▁a", "\ufffd"], ["b"], "b"),
        (["▁a", "\ufffd"], ["\ufffd"], "\ufffd"),
    ],
)
def test_a_continuation_is_what_it_adds_to_the_prompt(
    prompt: list[str], output: list[str], text: str
) -> None:
    before, tokens = ids(LLAMA, *prompt), ids(LLAMA, *output)
    assert said(LLAMA, before, tokens) == text
    assert said(LLAMA, before, tokens, is_streamed=True) == text


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["hot", "special", "one"])
def test_every_token_costs_the_same(name: str, kind: str) -> None:
    """At most a character waits, and few tokens are decoded, whatever has come before."""
    tokenizer = TOKENIZERS[name]
    last = ids(BYTE_LEVEL, letters(b"\x82")) if name == "byte_level" else HOT[name][-1:]
    parts = {"hot": HOT[name], "special": [2, 2, 0, HOT[name][-1]], "one": last}
    tokens = (parts[kind] * 400)[:400]
    sizes: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        sizes.append(len(token_ids))
        return tokenizer.decode(token_ids)

    follower = TextTracker(decode, (), tokenizer.special_tokens)
    shown = "".join(map(follower.push, tokens))
    assert max(sizes) <= 20
    assert len(sizes) <= 1.2 * len(tokens)
    whole = tokenizer.decode(tokens)
    assert len(shown) >= len(whole) - 1
    assert shown + follower.flush() == whole


def test_text_is_decoded_once_where_nobody_waits_for_it() -> None:
    calls: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        calls.append(len(token_ids))
        return "x" * len(token_ids)

    end = OutputEnd(
        TextTracker(decode, [1, 2]),
        stop_ids={},
        stop_strings=[],
        keeps_stop=False,
        num_left=10,
        limit_reason="length",
        is_streamed=False,
    )
    for token in range(10):
        end.push(token)
        assert end.take_text() == ""
    assert calls == [2]
    assert end.whole_text() == "x" * 10
    assert calls == [2, 12]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=12))
@example("é".encode() + b"\xff" + "😀".encode())
@example(b"\xf0\x9f\x98")
def test_a_byte_that_is_no_character_spoils_itself_alone(data: bytes) -> None:
    """Also among byte tokens, where transformers gives up all that stand together."""
    expected = data.decode(errors="replace")
    one_by_one = [letters(bytes([byte])) for byte in data]
    for tokenizer, spelled in ((LLAMA, names(data)), (BYTE_LEVEL, one_by_one)):
        tokens = ids(tokenizer, *spelled)
        whole = expected.removeprefix(" ") if tokenizer is LLAMA else expected
        assert tokenizer.decode(tokens) == whole
        with_special = [
            token for pair in zip(tokens, (1, 2, 3) * 4, strict=False) for token in pair
        ]
        assert tokenizer.decode(with_special) == whole


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("byte_level", letters(b"\xe2"), letters(b"\x82\xac")),
        ("byte_level", letters(b"\xe2"), letters(b"\x98\x80b")),
        ("llama", "<0xE2>", "<0x82>"),
        ("llama", "▁▁▁▁", "▁the"),
        ("metaspace", "c▁d", "▁the"),
        ("word_piece", "un", "##able"),
    ],
)
def test_ids_of_a_padded_vocabulary_say_nothing(name: str, first: str, last: str) -> None:
    """Between two tokens they change neither one's text, streamed or not, however many they are."""
    padded = Tokenizer(TOKENIZERS[name].inner, vocab_size=len(TOKENIZERS[name].inner) + 9)
    unused = list(range(padded.inner.vocab_size, padded.inner.vocab_size + 9))
    assert [padded.special_tokens[token] for token in unused] == [""] * 9
    (one,), (other,) = ids(padded, first), ids(padded, last)
    spoken = [one, one, other, one]
    text = said(padded, [], spoken)
    for gap in (unused[:1], unused * 4):
        tokens = [token for part in spoken for token in (part, *gap)]
        assert said(padded, gap, tokens) == text
        assert said(padded, gap, tokens, is_streamed=True) == text
        assert said(padded, [one, *gap], tokens) == said(padded, [one], spoken)


def test_special_tokens_are_those_left_out() -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.special_tokens == dict(enumerate(SPECIAL))
