"""specrt: speculative decoding that changes nothing but the speed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specrt.draft.base import DraftParams
    from specrt.draft.length.control import ControlOptions
    from specrt.engine.async_engine import AsyncEngine
    from specrt.engine.engine import Engine
    from specrt.engine.results import (
        EngineStats,
        GenerationResult,
        RoundTree,
        StreamChunk,
        TokenLogprob,
    )
    from specrt.loading import generate, load
    from specrt.sampling import SamplingParams, StructuredOutput
    from specrt.types import CheckpointError, QueueFullError, RequestHandle

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "ControlOptions",
    "DraftParams",
    "Engine",
    "EngineStats",
    "GenerationResult",
    "QueueFullError",
    "RequestHandle",
    "RoundTree",
    "SamplingParams",
    "StreamChunk",
    "StructuredOutput",
    "TokenLogprob",
    "__version__",
    "generate",
    "load",
]

_HOMES = {
    "AsyncEngine": "specrt.engine.async_engine",
    "CheckpointError": "specrt.types",
    "ControlOptions": "specrt.draft.length.control",
    "DraftParams": "specrt.draft.base",
    "Engine": "specrt.engine.engine",
    "EngineStats": "specrt.engine.results",
    "GenerationResult": "specrt.engine.results",
    "QueueFullError": "specrt.types",
    "RequestHandle": "specrt.types",
    "RoundTree": "specrt.engine.results",
    "SamplingParams": "specrt.sampling",
    "StreamChunk": "specrt.engine.results",
    "StructuredOutput": "specrt.sampling",
    "TokenLogprob": "specrt.engine.results",
    "generate": "specrt.loading",
    "load": "specrt.loading",
}


def __getattr__(name: str) -> Any:
    """Import what a public name needs when it is first used.

    Importing torch takes seconds; ``specrt --help`` and asking for the version must not.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'specrt' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
