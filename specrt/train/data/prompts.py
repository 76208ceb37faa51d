"""Prompts for the target to answer, from the same files as training data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from specrt.json_lines import JsonItem, read_items
from specrt.models.tokenizer import Tokenizer
from specrt.train.data.records import Chat, Pair, Record, fitted, naming, parse_record


@dataclass(frozen=True)
class PromptReport:
    """What became of the files."""

    num_records: int
    num_empty: int
    """Skipped: nothing before the response."""
    num_repeated: int
    """Skipped: the same tokens came before."""
    num_bad: int
    """Malformed lines skipped because that was asked for."""


@dataclass(frozen=True)
class TrainingPrompt:
    """What the target is to go on from."""

    text: str
    """Encodes to ``token_ids`` where the tokenizer can say them at all."""
    token_ids: tuple[int, ...]

    @classmethod
    def from_tokens(cls, token_ids: tuple[int, ...], tokenizer: Tokenizer) -> TrainingPrompt:
        """A prompt of tokens and their text, but for a first one that encoding adds by itself."""
        start = 0
        while start < len(token_ids) and token_ids[start] == tokenizer.inner.bos_token_id:
            start += 1
        ids = list(token_ids[start:])
        return cls(tokenizer.inner.decode(ids, clean_up_tokenization_spaces=False), token_ids)


def read_prompts(
    paths: Iterable[str | os.PathLike[str]], tokenizer: Tokenizer, *, skip_bad: bool = False
) -> tuple[list[TrainingPrompt], PromptReport]:
    """Read what :func:`specrt.train.data.dataset.read_examples` reads; responses may be missing.

    Where a conversation ends with the assistant's turn, that turn is left out.

    Args:
        paths: the files.
        tokenizer: the target's own.
        skip_bad: leave malformed lines out and count them.

    Raises:
        ValueError: a file is empty, a line malformed or refused by the chat template (the message
            names it), or no prompt is left.
        OSError: a file cannot be read.
    """
    prompts: dict[tuple[int, ...], TrainingPrompt] = {}
    num_records = num_empty = num_bad = 0
    paths = list(paths)
    for path in paths:
        for item in read_items(path):
            try:
                token_ids = _read(item, tokenizer)
            except ValueError:
                if not skip_bad:
                    raise
                num_bad += 1
                continue
            num_records += 1
            num_empty += not token_ids
            if token_ids and token_ids not in prompts:
                prompts[token_ids] = TrainingPrompt.from_tokens(token_ids, tokenizer)
    if not prompts:
        named = ", ".join(map(str, paths)) or "no files"
        raise ValueError(
            f"prompts: none in {named}: {num_records} read, {num_empty} of them empty (nothing "
            f"before the response), {num_bad} bad"
        )
    num_repeated = num_records - num_empty - len(prompts)
    return list(prompts.values()), PromptReport(num_records, num_empty, num_repeated, num_bad)


def _read(item: JsonItem, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of one item's prompt; names the item in every refusal."""
    record = parse_record(item)
    with naming(item.where):
        return _encoded(record, tokenizer)


def _encoded(record: Record, tokenizer: Tokenizer) -> tuple[int, ...]:
    told = fitted(record, tokenizer)
    if isinstance(told, Pair):
        return tuple(tokenizer.encode(told.prompt)) if told.prompt else ()
    if isinstance(told, Chat):
        messages = told.without_last_response().messages
        return tuple(tokenizer.apply_chat_template(messages)) if messages else ()
    return told.prompt_ids
