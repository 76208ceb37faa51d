"""Training data: files of conversations as token ids with a mask over the assistant's tokens."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from specrt.json_lines import read_items
from specrt.models.tokenizer import Tokenizer
from specrt.train.data.records import Chat, Pair, Record, fitted, naming, parse_record


class Example(NamedTuple):
    """One sequence of n tokens."""

    token_ids: torch.Tensor
    """``[n]`` int64"""
    loss_mask: torch.Tensor
    """``[n]`` bool: the tokens the assistant says, the end of its turn included."""


@dataclass(frozen=True)
class DataReport:
    """What became of the files."""

    num_records: int = 0
    """Conversations read."""
    num_examples: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_truncated: int = 0
    """Examples cut to ``max_length``."""
    num_without_response: int = 0
    """Conversations skipped: no assistant's turn, or none before the cut."""
    num_bad: int = 0
    """Malformed lines skipped because that was asked for."""
    max_length: int = 0

    def lines(self) -> list[str]:
        """For people; what was left out has a line of its own."""
        said = [
            f"{self.num_examples} examples, {self.num_tokens} tokens, "
            f"{self.num_loss_tokens} of them the assistant's"
        ]
        if self.num_truncated:
            said.append(f"{self.num_truncated} examples cut to {self.max_length} tokens")
        if self.num_without_response:
            said.append(f"{self.num_without_response} conversations without a response skipped")
        if self.num_bad:
            said.append(f"{self.num_bad} malformed lines skipped")
        return said


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples behind one another in memory; ``dataset[i]`` is an :class:`Example`."""

    token_ids: torch.Tensor
    """``[T]`` int32, all examples."""
    loss_mask: torch.Tensor
    """``[T]`` bool"""
    offsets: list[int]
    """Where each example starts, and T."""
    max_length: int
    report: DataReport

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.token_ids[part].long(), self.loss_mask[part])

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]

    @cached_property
    def content_hash(self) -> str:
        """Sixteen hex digits that change with any token, mask or border."""
        digest = hashlib.sha256(self.token_ids.numpy().tobytes())
        digest.update(self.loss_mask.numpy().tobytes())
        digest.update(array("q", self.offsets).tobytes())
        return digest.hexdigest()[:16]

    def split(self, held_out: float) -> tuple[list[int], list[int]]:
        """Indices for training and held-out ones, the same for the same content in any order.

        Examples that share everything before the first response stay on one side, so that several
        answers to one prompt never are on both.

        Args:
            held_out: the share to hold out, 0 <= share < 1; above 0, both sides get something.

        Raises:
            ValueError: the share is out of range, or there are no two different prompts to part.
        """
        if not 0.0 <= held_out < 1.0:
            raise ValueError(f"held_out: expected a share in [0, 1), got {held_out}")
        if held_out == 0.0:
            return list(range(len(self))), []
        marks = [self._prompt_mark(index) for index in range(len(self))]
        low, high = min(marks), max(marks)
        if low == high:
            raise ValueError("held_out: expected at least two different prompts, got one")
        # The lowest mark is always held out, the highest never.
        bound = min(max(held_out, low), high)
        is_held = [mark < bound or mark == low for mark in marks]
        train = [index for index, held in enumerate(is_held) if not held]
        return train, [index for index, held in enumerate(is_held) if held]

    def _prompt_mark(self, index: int) -> float:
        """A number in [0, 1) that depends on an example's tokens before its first response.

        What a target said from its first token on has no prompt and is told apart by itself.
        """
        token_ids, loss_mask = self[index]
        first = int(loss_mask.int().argmax())
        prompt = token_ids[:first] if first > 1 else token_ids
        digest = hashlib.sha256(prompt.numpy().tobytes()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


def read_examples(
    paths: Iterable[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    skip_bad: bool = False,
) -> Dataset:
    """Read files of JSON objects, in any layout of :mod:`specrt.json_lines`.

    An object has one of the forms of ``docs/training.md``. Conversations and, where there is one,
    problems go through the tokenizer's chat template. A template that tells earlier turns
    differently once later ones follow makes several examples of one conversation.

    Args:
        paths: the files.
        tokenizer: the target's own.
        max_length: longer sequences are cut to so many tokens.
        skip_bad: leave malformed lines out and count them.

    Raises:
        ValueError: a file is empty, a line is malformed or refused by the chat template (the
            message names it), or no example is left.
        OSError: a file cannot be read.
    """
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {max_length}")
    paths = list(paths)
    encoder, collector = _Encoder(tokenizer, max_length), _Collector(max_length)
    for path in paths:
        for item in read_items(path):
            try:
                record = parse_record(item)
                with naming(item.where):
                    collector.add(encoder.encode(record))
            except ValueError:
                if not skip_bad:
                    raise
                collector.num_bad += 1
    dataset = collector.dataset()
    if len(dataset) == 0:
        named = ", ".join(map(str, paths)) or "no files"
        raise ValueError(
            f"data: no example with a response in {named} ({collector.num_records} read, "
            f"{dataset.report.num_without_response} without a response, {collector.num_bad} bad)"
        )
    return dataset


class _Encoded(NamedTuple):
    token_ids: list[int]
    loss_mask: list[bool]


@dataclass
class _Collector:
    """Gathers encoded conversations and counts."""

    max_length: int
    num_records: int = 0
    num_bad: int = 0
    num_truncated: int = 0
    num_without_response: int = 0
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    loss_mask: bytearray = field(default_factory=bytearray)
    offsets: list[int] = field(default_factory=lambda: [0])

    def add(self, examples: Iterable[_Encoded]) -> None:
        """Take the examples of one conversation, cut."""
        self.num_records += 1
        num_before = len(self.offsets)
        for token_ids, loss_mask in examples:
            if not any(loss_mask[: self.max_length]):
                continue
            self.num_truncated += len(token_ids) > self.max_length
            self.token_ids.extend(token_ids[: self.max_length])
            self.loss_mask.extend(loss_mask[: self.max_length])
            self.offsets.append(len(self.token_ids))
        self.num_without_response += len(self.offsets) == num_before

    def dataset(self) -> Dataset:
        loss_mask = torch.tensor(list(self.loss_mask), dtype=torch.bool)
        report = DataReport(
            num_records=self.num_records,
            num_examples=len(self.offsets) - 1,
            num_tokens=len(self.token_ids),
            num_loss_tokens=int(loss_mask.sum()),
            num_truncated=self.num_truncated,
            num_without_response=self.num_without_response,
            num_bad=self.num_bad,
            max_length=self.max_length,
        )
        token_ids = torch.tensor(self.token_ids, dtype=torch.int32)
        return Dataset(token_ids, loss_mask, self.offsets, self.max_length, report)


class _Encoder:
    """Turns records into token ids and masks."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._eos_id = tokenizer.inner.eos_token_id
        added = tokenizer.inner.added_tokens_decoder
        self._special = {token for token, content in added.items() if content.special}

    def encode(self, record: Record) -> list[_Encoded]:
        """None or more examples, none where the assistant says nothing that counts.

        Raises:
            Exception: whatever the chat template or the tokenizer has against it.
        """
        told = fitted(record, self._tokenizer)
        if isinstance(told, Chat):
            return self._chat(told)
        if isinstance(told, Pair):
            return self._pair(told)
        num_prompt, num_response = len(told.prompt_ids), len(told.response_ids)
        mask = [False] * num_prompt + [True] * num_response
        return [_Encoded([*told.prompt_ids, *told.response_ids], mask)]

    def _pair(self, pair: Pair) -> list[_Encoded]:
        if not pair.response:
            return []
        alone = self._tokenizer.encode(pair.prompt)
        token_ids = self._tokenizer.encode(pair.prompt + pair.response)
        if self._eos_id is not None and token_ids[-1] != self._eos_id:
            token_ids.append(self._eos_id)
        start = _num_common(alone, token_ids)
        return [_Encoded(token_ids, [False] * start + [True] * (len(token_ids) - start))]

    def _chat(self, chat: Chat) -> list[_Encoded]:
        """Tell the conversation up to each turn that counts, with and without that turn.

        What the two have in common comes before the turn.
        """
        render, messages = self._tokenizer.apply_chat_template, chat.messages
        done: list[_Encoded] = []
        told = _Encoded([], [])
        for index, turn in enumerate(chat.turns):
            if not turn.is_counted or len(told.token_ids) > self._max_length:
                continue
            before = render(messages[:index])
            through = render(messages[: index + 1], add_generation_prompt=False)
            mask = told.loss_mask
            if through[: len(told.token_ids)] != told.token_ids:
                done.append(told)  # this template has rewritten the turns before
                mask = []
            mask = mask + [False] * (len(through) - len(mask))
            start = _num_common(before, through)
            end = self._turn_end(through, start)
            mask[start:end] = [True] * (end - start)
            told = _Encoded(through, mask)
        return [*done, told] if told.token_ids else []

    def _turn_end(self, token_ids: list[int], start: int) -> int:
        """Behind the token that ends the turn; templates may write more, as ChatML's newline."""
        turn = token_ids[start:]
        if self._eos_id in turn:
            return start + turn.index(self._eos_id) + 1
        last = [index for index, token in enumerate(turn) if token in self._special]
        return start + last[-1] + 1 if last else len(token_ids)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))
