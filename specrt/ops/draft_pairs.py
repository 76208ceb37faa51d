"""What a drafter over the target's features runs next, whose number the host need not know."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "draft_pairs(Tensor taps, Tensor path, Tensor num_path, Tensor history, Tensor history_len, "
    "Tensor(a!) features, Tensor(b!) tokens, Tensor(c!) source, Tensor(d!) kv_len, "
    "Tensor(e!) kv_len_after, Tensor(f!) num_earlier, Tensor(g!) bits, bool are_kept) -> ()",
    _C.draft_pairs,
)


def draft_pairs(
    taps: torch.Tensor,
    path: torch.Tensor,
    num_path: torch.Tensor,
    history: torch.Tensor,
    history_len: torch.Tensor,
    features: torch.Tensor,
    tokens: torch.Tensor,
    source: torch.Tensor,
    kv_len: torch.Tensor,
    kv_len_after: torch.Tensor,
    num_earlier: torch.Tensor,
    bits: torch.Tensor,
    *,
    are_kept: bool,
) -> None:
    """Take the features of an accepted path, and say where the pairs that wait belong.

    A pair is the feature of a token and the token behind it. What a sequence has waiting are its
    last ones, up to P of them, in the first of its places; a history of T tokens has T - 1 pairs.
    Contents may be anything, and reach no other memory.

    Args:
        taps: ``[B, N, H]``, the target's features of the verified nodes; may be strided.
        path: ``[B, D]`` int32, the accepted nodes from the root down.
        num_path: ``[B]`` int32, how many of them count: tokens that were appended.
        history: ``[B, T]`` int32, with these tokens; rows may be strided.
        history_len: ``[B]`` int32.
        features: ``[B, P, H]`` of the taps' dtype, written where new pairs lie; P <= 64.
        tokens: ``[P, B]`` int32, written: of the last pairs in row 0, then of the earlier ones.
        source: ``[B]`` int32, written: ``b * P`` and the place of the last pair.
        kv_len: ``[B]`` int32: pairs that were run. Read if pairs are kept, else written.
        kv_len_after: ``[B]`` int32, written: all pairs.
        num_earlier: ``[B]`` int32, written: pairs that wait before the last one.
        bits: ``[B, W]`` int64, written: one for each pair that waits, and at least one.
        are_kept: whether pairs that had been waiting go on waiting, in front of the new ones.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or an input shares memory with an
            output; the argument is named.
    """
    op = torch.ops.specrt.draft_pairs if torch.compiler.is_compiling() else _C.draft_pairs
    op(
        taps,
        path,
        num_path,
        history,
        history_len,
        features,
        tokens,
        source,
        kv_len,
        kv_len_after,
        num_earlier,
        bits,
        are_kept,
    )
