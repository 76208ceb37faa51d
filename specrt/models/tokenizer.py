"""The checkpoint's own tokenizer, through ``transformers``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from specrt.config import check_file, checkpoint_directory, gguf_path, read_json
from specrt.config.gguf_header import read_gguf_header
from specrt.models.chat import check_characters, template_messages
from specrt.types import CheckpointError

# The first that is there; transformers makes up an empty tokenizer where there is none.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Parameters of transformers' call, a template of one's own among them.
_NO_VARIABLES = (
    *("conversation", "messages", "chat_template", "tokenize", "tokenizer_kwargs", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "continue_final_message"),
    *("return_assistant_tokens_mask", "tools", "add_generation_prompt", "documents"),
)
# Texts on which a converted tokenizer may differ from SentencePiece.
_PROBES = ("a", " a", "  ", "The quick  brown\n\tfox, 1234.5 ", "é…€😀中")


class Tokenizer:
    """Text to token ids and back, exactly as ``transformers`` does it.

    Args:
        inner: a ``transformers`` tokenizer.
        doubles_space: whether a space that begins a text needs another before it, where
            SentencePiece puts its prefix and ``transformers`` does not.
        vocab_size: V of the model, whose table may be padded beyond the tokens; 0: not known.
    """

    def __init__(self, inner: Any, *, doubles_space: bool = False, vocab_size: int = 0) -> None:
        self.inner = inner
        self._doubles_space = doubles_space
        self._vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: what a chat template has made begins with bos already; a second one is warned of.
            add_special_tokens: with those that this tokenizer adds by itself (bos).

        Raises:
            ValueError: half a surrogate pair, which is no character; names its position.
        """
        check_characters("prompt", text)
        if self._doubles_space and text.startswith((" ", "▁")):
            text = " " + text
        ids = self.inner.encode(text, add_special_tokens=add_special_tokens)
        if ids[:2] == [self.inner.bos_token_id] * 2 and add_special_tokens:
            warnings.warn(
                f"the text begins with {self.inner.bos_token!r} and the tokenizer adds another; "
                "add_special_tokens=False leaves that out",
                stacklevel=2,
            )
        return [int(token) for token in ids]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, spaces as they are, special tokens left out unless they are not to be.

        Byte tokens that are no UTF-8 spoil nothing but themselves, as in SentencePiece; in
        ``transformers`` each byte of the whole run becomes a U+FFFD.
        """
        text = self._decode(token_ids, skip_special_tokens)
        if "\ufffd" in text and self._byte_tokens:
            ids = self._as_characters(token_ids, skip_special_tokens)
            return self._decode(ids, skip_special_tokens)
        return text

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that :meth:`decode` leaves out, with their own text.

        Ids below the model's vocabulary size that no token has are among them, with none.
        """
        unused = {*range(self._vocab_size)}.difference(self.inner.get_vocab().values())
        added = self.inner.added_tokens_decoder
        special = {token for token, entry in added.items() if entry.special}
        special.update(self.inner.all_special_ids)
        special.discard(None)  # of a special token that is named and is no token
        return dict.fromkeys(sorted(unused), "") | {
            token: str(self.inner.convert_ids_to_tokens(token))
            for token in sorted(special)
            if not self._decode([token])
        }

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """The byte that a token stands for, where all 256 have one (SentencePiece)."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        tokens = self.inner.convert_tokens_to_ids(names)
        if None in tokens or self.inner.convert_ids_to_tokens(tokens) != names:
            return {}
        if self._decode([tokens[ord("A")]]) != "A":
            return {}
        return {token: byte for byte, token in enumerate(tokens)}

    def _as_characters(self, token_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        """The same tokens, with bytes that are no UTF-8 replaced by those of U+FFFD."""
        tokens = list(self._byte_tokens)
        left_out = self.special_tokens if skip_special_tokens else ()
        spoken = (token for token in token_ids if token not in left_out)
        fixed: list[int] = []
        for is_bytes, run in groupby(spoken, self._byte_tokens.__contains__):
            if is_bytes:
                data = bytes(self._byte_tokens[token] for token in run)
                fixed += [tokens[byte] for byte in data.decode(errors="replace").encode()]
            else:
                fixed += run
        return fixed

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(
            self.inner.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return "tools" in str(self.inner.chat_template)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation and the opening of the assistant's next turn.

        Args:
            messages: with ``role`` and ``content``, which is text or parts of text.
            add_generation_prompt: False leaves that opening out.
            tools: functions that may be called, in OpenAI's form.
            options: further variables of the template (``enable_thinking``).

        Raises:
            ValueError: the tokenizer has no chat template, the template refuses the messages, it
                has no place for tools, or a message is not well-formed (named by its index).
        """
        template = self.inner.chat_template
        if template is None:
            raise ValueError("prompt: chat messages given, but the tokenizer has no chat template")
        if tools and not self.takes_tools:
            raise ValueError("tools: this model's chat template has no place for them")
        for name in set(options or ()).intersection(_NO_VARIABLES):
            raise ValueError(f"options: expected variables of the chat template, got {name!r}")
        given = {**(options or {}), "add_generation_prompt": add_generation_prompt}
        render = partial(self._render, options=given | ({"tools": [*tools]} if tools else {}))
        knows_tool_calls = "tool_calls" in str(template)
        text = render(template_messages(messages, render, knows_tool_calls=knows_tool_calls))
        return self.encode(text, add_special_tokens=False)

    def _render(self, messages: list[dict[str, Any]], *, options: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError  # with transformers, not before

        try:
            return str(self.inner.apply_chat_template(messages, tokenize=False, **options))
        except TemplateError as error:
            raise ValueError(f"prompt: the chat template refuses it: {error}") from error
        except Exception as error:  # whatever a template's expressions can raise
            raise ValueError(
                f"prompt: the chat template fails: {type(error).__name__}: {error}"
            ) from error


def tokenizer_file(path: str | os.PathLike[str]) -> Path | None:
    """What a checkpoint's tokenizer is read from: a file of its directory, or a GGUF file.

    Raises:
        CheckpointError: a directory has several GGUF files.
    """
    gguf = gguf_path(path)
    files = [gguf] if gguf is not None else [Path(path) / name for name in _FILES]
    return next((file for file in files if file.is_file()), None)


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int = 0) -> Tokenizer:
    """Load a directory's tokenizer, chat template included; nothing is downloaded or executed.

    Args:
        path: a local Hugging Face directory. Of several forms ``tokenizer.json`` goes first, then
            SentencePiece's ``tokenizer.model``, whose own ids are given. Or a GGUF file.
        vocab_size: as for :class:`Tokenizer`.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read as what it should be.
    """
    gguf = gguf_path(path)
    if gguf is not None:
        from specrt.models.gguf_tokenizer import gguf_tokenizer  # which makes one of this class

        return gguf_tokenizer(read_gguf_header(gguf))
    file = _checked_file(path)
    try:
        if file.suffix == ".model":
            return _from_sentencepiece(file, vocab_size)
        # Imported here: transformers takes longer to import than all of specrt.
        from transformers import AutoTokenizer

        return Tokenizer(_read(AutoTokenizer, file), vocab_size=vocab_size)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise bare Exception too
        raise CheckpointError(_fault(file, error)) from error


def _read(kind: Any, file: Path, **options: Any) -> Any:
    return kind.from_pretrained(
        file.parent, local_files_only=True, trust_remote_code=False, **options
    )


def _from_sentencepiece(file: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a directory without ``tokenizer.json``.

    Raises:
        CheckpointError: the file is none of SentencePiece's, or ``transformers`` gives other ids.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model") from error
    config = file.with_name("tokenizer_config.json")
    # Where nothing is said, transformers 4 adds bos: such directories were made for it.
    options = {"add_bos_token": True} | (read_json(config) if config.is_file() else {})
    has_bos = bool(options["add_bos_token"])
    inner = _read(AutoTokenizer, file, add_bos_token=has_bos)
    if type(inner) is PreTrainedTokenizerFast:  # no class is named, and the prefix space is lost
        inner = _read(LlamaTokenizer, file, add_bos_token=has_bos)
    for doubles_space in (False, True):
        tokenizer = Tokenizer(inner, doubles_space=doubles_space, vocab_size=vocab_size)
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in _PROBES]
        if ids == [model.encode(text) for text in _PROBES]:
            return tokenizer
    kind = type(inner).__name__
    raise CheckpointError(f"{file}: {kind} of transformers gives other ids than SentencePiece")


def _checked_file(path: str | os.PathLike[str]) -> Path:
    """The file that a directory's tokenizer is read from, with what it needs beside it."""
    directory = checkpoint_directory(path)
    file = tokenizer_file(directory)
    if file is None:
        reason = _remote_code(directory) or f"{directory}: no tokenizer"
        if (directory / "tekken.json").is_file():
            reason = f"{directory / 'tekken.json'}: a tokenizer in Mistral's own form"
        raise CheckpointError(f"{reason}; expected one of {', '.join(_FILES)}")
    check_file(file)
    if file.name == "vocab.json" and not file.with_name("merges.txt").is_file():
        raise CheckpointError(f"{file}: expected merges.txt beside it, found none")
    return file


def _fault(file: Path, error: Exception) -> str:
    """What is wrong with a tokenizer that ``transformers`` could not read, in one line."""
    for name in (file.name, *_SIDE_FILES):
        side = file.with_name(name)
        if side.suffix == ".json" and side.is_file():
            try:
                read_json(side)
            except CheckpointError as fault:
                return str(fault)
    reason = (str(error).strip().splitlines() or [""])[0]
    return _remote_code(file.parent) or (
        f"{file}: the tokenizer cannot be loaded: {type(error).__name__}: {reason}"
    )


def _remote_code(directory: Path) -> str | None:
    """That the tokenizer is a class of the repository's own, if it is."""
    config = directory / "tokenizer_config.json"
    classes = read_json(config).get("auto_map") if config.is_file() else None
    if not isinstance(classes, dict) or "AutoTokenizer" not in classes:
        return None
    return f"{config}: the tokenizer is code of the repository (auto_map), which is never run"
