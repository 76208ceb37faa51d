"""What a checkpoint directory says in words: a target's shape, and how its authors would sample.

Only what specrt computes exactly is accepted; all else is refused with one line that says what.
"""

from specrt.config.directory import checkpoint_directory, read_json
from specrt.config.generation import GenerationDefaults
from specrt.config.model import FLOAT8_FORMAT, ModelConfig, config_fingerprint

__all__ = [
    "FLOAT8_FORMAT",
    "GenerationDefaults",
    "ModelConfig",
    "checkpoint_directory",
    "config_fingerprint",
    "read_json",
]
