"""Which tokens the target found likely behind each token, the last time it was asked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from specrt.draft.recycle.template import NUM_RANKS

_BLOCK = 64
_SMALL = 8192  # vocabularies up to here are sorted as they are


class NextTokens:
    """The likeliest next tokens of each token, by rank.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        # One row more, of no token: what is behind a token that is not known is not known either.
        self._rows = np.full((vocab_size + 1, NUM_RANKS), -1, dtype=np.int32)
        self._is_own = np.zeros(vocab_size + 1, dtype=bool)  # learned since it was copied

    def copy(self) -> NextTokens:
        """What is known so far; what either learns then, the other does not know."""
        made = object.__new__(NextTokens)
        made._rows, made._is_own = self._rows.copy(), np.zeros_like(self._is_own)
        return made

    def merge(self, copy: NextTokens) -> None:
        """Take over what a copy has learned."""
        self._rows[copy._is_own] = copy._rows[copy._is_own]

    def behind(
        self, tokens: npt.NDArray[np.int32], ranks: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        """The tokens of these ranks; -1 where nothing is known, and behind -1."""
        return self._rows[tokens, ranks]

    def learn(self, tokens: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]) -> None:
        """Take what came behind ``tokens [n]``: ``ids [n, R]``. Of equal tokens the last counts."""
        self._rows[tokens, : ids.shape[1]] = ids
        self._is_own[tokens] = True


def likeliest(logits: torch.Tensor) -> npt.NDArray[np.int32]:
    """The ids of the highest logits of each row, the highest first.

    Exact, in a seventh of the time of a sort that carries indices through all of a large
    vocabulary: only the blocks of the highest maxima can hold them.

    Args:
        logits: ``[n, V]`` float32.

    Returns:
        ``[n, min(R, V)]``.
    """
    if logits.shape[1] <= _SMALL:
        count = min(NUM_RANKS, logits.shape[1])
        return logits.topk(count, dim=1).indices.int().numpy()
    num_blocks = logits.shape[1] // _BLOCK
    end = num_blocks * _BLOCK
    maxima = logits[:, :end].view(-1, num_blocks, _BLOCK).amax(dim=2)
    blocks = maxima.topk(NUM_RANKS, dim=1).indices
    ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK)).view(len(logits), -1)
    rest = torch.arange(end, logits.shape[1]).expand(len(logits), -1)
    ids = torch.cat([ids, rest], dim=1)
    best = logits.gather(1, ids).topk(NUM_RANKS, dim=1).indices
    return ids.gather(1, best).int().numpy()
