"""The entry of prompt lookup among the kinds of drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specrt.draft.kind import DrafterRequest, Kind

if TYPE_CHECKING:
    from specrt.draft.base import Drafter


def _load(request: DrafterRequest) -> Drafter:
    from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
    from specrt.draft.prompt_lookup.on_device import DevicePromptLookupDrafter

    device = request.target.device
    return DevicePromptLookupDrafter(device) if device.is_gpu else PromptLookupDrafter()


PROMPT_LOOKUP = Kind("prompt-lookup", "what followed the same words before", _load)
