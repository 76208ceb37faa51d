"""Who decodes with whom: on a GPU, those that need the host each round apart from the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specrt.cache import KVCache
from specrt.engine.batch import Batch
from specrt.engine.request import Request


class Batches:
    """All that decode. On a CPU, where each round is the host's, they are one batch.

    On a GPU a round of launches alone is for those who need nothing else; what others need between
    its stages would keep them all waiting. So these have a batch of their own.

    Args:
        cache: the target's.
        max_batch: requests there may be.
        vocab_size: V.
    """

    def __init__(self, cache: KVCache, max_batch: int, vocab_size: int) -> None:
        self.launched = Batch(cache, max_batch, vocab_size)
        """Whose rounds may be launches alone."""
        self._hosted = self.launched
        if cache.device.is_gpu:
            self._hosted = Batch(cache, max_batch, vocab_size)

    def __iter__(self) -> Iterator[Batch]:
        """Those in which somebody decodes, or did when this was asked for."""
        # No generator: an interrupt's way out would close it, a call in which a further Ctrl-C
        # is not known to be one.
        both = self.launched, self._hosted
        some = both[: 1 if self._hosted is self.launched else 2]
        return iter([batch for batch in some if len(batch)])

    @property
    def requests(self) -> Sequence[Request]:
        """All of them."""
        if self._hosted is self.launched:
            return self.launched.requests
        return [*self.launched.requests, *self._hosted.requests]

    def join(self, request: Request) -> None:
        """A request decodes from now on."""
        (self._hosted if request.needs_host else self.launched).join(request)

    def leave(self, request: Request) -> None:
        """A request decodes no more; one that does not anyway changes nothing."""
        self.launched.leave(request)
        self._hosted.leave(request)

    def clear(self) -> None:
        """Nobody decodes any more, whatever an interrupt has left half written."""
        self.launched.clear()
        self._hosted.clear()
