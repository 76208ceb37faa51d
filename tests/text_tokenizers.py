"""Small tokenizers of every kind of decoder, with a few special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specrt.models.tokenizer import Tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
"""Ids 0 to 3."""
BYTES = [bytes([byte]) for byte in range(256)]


def _tokenizer(pieces: Iterable[str], decoder: decoders.Decoder, **options: bool) -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    inner = Inner(models.BPE(vocab, merges=[], unk_token="<unk>", **options))
    inner.decoder = decoder
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


def byte_level() -> Tokenizer:
    """GPT-2's form: 256 bytes, and tokens with parts of characters at either or both ends."""
    parts = [
        b" the",
        b"a\xe2",
        b"\x82\xac\xe2",
        b"\x82\xac",
        b"\xf0\x9f",
        b"\x98\x80b",
        b"\xff\xff",
    ]
    return _tokenizer(map(letters, [*BYTES, *parts]), decoders.ByteLevel())


def printable() -> Tokenizer:
    """97 tokens: the special ones, and a character each from the space on."""
    return _tokenizer(map(letters, BYTES[32:125]), decoders.ByteLevel())


def llama() -> Tokenizer:
    """Llama 2's form: spaces as pieces, the first of a text left out, and bytes."""
    pieces = ["▁", "▁▁", "▁▁▁▁", "▁a", "b", ":", "▁yes", "▁the", "yes", "\ufffd", "é"]
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return _tokenizer(
        [*names(bytes(range(256))), *pieces], decoders.Sequence(steps), byte_fallback=True
    )


def metaspace() -> Tokenizer:
    """T5's form: all spaces of a text's first piece are left out."""
    return _tokenizer(["▁", "▁▁▁", "▁a", "b", "c▁d", "▁the"], decoders.Metaspace())


def word_piece() -> Tokenizer:
    """BERT's form: what follows decides on spaces, and they are cleaned up."""
    pieces = ["do", "not", "n't", "un", "##able", "##é", ".", "'", "s", "'s", "!", "é"]
    return _tokenizer(pieces, decoders.WordPiece(cleanup=True))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama": llama,
    "metaspace": metaspace,
    "word_piece": word_piece,
}


def ids(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """Ids of pieces, spelled as in the vocabulary."""
    found: list[int] = tokenizer.inner.convert_tokens_to_ids(list(pieces))
    assert pieces == tuple(tokenizer.inner.convert_ids_to_tokens(found))
    return found


def letters(data: bytes) -> str:
    """How a byte-level vocabulary spells bytes."""
    return "".join(bytes_to_unicode()[byte] for byte in data)


def names(data: bytes) -> list[str]:
    """SentencePiece's byte tokens."""
    return [f"<0x{byte:02X}>" for byte in data]
