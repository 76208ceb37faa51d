"""The checkpoint's own tokenizer, through ``transformers``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from specrt.config import checkpoint_directory
from specrt.types import CheckpointError

# transformers makes up an empty tokenizer where a directory has none of these.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """Text to token ids and back, exactly as ``transformers`` does it.

    Args:
        inner: a ``transformers`` tokenizer.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens (bos) this tokenizer adds by itself."""
        return [int(token) for token in self.inner.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out and spaces as they are."""
        return str(
            self.inner.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation and the opening of the assistant's next turn.

        Args:
            messages: with ``role`` and ``content``.
            add_generation_prompt: False leaves that opening out.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError  # with transformers, not before

        if self.inner.chat_template is None:
            raise ValueError("prompt: chat messages given, but the tokenizer has no chat template")
        try:
            ids = self.inner.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
            )
        except TemplateError as error:
            raise ValueError(f"prompt: the chat template refuses it: {error}") from error
        return [int(token) for token in ids]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
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
        inner = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise bare Exception too
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error
    return Tokenizer(inner)
