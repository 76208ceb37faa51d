"""Prompts as their users hold them, and the token ids they stand for.

One prompt is a text, token ids or chat messages; a mapping that has one of these under ``prompt``,
``prompt_token_ids`` or ``messages`` (vLLM's form); or a tokenizer's output, whose
``attention_mask`` tells the padding. Ids may be any iterable, tensor or array of integers. Many
prompts are an iterable of these, ids of two dimensions, or a tokenizer's output for many texts.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from specrt.models.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Iterable[int] | Iterable[Message] | Mapping[str, Any]
"""Text, token ids, chat messages (through the tokenizer's own template), or a mapping of one."""
OnePrompt = str | Iterable[int] | Iterable[Message] | Mapping[str, object]
"""A prompt whose type tells that it is one."""
PlainPrompt = str | list[int] | list[Message]

_IDS, _MASK = "input_ids", "attention_mask"
_FORMS = ("prompt", "prompt_token_ids", "messages")
# What tokenizers return besides, and what says nothing that the ids do not.
_TOKENIZER_NOTES = {_MASK, "token_type_ids", "special_tokens_mask", "offset_mapping", "length"}
# Iterable, but no sequence of ids: bytes are a text in an encoding that nobody named.
_NO_SEQUENCES = (bytes, bytearray, memoryview, AbstractSet)


class _Kind(Enum):
    """What the items of a list can be, in the words of errors."""

    TOKEN = "a token id"
    MESSAGE = "a chat message"
    PROMPT = "a prompt"


@dataclass(frozen=True)
class PromptEncoder:
    """Turns one prompt into token ids."""

    tokenizer: Tokenizer
    vocab_size: int
    add_special_tokens: bool = True
    """Whether a text gets what the tokenizer adds by itself (bos); a chat has its template's."""

    def encode(self, prompt: Prompt, name: str = "prompt") -> list[int]:
        """Token ids, at least one.

        Args:
            prompt: one prompt.
            name: what errors call it.

        Raises:
            ValueError: it is empty or no prompt, the tokenizer or the chat template refuses it, or
                it has ids outside the vocabulary.
        """
        ids = self._ids(plain_prompt(prompt, name), name)
        if not ids:
            raise ValueError(f"{name}: expected at least one token, got an empty prompt")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}: token id {token} is outside the vocabulary 0..{self.vocab_size - 1}"
                )
        return ids

    def _ids(self, prompt: PlainPrompt, name: str) -> list[int]:
        if not prompt:
            return []
        try:
            if isinstance(prompt, str):
                return self.tokenizer.encode(prompt, add_special_tokens=self.add_special_tokens)
            if isinstance(prompt[0], Mapping):
                return self.tokenizer.apply_chat_template(prompt)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('prompt: ')}") from error
        return prompt


def split_prompts(prompts: object) -> tuple[list[Any], bool]:
    """The prompts one by one, and whether there were many (also as a list of one, or of none).

    Raises:
        ValueError: an item is neither a prompt nor part of one, or unlike the first; names it.
    """
    if isinstance(prompts, Mapping) and _IDS in prompts:
        return _encoded_rows("prompts", prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts], False
    items = _items("prompts", prompts)
    if items:
        is_many = _kind_of_all("prompts", items) is _Kind.PROMPT
    else:  # a tensor of one dimension is one prompt, as empty as it may be
        is_many = getattr(prompts, "ndim", 2) != 1
    return (items, True) if is_many else ([items], False)


def plain_prompt(prompt: object, name: str = "prompt") -> PlainPrompt:
    """One prompt as text, a list of ids or a list of messages.

    Raises:
        ValueError: it is no prompt; the message begins with ``name`` and tells where and what.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        if _IDS in prompt:
            return cast("list[int]", _only_row(name, _encoded_rows(name, prompt)[0]))
        return _mapped_prompt(prompt, name)
    items = _items(name, prompt)
    if getattr(prompt, "ndim", 1) == 2:  # [1, n], as a tokenizer returns it for one text
        name, items = f"{name}[0]", _only_row(name, items)
    if not items:
        return []
    kind = _kind_of_all(name, items)
    if kind is _Kind.PROMPT:
        raise _refusal(f"{name}[0]", "a token id or a chat message", items[0])
    return items if kind is _Kind.MESSAGE else [_token(item) for item in items]


def _mapped_prompt(prompt: Mapping[str, Any], name: str) -> PlainPrompt:
    given = {key: value for key, value in prompt.items() if value is not None}
    if given.keys() == {"prompt", "prompt_token_ids"}:  # vLLM's: a text and its own ids
        del given["prompt"]
    if "role" in given:
        raise ValueError(f"{name}: expected a list of chat messages, got one without a list")
    key = next(iter(given), None)
    if len(given) != 1 or key not in _FORMS:
        keys = ", ".join(map(str, prompt)) or "none"
        raise ValueError(
            f"{name}: expected a mapping with one of {', '.join(_FORMS)} or {_IDS}, got keys {keys}"
        )
    value, where = given[key], f"{name}[{key!r}]"
    if isinstance(value, Mapping) or (isinstance(value, str) and key != "prompt"):
        expected = "text, token ids or chat messages" if key == "prompt" else "a list"
        raise _refusal(where, expected, value)
    return plain_prompt(value, where)


# --- a tokenizer's output -------------------------------------------------------------------------


def _encoded_rows(name: str, encoding: Mapping[str, Any]) -> tuple[list[list[int]], bool]:
    """The ids of each row without its padding, and whether they had two dimensions."""
    unknown = [key for key in encoding if key != _IDS and key not in _TOKENIZER_NOTES]
    if unknown:
        raise ValueError(f"{name}: expected {_IDS} and {_MASK} alone, got {unknown[0]} as well")
    where, mask = f"{name}[{_IDS!r}]", encoding.get(_MASK)
    ids = _items(where, encoding[_IDS])
    if not ids or _kind_of_all(where, ids) is not _Kind.PROMPT:
        return [_without_padding(where, ids, mask)], False
    masks = [None] * len(ids) if mask is None else _items(f"{name}[{_MASK!r}]", mask)
    if len(masks) != len(ids):
        raise ValueError(f"{name}[{_MASK!r}]: expected {len(ids)} rows, got {len(masks)}")
    rows = enumerate(zip(ids, masks, strict=True))
    return [_without_padding(f"{where}[{i}]", row, bits) for i, (row, bits) in rows], True


def _without_padding(name: str, row: object, mask: object) -> list[int]:
    """The ids under a mask's ones; padding lies at the ends."""
    ids = plain_prompt(row, name)
    if isinstance(ids, str) or any(isinstance(item, Mapping) for item in ids):
        raise _refusal(name, "token ids", row)
    token_ids = cast("list[int]", ids)
    if mask is None:
        return token_ids
    bits = [int(bit) if bit in (0, 1) else None for bit in _items(f"{name}'s {_MASK}", mask)]
    kept = [index for index, bit in enumerate(bits) if bit]
    shown = reprlib.repr(bits)
    if len(bits) != len(ids) or None in bits:
        raise ValueError(f"{name}: expected an {_MASK} of {len(ids)} zeros and ones, got {shown}")
    if kept and kept[-1] - kept[0] >= len(kept):
        raise ValueError(f"{name}: expected an {_MASK} that hides the ends alone, got {shown}")
    return [token_ids[index] for index in kept]


def _only_row(name: str, rows: list[Any]) -> Any:
    if len(rows) != 1:
        raise ValueError(f"{name}: expected one prompt, got {len(rows)} rows")
    return rows[0]


# --- lists and their items ------------------------------------------------------------------------


def _items(name: str, value: Any) -> list[Any]:
    """What an iterable, tensor or array holds."""
    if not isinstance(value, _NO_SEQUENCES):
        if hasattr(value, "tolist"):  # much quicker than to iterate over a tensor
            value = value.tolist()
        if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
            return list(value)
    raise _refusal(name, "text, token ids, chat messages or a list of such", value)


def _kind_of_all(name: str, items: list[Any]) -> _Kind:
    """What all items are.

    Raises:
        ValueError: one is none of the kinds, or of another kind than the first.
    """
    if all(type(item) is int for item in items):
        return _Kind.TOKEN
    first = _kind(items[0])
    if first is None:
        raise _refusal(f"{name}[0]", " or ".join(kind.value for kind in _Kind), items[0])
    for index, item in enumerate(items):
        if _kind(item) is not first:
            raise _refusal(f"{name}[{index}]", f"{first.value}, as {name}[0] is", item)
    return first


def _kind(item: Any) -> _Kind | None:
    if isinstance(item, Mapping):
        is_prompt = any(key in item for key in (_IDS, *_FORMS))
        return _Kind.PROMPT if is_prompt else _Kind.MESSAGE
    if isinstance(item, str):  # numpy's too, which has no dimensions
        return _Kind.PROMPT
    if _token(item) is not None:
        return _Kind.TOKEN
    if isinstance(item, _NO_SEQUENCES) or getattr(item, "ndim", 1) == 0:
        return None
    return _Kind.PROMPT if isinstance(item, Iterable) or hasattr(item, "tolist") else None


def _token(item: Any) -> Any:
    """An integer of whatever library as an int; None if it is no integer."""
    if getattr(item, "ndim", None) == 0:  # numpy's scalars, and what iterating a tensor gives
        item = item.item()
    return item if isinstance(item, int) and not isinstance(item, bool) else None


def _refusal(name: str, expected: str, value: object) -> ValueError:
    is_short = value is None or isinstance(value, str | bytes | int | float)
    shown = f" {reprlib.repr(value)}" if is_short else ""
    return ValueError(f"{name}: expected {expected}, got {type(value).__name__}{shown}")
