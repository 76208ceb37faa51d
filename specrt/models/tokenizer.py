"""The checkpoint's own tokenizer, through ``transformers``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from specrt.config import checkpoint_directory
from specrt.models.chat import check_characters, template_messages
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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: what a chat template has made begins with bos already; a second one is warned of.
            add_special_tokens: with those that this tokenizer adds by itself (bos).

        Raises:
            ValueError: half a surrogate pair, which is no character; names its position.
        """
        ids = self.inner.encode(
            check_characters("prompt", text), add_special_tokens=add_special_tokens
        )
        if ids[:2] == [self.inner.bos_token_id] * 2 and add_special_tokens:
            warnings.warn(
                f"the text begins with {self.inner.bos_token!r} and the tokenizer adds another; "
                "add_special_tokens=False leaves that out",
                stacklevel=2,
            )
        return [int(token) for token in ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out and spaces as they are."""
        return str(
            self.inner.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation and the opening of the assistant's next turn.

        Args:
            messages: with ``role`` and ``content``, which is text or parts of text.
            add_generation_prompt: False leaves that opening out.

        Raises:
            ValueError: the tokenizer has no chat template, the template refuses the messages, or
                one of them is not well-formed (named by its index).
        """
        template = self.inner.chat_template
        if template is None:
            raise ValueError("prompt: chat messages given, but the tokenizer has no chat template")
        render = partial(self._render, add_generation_prompt=add_generation_prompt)
        knows_tool_calls = "tool_calls" in str(template)
        text = render(template_messages(messages, render, knows_tool_calls=knows_tool_calls))
        return self.encode(text, add_special_tokens=False)

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError  # with transformers, not before

        try:
            return str(
                self.inner.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            raise ValueError(f"prompt: the chat template refuses it: {error}") from error
        except Exception as error:  # whatever a template's expressions can raise
            raise ValueError(
                f"prompt: the chat template fails: {type(error).__name__}: {error}"
            ) from error


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
