"""Paged keys and values.

A :class:`KVCache` owns the pages; a :class:`CacheBatch` is the sequences that run together. Forward
passes write rows past ``kv_len``; only :meth:`CacheBatch.commit` makes them part of a sequence, so
that abandoning a round needs no undo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specrt import ops
from specrt.config import ModelConfig
from specrt.ops import registry

SCRATCH_PAGE = 0
"""No sequence's: a write past a sequence's pages lands here, and never in a neighbour's."""


@dataclass(eq=False)
class CachedSequence:
    """One sequence's pages and how many of its tokens they hold."""

    pages: list[int]
    """None once it is closed."""
    length: int = 0


class KVCache:
    """The pages of one model: ``kv [L, 2, P, page_size, Hkv, d]``, the first of them for scratch.

    It grows when sequences ask for more pages than there are; ``on_move`` is then called, because
    recorded graphs hold the old addresses.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        page_size: int = 64,
        on_move: Callable[[], None] = lambda: None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_size = page_size
        self._shape = (config.num_layers, 2, 1, page_size, config.num_kv_heads, config.head_dim)
        self._on_move = on_move
        self.kv = torch.zeros(self._shape, dtype=dtype, device=device)
        self._free: list[int] = []

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self.kv.device

    @property
    def num_pages(self) -> int:
        """Pages for sequences, free ones included."""
        return self.kv.shape[2] - 1

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence holds."""
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        layers, two, _, rows, heads, width = self._shape
        return layers * two * rows * heads * width * self.kv.element_size()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of a layer, each ``[P, page_size, Hkv, d]``."""
        return self.kv[index, 0], self.kv[index, 1]

    def open(self, num_tokens: int) -> CachedSequence:
        """Reserve pages for a sequence that will write at most ``num_tokens`` rows.

        Raises:
            MemoryError: there is no memory for them; says how much was needed.
        """
        needed = -(-num_tokens // self.page_size)
        if needed > len(self._free):
            self._grow(needed - len(self._free))
        pages = [self._free.pop() for _ in range(needed)]
        return CachedSequence(pages)

    def close(self, sequence: CachedSequence) -> None:
        """Give a sequence's pages back; closed again it has none to give."""
        pages, sequence.pages = sequence.pages, []
        self._free.extend(pages)

    def retire(self) -> None:
        """Give the memory back for good, if no sequence holds a page of it."""
        if self.num_free_pages == self.num_pages:
            self._free.clear()
            self.kv = self.kv.new_zeros(self._shape)
            self._on_move()
            self._on_move = _refuse

    def _grow(self, num_more: int) -> None:
        old = self.kv.shape[2]
        shape = (*self._shape[:2], old + num_more, *self._shape[3:])
        try:
            # Zeros, not empty: fresh pages come from the system untouched and cost no memory yet.
            grown = torch.zeros(shape, dtype=self.kv.dtype, device=self.device)
        except (RuntimeError, MemoryError) as error:
            needed = (old + num_more) * self.page_bytes
            raise MemoryError(
                f"KV cache: no memory for {old + num_more} pages of {self.page_size} tokens, "
                f"{needed / 2**20:.0f} MiB"
            ) from error
        grown[:, :, :old] = self.kv
        self.kv = grown
        self._free.extend(range(old + num_more - 1, old - 1, -1))
        self._on_move()


def _refuse() -> None:
    raise RuntimeError("KV cache: expected one in use, got one whose memory was given back")


class CacheBatch:
    """The sequences of one forward pass, as the tables the kernels read.

    ``block_table [B, max_pages]`` and ``kv_len [B]``, both int32, lie where the pages do. Lengths
    are also counted on the host, so that nobody waits for a GPU to learn them.
    """

    def __init__(self, cache: KVCache, sequences: Sequence[CachedSequence]) -> None:
        self.cache = cache
        self.sequences = list(sequences)
        # A power of two, so that few different widths (and recorded graphs) come up.
        most = 1 << max(3, (max(len(s.pages) for s in sequences) - 1).bit_length())
        # No kernel reads past kv_len + num_nodes, where the scratch pages lie.
        scratch = [SCRATCH_PAGE]
        rows = [sequence.pages + scratch * (most - len(sequence.pages)) for sequence in sequences]
        self.block_table = self._there(torch.tensor(rows, dtype=torch.int32))
        lengths = [sequence.length for sequence in sequences]
        self.kv_len = self._there(torch.tensor(lengths, dtype=torch.int32))
        # The CUDA kernel's, zero between launches; made here, so that committing allocates nothing.
        self._tickets = torch.zeros_like(self.kv_len) if registry.is_on_gpu(self.kv_len) else None

    @property
    def num_positions(self) -> int:
        """No row's position reaches this: each is at most the row's place in its pages."""
        return self.block_table.shape[1] * self.cache.page_size

    def commit(self, path: torch.Tensor, num_path: torch.Tensor) -> None:
        """Move the accepted rows into place and make them part of their sequences.

        Args:
            path: ``[B, D]`` int32 on the host, node indices from the root down.
            num_path: ``[B]`` int32 on the host, how many of each row count; 0 or less commits
                nothing.
        """
        ops.kv_commit(
            self.cache.kv,
            self.block_table,
            self._there(path),
            self._there(num_path),
            self.kv_len,
            self._tickets,
        )
        for sequence, count in zip(self.sequences, num_path.tolist(), strict=True):
            sequence.length += min(max(0, count), path.shape[1])  # as the kernel does

    def _there(self, table: torch.Tensor) -> torch.Tensor:
        device = self.cache.device
        return may_be_reused(table, device).to(device, non_blocking=True)


def may_be_reused(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``table`` as a copy to ``device`` that nobody waits for may read it.

    From the host to a GPU it is read later, maybe after it was freed and written again: CUDA copies
    ordinary memory aside first where it cannot read it, and promises nothing where it can. So the
    table is copied into pinned memory, which torch does not hand out again before it was read.
    """
    return table.pin_memory() if device.type == "cuda" and not table.is_cuda else table


class LastBatch:
    """The batch of the sequences that ran last: made anew only when others run.

    Args:
        cache: theirs.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._batch: CacheBatch | None = None

    def of(self, sequences: list[CachedSequence]) -> CacheBatch:
        """The batch of ``sequences``, in this order."""
        if self._batch is None or self._batch.sequences != sequences:
            self._batch = CacheBatch(self._cache, sequences)
        return self._batch

    def forget(self) -> None:
        """A sequence was extended through another batch, or has left."""
        self._batch = None
