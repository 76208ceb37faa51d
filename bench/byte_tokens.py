"""A vocabulary of bytes, one merge, and names that no text has: enough for random weights."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel

MERGES = [("Ġ", "t")]
BOS, EOS = "<bos>", "<eos>"


def byte_tokens(vocab_size: int) -> list[str]:
    """All tokens by id; :data:`BOS` and :data:`EOS` are the last two.

    Args:
        vocab_size: 259 at the least.
    """
    known = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    unused = vocab_size - len(known) - 2
    if unused < 0:
        raise ValueError(f"vocab_size: expected at least {len(known) + 2}, got {vocab_size}")
    return [*known, *(f"<unused{index}>" for index in range(unused)), BOS, EOS]
