"""Accepted rows into place: the one change a round makes to the cache."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops import registry

registry.register(
    "kv_commit(Tensor(a!) kv, Tensor block_table, Tensor path, Tensor num_path, Tensor(b!) kv_len,"
    " Tensor(c!)? tickets, bool is_last) -> ()",
    _C.kv_commit,
)


def kv_commit(
    kv: torch.Tensor,
    block_table: torch.Tensor,
    path: torch.Tensor,
    num_path: torch.Tensor,
    kv_len: torch.Tensor,
    tickets: torch.Tensor | None = None,
    *,
    is_last: bool = True,
) -> None:
    """Move slot ``kv_len + path[j]`` to ``kv_len + j``, j < num_path; then advance ``kv_len``.

    Where several caches hold rows of the same sequences, each with a table of its own, they are
    given one after another, and the last one advances.

    Contents out of range reach no other memory: a slot that the table lacks is left alone, a page
    that the cache lacks is its last.

    Args:
        kv: ``[L, 2, P, page_size, Hkv, d]`` float32, bfloat16 or float16, contiguous.
        block_table: ``[B, max_pages]`` int32.
        path: ``[B, D]`` int32, node indices, strictly increasing within ``num_path``.
        num_path: ``[B]`` int32; 0 or less commits nothing.
        kv_len: ``[B]`` int32, committed slots, advanced in place.
        tickets: ``[B]`` int32, zero before and after, with which the thread blocks of a GPU agree
            who is last; made if not given. The CPU needs none.
        is_last: False leaves ``kv_len`` as it is: another cache follows.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    kernel = torch.ops.specrt.kv_commit if torch.compiler.is_compiling() else _C.kv_commit
    if tickets is None and registry.is_on_gpu(kv):
        tickets = torch.zeros_like(num_path)
    kernel(kv, block_table, path, num_path, kv_len, tickets, is_last)
