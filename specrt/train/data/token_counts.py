"""How often a vocabulary's tokens occur in training data, from which reduced ones are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize

import torch

from specrt.draft.fspad.checkpoint import TOKEN_IDS
from specrt.models.tokenizer import load_tokenizer
from specrt.train.data.dataset import read_examples


@dataclass(frozen=True)
class TokenCounts:
    """How often each token of a vocabulary occurs in a corpus; both ``[V]`` int64."""

    said: torch.Tensor
    """By the assistant."""
    everywhere: torch.Tensor

    @property
    def ranking(self) -> torch.Tensor:
        """``[V]``: as ``said``, and below all of those, what only the others say."""
        return torch.where(self.said > 0, self.said + self.everywhere.sum(), self.everywhere)

    def coverage(self, tensors: dict[str, torch.Tensor]) -> str:
        """The share of what the assistant says that a reduced drafter can propose."""
        total = int(self.said.sum())
        share = int(self.said[tensors[TOKEN_IDS].long()].sum()) / total
        return f"they cover {100 * share:.2f}% of the corpus' {total} assistant tokens"


def count_tokens(
    corpus: Sequence[Path], directory: str | Path, vocab_size: int, *, skip_bad: bool = False
) -> TokenCounts:
    """Count the tokens of training data.

    Args:
        corpus: files as :func:`specrt.train.data.dataset.read_examples` reads them.
        directory: of the target, whose tokenizer reads them.
        vocab_size: V.
        skip_bad: leave malformed lines out.

    Raises:
        ValueError: a file is malformed, or has token ids of another vocabulary.
        OSError: a file cannot be read.
    """
    dataset = read_examples(
        corpus, load_tokenizer(directory), max_length=maxsize, skip_bad=skip_bad
    )
    if int(dataset.token_ids.max()) >= vocab_size:
        raise ValueError(
            f"corpus: expected token ids below {vocab_size}, got {int(dataset.token_ids.max())}"
        )
    said = dataset.token_ids[dataset.loss_mask].bincount(minlength=vocab_size)
    return TokenCounts(said, dataset.token_ids.bincount(minlength=vocab_size))
