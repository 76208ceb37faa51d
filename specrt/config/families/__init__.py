"""The families of targets: an entry each, which is all that a new one takes."""

from __future__ import annotations

from collections.abc import Mapping

from specrt.config.families.layer_normed import LAYER_NORMED
from specrt.config.families.llamas import LLAMAS
from specrt.config.families.normed import NORMED
from specrt.config.families.refused import why_refused
from specrt.config.family import Family

FAMILIES: Mapping[str, Family] = {**LLAMAS, **NORMED, **LAYER_NORMED}
"""By ``model_type``."""

__all__ = ["FAMILIES", "why_refused"]
