"""What a drafter's ``config.json`` says of the weights it was trained for, and what follows."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specrt.draft.eesd.checkpoint import ExitConfig
    from specrt.draft.fspad.checkpoint import DraftConfig


def target_entry(config: DraftConfig | ExitConfig) -> dict[str, str | None]:
    """The entry ``target``; it has an adapter only where one was merged."""
    said = {"name": config.target_name, "fingerprint": config.target_fingerprint}
    adapter = config.target_adapter
    return said if adapter is None else {**said, "adapter": adapter}


def note_adapter(path: str | os.PathLike[str], wanted: str | None, merged: str | None) -> None:
    """Say that a drafter was trained for its target with another LoRA adapter, or with none.

    It is no fault: texts stay the target's, and drafts are accepted less often.

    Args:
        path: the drafter's directory.
        wanted, merged: :func:`specrt.models.opening.adapter_hash` of the adapter it was trained
            for, and of the one that runs.
    """
    if wanted == merged:
        return
    made = "without a LoRA adapter" if wanted is None else f"with the LoRA adapter {wanted}"
    runs = "without" if merged is None else f"with {merged}"
    logging.getLogger("specrt").warning(
        "%s: trained for its target %s, which runs %s: expect fewer accepted drafts",
        path,
        made,
        runs,
    )
