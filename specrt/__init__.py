"""specrt: speculative decoding that changes nothing but the speed."""

from specrt.engine import Engine, GenerationResult, StreamChunk
from specrt.load import generate, load
from specrt.sampling import SamplingParams
from specrt.types import CheckpointError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Engine",
    "GenerationResult",
    "SamplingParams",
    "StreamChunk",
    "__version__",
    "generate",
    "load",
]
