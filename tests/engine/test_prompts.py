"""What is taken for prompts, and what is refused by its place and type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from specrt.engine.prompts import PromptEncoder, plain_prompt, split_prompts
from tests.engine.support import LetterTokenizer

IDS = [3, 1, 2]
CHAT = [{"role": "user", "content": "hi"}]
PADDED = {"input_ids": [[0, 3, 1], [2, 0, 0]], "attention_mask": [[0, 1, 1], [1, 0, 0]]}


def read(prompts: object) -> Any:
    """Plain prompts, in a list where there are many."""
    split, is_many = split_prompts(prompts)
    plain = [plain_prompt(prompt) for prompt in split]
    return plain if is_many else plain[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tuple(IDS),
        lambda: iter(IDS),
        lambda: (token for token in IDS),
        lambda: np.array(IDS),
        lambda: np.array(IDS, dtype=np.uint8),
        lambda: list(np.array(IDS)),
        lambda: torch.tensor(IDS),
        lambda: list(torch.tensor(IDS, dtype=torch.int32)),
        lambda: {"prompt_token_ids": IDS},
        lambda: {"prompt_token_ids": torch.tensor([IDS])},
        lambda: {"prompt": "their text", "prompt_token_ids": IDS, "multi_modal_data": None},
        lambda: {"prompt": IDS},
        lambda: {"input_ids": IDS},
        lambda: BatchEncoding({"input_ids": IDS, "attention_mask": [1, 1, 1]}),
        lambda: BatchEncoding({"input_ids": [0, *IDS], "attention_mask": [0, 1, 1, 1]}),
    ],
)
def test_token_ids_in_whatever_they_come(make: Callable[[], object]) -> None:
    one = read(make())
    assert one == IDS
    assert all(type(token) is int for token in one)
    assert read([make()]) == [IDS]
    assert read(x for x in ["a", make()]) == ["a", IDS]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("", ""),
        ("abc", "abc"),
        ({"prompt": "abc"}, "abc"),
        (CHAT, CHAT),
        (iter(CHAT), CHAT),
        ({"messages": CHAT}, CHAT),
        ({"prompt": CHAT}, CHAT),
    ],
)
def test_one_prompt(prompts: object, expected: object) -> None:
    assert read(prompts) == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (list, []),
        (lambda: iter(()), []),
        (lambda: ["a", ""], ["a", ""]),
        (lambda: map(str, range(2)), ["0", "1"]),
        (lambda: np.array(["a", "bc"]), ["a", "bc"]),
        (lambda: list(np.array(["a", "bc"])), ["a", "bc"]),
        (lambda: [CHAT, "a", IDS, {"prompt": "b"}], [CHAT, "a", IDS, "b"]),
        (lambda: (iter(IDS) for _ in range(2)), [IDS, IDS]),
        (lambda: [[], IDS], [[], IDS]),
        (lambda: [IDS], [IDS]),
        (lambda: torch.tensor([IDS]), [IDS]),
        (lambda: np.array([IDS, IDS]), [IDS, IDS]),
        (lambda: [torch.tensor([IDS]), torch.tensor(IDS[:1])], [IDS, IDS[:1]]),
        (lambda: BatchEncoding({"input_ids": [IDS, [4]]}), [IDS, [4]]),
        (lambda: BatchEncoding(PADDED), [[3, 1], [2]]),
        (lambda: BatchEncoding(PADDED, tensor_type="pt"), [[3, 1], [2]]),
        (lambda: BatchEncoding(PADDED, tensor_type="np"), [[3, 1], [2]]),
        (lambda: [{"input_ids": torch.tensor([IDS])}, {"input_ids": [4]}], [IDS, [4]]),
    ],
)
def test_many_prompts(make: Callable[[], object], expected: object) -> None:
    assert read(make()) == expected


def test_no_ids_of_one_dimension_are_one_empty_prompt() -> None:
    assert read(torch.tensor([])) == read({"input_ids": []}) == []
    assert split_prompts(torch.tensor([]))[1] is False


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts: expected .* got NoneType"),
        (5, "prompts: expected .* got int 5"),
        (1.5, "got float 1.5"),
        (True, "got bool True"),
        (torch.tensor(5), "prompts: expected .* got int 5"),
        (b"abc", "prompts: expected .* got bytes b'abc'"),
        (bytearray(b"abc"), "got bytearray"),
        (memoryview(b"abc"), "got memoryview"),
        ({1, 2}, "got set"),
        (Path("a"), "got PosixPath"),
        ([None], r"prompts\[0\]: expected .* got NoneType"),
        ([b"a"], r"prompts\[0\]: expected .* got bytes"),
        ([True, False], r"prompts\[0\]: expected .* got bool True"),
        (torch.tensor([True]), r"prompts\[0\]: expected .* got bool True"),
        ([1.0, 2.0], r"prompts\[0\]: expected .* got float 1.0"),
        (np.array([1.5]), r"prompts\[0\]: expected .* got float 1.5"),
        ([1, 2.5], r"prompts\[1\]: expected a token id, as prompts\[0\] is, got float 2.5"),
        ([1, True], r"prompts\[1\]: expected a token id, .* got bool True"),
        ([1, "a"], r"prompts\[1\]: expected a token id, .* got str 'a'"),
        (["a", 1], r"prompts\[1\]: expected a prompt, .* got int 1"),
        ([*CHAT, "a"], r"prompts\[1\]: expected a chat message, .* got str 'a'"),
        (["a", *CHAT], r"prompts\[1\]: expected a prompt, .* got dict"),
        ([["a", "b"]], r"prompts?\[0\]: expected a token id or a chat message, got str 'a'"),
        ([[[1, 2]]], r"prompt\[0\]: expected a token id or a chat message, got list"),
        (torch.ones(1, 1, 2, dtype=torch.int64), r"prompt\[0\]: expected .* got list"),
        ([torch.ones(2, 2, dtype=torch.int64)], "prompt: expected one prompt, got 2 rows"),
        (CHAT[0], "prompt: expected a list of chat messages, got one without a list"),
        ({}, "prompt: expected a mapping with one of .* got keys none"),
        ({"text": "a"}, "prompt: expected a mapping with one of .* got keys text"),
        ({"prompt": "a", "multi_modal_data": {}}, "got keys prompt, multi_modal_data"),
        ({"prompt": {"prompt": "a"}}, r"prompt\['prompt'\]: expected text, .* got dict"),
        ({"prompt": 5}, r"prompt\['prompt'\]: expected .* got int 5"),
        ({"prompt_token_ids": "abc"}, r"prompt\['prompt_token_ids'\]: expected a list, got str"),
        ({"input_ids": "abc"}, r"prompts\['input_ids'\]: expected .* got str 'abc'"),
        ({"input_ids": ["a"]}, r"prompts\['input_ids'\]\[0\]: expected token ids, got str 'a'"),
        ({"input_ids": [1], "pixel_values": 1}, "prompts: .* got pixel_values as well"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "hides the ends alone"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "attention_mask of 2 zeros and ones"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask of 2 zeros and ones"),
        ({"input_ids": [[1, 2]], "attention_mask": [1, 1]}, "expected 1 rows, got 2"),
        ({"input_ids": [1, 2], "attention_mask": [[1, 1]]}, "attention_mask of 2 zeros and ones"),
    ],
)
def test_what_is_no_prompt_is_named(prompts: object, message: str) -> None:
    start = "^" if message.startswith("prompt") else ""
    with pytest.raises(ValueError, match=start + message):
        read(prompts)


def test_an_encoder_names_what_it_refuses() -> None:
    encoder = PromptEncoder(LetterTokenizer(), vocab_size=97)  # type: ignore[arg-type]
    assert encoder.encode("hi") == LetterTokenizer().encode("hi")
    assert encoder.encode(CHAT) == LetterTokenizer().encode("<user>hi")
    for empty in ("", [], {"prompt": ""}, {"input_ids": [1], "attention_mask": [0]}):
        with pytest.raises(ValueError, match="^prompts.4.: expected at least one token, got an"):
            encoder.encode(empty, "prompts[4]")
    for token in (-1, 97, 2**70):
        with pytest.raises(ValueError, match=f"^prompt: token id {token} is outside .* 0..96"):
            encoder.encode([1, token])
