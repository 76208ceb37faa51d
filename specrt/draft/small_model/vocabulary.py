"""Whether a smaller model means the same tokens by the same ids as the target it drafts for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specrt.models.tokenizer import load_tokenizer, tokenizer_file
from specrt.types import CheckpointError


def check_vocabulary(
    directory: Path, vocab_size: int, target: Path | None, target_size: int
) -> None:
    """Refuse a model of another tokenizer; tables of different sizes are no reason.

    Tokenizers decide: the same file, byte for byte, or else the same ordinary token at every id
    that both have. Special tokens may differ, since models of one family name them differently.
    Where a directory has no tokenizer, nothing says what its ids mean: sizes must be equal.

    Args:
        directory: of the smaller model.
        vocab_size: rows of its embedding.
        target: the target's directory or GGUF file; None: not known.
        target_size: rows of the target's embedding.

    Raises:
        CheckpointError: the tokenizers differ, or cannot be compared and the sizes differ.
    """
    file = tokenizer_file(directory)
    theirs = None if target is None else tokenizer_file(target)
    if target is None or file is None or theirs is None:
        if vocab_size != target_size:
            raise CheckpointError(
                f"{directory / 'config.json'}: a drafter without the target's tokenizer needs its "
                f"vocabulary of {target_size}, got {vocab_size}"
            )
        return
    if file.name == theirs.name and _is_same_file(file, theirs):
        return
    ours, others = _ordinary_tokens(directory), _ordinary_tokens(target)
    for number in sorted(ours.keys() & others.keys()):
        if ours[number] != others[number]:
            raise CheckpointError(
                f"{file}: a drafter needs the target's tokenizer: token {number} "
                f"is {ours[number]!r} here and {others[number]!r} in {target}"
            )


def _is_same_file(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()


def _ordinary_tokens(directory: Path) -> dict[int, str]:
    """By id; padding has none."""
    inner: Any = load_tokenizer(directory).inner
    added = inner.get_added_vocab()
    return {number: token for token, number in inner.get_vocab().items() if token not in added}
