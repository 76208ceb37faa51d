"""The entry of Token Recycling among the kinds of drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specrt.draft.kind import DrafterRequest, Kind

if TYPE_CHECKING:
    from specrt.draft.base import Drafter


def _load(request: DrafterRequest) -> Drafter:
    from specrt.draft.recycle.drafter import RecycleDrafter
    from specrt.draft.recycle.on_device import DeviceRecycleDrafter

    vocab_size, device = request.target.config.vocab_size, request.target.device
    return DeviceRecycleDrafter(vocab_size, device) if device.is_gpu else RecycleDrafter(vocab_size)


RECYCLE = Kind("recycle", "what the target found likely behind the same tokens before", _load)
