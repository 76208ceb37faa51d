"""What a checkpoint says in words: a target's shape, and how its authors would sample.

Only what specrt computes exactly is accepted; all else is refused with one line that says what.
"""

from specrt.config.directory import (
    check_file,
    checkpoint_directory,
    checkpoint_path,
    config_file,
    gguf_path,
    read_json,
)
from specrt.config.foreign import foreign_files, foreign_tensors
from specrt.config.form import Form, LayerKind
from specrt.config.generation import GenerationDefaults
from specrt.config.hub import hub_name, local_path
from specrt.config.model import FLOAT8_FORMAT, ModelConfig, config_fingerprint

__all__ = [
    "FLOAT8_FORMAT",
    "Form",
    "GenerationDefaults",
    "LayerKind",
    "ModelConfig",
    "check_file",
    "checkpoint_directory",
    "checkpoint_path",
    "config_file",
    "config_fingerprint",
    "foreign_files",
    "foreign_tensors",
    "gguf_path",
    "hub_name",
    "local_path",
    "read_json",
]
