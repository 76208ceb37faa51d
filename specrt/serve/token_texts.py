"""Single tokens as text and bytes, for log-probabilities and trees."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from specrt.models.tokenizer import Tokenizer

_SPACE = "▁"


class TokenTexts:
    """What each token stands for by itself; those of an output, one behind another, are its bytes.

    Args:
        tokenizer: whose tokens they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._letters = _letters_of_bytes() if _is_byte_level(tokenizer.inner) else {}
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)
        """The bytes of a token id."""
        self.text_of = lru_cache(maxsize=1 << 16)(self._text_of)
        """The same as text; what is no UTF-8 becomes U+FFFD."""

    def _text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", "replace")

    def _bytes_of(self, token: int) -> bytes:
        special = self._tokenizer.special_tokens.get(token)
        if special is not None:
            return special.encode()
        name = self._tokenizer.inner.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""
        if self._letters and all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace(_SPACE, " ").encode()


def _is_byte_level(inner: Any) -> bool:
    """Whether tokens are written in GPT-2's letters for bytes."""
    names = inner.convert_ids_to_tokens(inner.encode("a a", add_special_tokens=False))
    return any("Ġ" in name for name in names)


def _letters_of_bytes() -> dict[str, int]:
    """The byte of each of GPT-2's letters: printable ones stand for themselves, the others for
    those from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
