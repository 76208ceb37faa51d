"""The last tokens of histories, whose lengths the host need not know."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "history_tail(Tensor history, Tensor history_len, Tensor(a!) tokens, Tensor(b!) start) -> ()",
    _C.history_tail,
)


def history_tail(
    history: torch.Tensor, history_len: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor
) -> None:
    """Copy the last W tokens of each history, the very last one in the last place.

    Of a history of fewer than W all places are counted from its first token on, and mean nothing
    behind its last. Lengths above T count as T.

    Args:
        history: ``[B, T]`` int32; rows may be strided.
        history_len: ``[B]`` int32.
        tokens: ``[B, W]`` int32, written; rows may be strided.
        start: ``[B]`` int32, written: where in the history the first of them stands.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or an input shares memory with an
            output; the argument is named.
    """
    op = torch.ops.specrt.history_tail if torch.compiler.is_compiling() else _C.history_tail
    op(history, history_len, tokens, start)
