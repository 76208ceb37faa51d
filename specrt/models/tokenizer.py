"""The checkpoint's own tokenizer, through ``transformers``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from specrt.config import checkpoint_directory
from specrt.types import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers makes up an empty tokenizer where a directory has none of these.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a directory's tokenizer, chat template included; nothing is downloaded or executed.

    Args:
        path: a local Hugging Face directory.

    Raises:
        CheckpointError: there is no tokenizer, or ``transformers`` cannot read it.
    """
    directory = checkpoint_directory(path)
    if not any((directory / name).is_file() for name in _FILES):
        raise CheckpointError(f"{directory}: no tokenizer (one of {', '.join(_FILES)})")
    # Imported here: transformers takes longer to import than all of specrt.
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise bare Exception too
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error
    return tokenizer
