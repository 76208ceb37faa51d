"""Forms of training lines: each reads, token for token, as the plain conversation it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.models.tokenizer import Tokenizer
from specrt.train.data.dataset import Dataset, read_examples
from specrt.train.data.prompts import read_prompts
from tests.train.chat_tokenizers import CALLING, CHATML, letter_tokenizer, spoken

Record = dict[str, Any]


def turn(role: str, content: Any, **more: Any) -> Record:
    return {"role": role, "content": content, **more}


def shared(speaker: str, value: Any) -> Record:
    return {"from": speaker, "value": value}


S, D = turn("system", "be brief"), turn("developer", "be brief")
U, A, V, B = turn("user", "hi"), turn("assistant", "yo"), turn("user", "1+1?"), turn("gpt", "2")
PLAIN = {"messages": [U, A]}
LONG = {"messages": [U, A, V, turn("assistant", "2")]}
TOOL = {"messages": [U, turn("assistant", "{}"), turn("tool", "3"), A]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return letter_tokenizer(CHATML)


def read(folder: Path, tokenizer: Tokenizer, *records: Record) -> Dataset:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_examples([file], tokenizer, max_length=512)


def counted(folder: Path, tokenizer: Tokenizer, *records: Record) -> list[str]:
    """What the loss counts of each example."""
    dataset = read(folder, tokenizer, *records)
    return [spoken(tokenizer, dataset[index]) for index in range(len(dataset))]


FORMS: list[tuple[Record, Record]] = [
    ({"id": "1", "conversations": [U, A]}, PLAIN),
    ({"messages": [shared("human", "hi"), shared("gpt", "yo")]}, PLAIN),
    ({"messages": [shared("human", "hi"), A]}, PLAIN),
    *[
        ({"conversations": [shared(asks, "hi"), shared(says, "yo")]}, PLAIN)
        for asks, says in (
            *(("user", name) for name in ("ai", "bot", "model", "bing", "chatgpt", "bard")),
            *(("Human", "Assistant"), ("HUMAN", "GPT"), ("prompter", "AI")),
        )
    ],
    ({"messages": [turn("user", [{"type": "text", "text": "h"}, "i"]), A]}, PLAIN),
    ({"conversations": [U, A], "system": "be brief"}, {"messages": [S, U, A]}),
    ({"messages": [U, A], "system": ""}, PLAIN),
    ({"messages": [D, U, A]}, {"messages": [S, U, A]}),
    (
        {
            "conversations": [
                shared("human", "hi"),
                shared("function_call", "{}"),
                shared("observation", "3"),
                shared("gpt", "yo"),
            ]
        },
        TOOL,
    ),
    ({"messages": [U, turn("assistant", "{}"), turn("function", "3", name="f"), A]}, TOOL),
    ({"prompt": [U], "completion": [A]}, PLAIN),
    ({"prompt": [U], "response": "yo"}, PLAIN),
    ({"prompt": "hi", "completion": [A]}, PLAIN),
    ({"prompt": [U], "chosen": [A], "rejected": [B]}, PLAIN),
    ({"prompt": "hi", "chosen": [U, A], "rejected": [U, B]}, PLAIN),
    ({"chosen": [U, A], "rejected": [U, B]}, PLAIN),
    ({"instruction": "hi", "output": "yo"}, PLAIN),
    ({"instruction": "hi", "input": "", "output": "yo"}, PLAIN),
    (
        {"instruction": "1", "input": "2", "output": "3"},
        {"prompt": [turn("user", "1\n2")], "chosen": "3"},
    ),
    ({"instruction": "1+1?", "output": "2", "history": [["hi", "yo"]]}, LONG),
    (
        {"instruction": "hi", "output": "yo", "system": "be brief"},
        {"messages": [S, U, A]},
    ),
]


@pytest.mark.parametrize(("form", "plain"), FORMS, ids=lambda form: json.dumps(form)[:60])
def test_a_form_reads_as_the_plain_one(
    tmp_path: Path, tokenizer: Tokenizer, form: Record, plain: Record
) -> None:
    got, wanted = read(tmp_path, tokenizer, form), read(tmp_path, tokenizer, plain)
    assert len(got) == len(wanted) == 1
    assert torch.equal(got.token_ids, wanted.token_ids)
    assert torch.equal(got.loss_mask, wanted.loss_mask)


def test_texts_of_a_preference_are_a_pair_of_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = {"prompt": "a", "chosen": "b", "rejected": "c"}
    got, wanted = (
        read(tmp_path, tokenizer, {"prompt": "a", key: "b"}) for key in ("chosen", "response")
    )
    assert torch.equal(got.token_ids, wanted.token_ids)
    assert counted(tmp_path, tokenizer, texts) == ["b<|im_end|>"]


def test_only_the_completion_of_turns_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    form = {"prompt": [U, A, V], "completion": [turn("assistant", "2")]}
    got, wanted = read(tmp_path, tokenizer, form), read(tmp_path, tokenizer, LONG)
    assert torch.equal(got.token_ids, wanted.token_ids)
    assert spoken(tokenizer, got[0]) == "2<|im_end|>"
    assert spoken(tokenizer, wanted[0]) == "yo<|im_end|>2<|im_end|>"


def test_a_turn_of_no_weight_is_not_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said = [U, {**A, "weight": 0}, V, {**B, "weight": 1}]
    assert counted(tmp_path, tokenizer, {"messages": said}) == ["2<|im_end|>"]


def test_a_template_that_names_developers_is_told_of_them(tmp_path: Path) -> None:
    template = "{# system or 'developer' #}" + CHATML
    dataset = read(tmp_path, letter_tokenizer(template), {"messages": [D, U, A]})
    told = letter_tokenizer(template).inner.decode(dataset[0].token_ids.tolist())
    assert told.startswith("<|im_start|>developer\nbe brief")


# --- tool calls -----------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    "caller",
    [
        turn("assistant", None, tool_calls=[CALL]),
        {"role": "assistant", "tool_calls": [CALL]},
        turn("assistant", None, function_call=CALL["function"]),
        turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}]),
    ],
    ids=["null", "no content", "function_call", "arguments as an object"],
)
def test_a_call_counts_where_the_template_tells_it(tmp_path: Path, caller: Record) -> None:
    record = {"messages": [U, caller, turn("tool", "3", tool_call_id="1"), A]}
    telling, silent = letter_tokenizer(CALLING), letter_tokenizer(CHATML)
    assert counted(tmp_path, telling, record) == ['(f {"x": 1})<|im_end|>yo<|im_end|>']
    # There the turn is told as an empty one, which the assistant did not say.
    assert counted(tmp_path, silent, record) == ["yo<|im_end|>"]


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {"question_id": 81, "category": "writing", "turns": ["hi", "Shorter."]},
        {"prompt": [U]},
        {"instruction": "hi"},
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"conversations": [shared("Human", "hi")]},
    ],
    ids=lambda form: next(iter(form)),
)
def test_a_form_asks_as_the_plain_one(tmp_path: Path, tokenizer: Tokenizer, form: Record) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([form, {"messages": [U]}], indent=1))
    (prompt,), report = read_prompts([file], tokenizer)
    assert list(prompt.token_ids) == tokenizer.apply_chat_template([U])
    assert report.num_repeated == 1


# --- mistakes -------------------------------------------------------------------------------------

BAD: list[tuple[Record, str]] = [
    ({"prompt": "cut \ud83d"}, r'"prompt": expected characters, .* \'\\ud83d\', at position 4'),
    ({"messages": [turn("user", "\ude00")]}, '"messages", turn 1: expected characters, got half'),
    ({"messages": [turn("user", ["x", "\ude00"])]}, '"messages", turn 1: expected characters'),
    ({"prompt": {"role": "user"}, "completion": [A]}, '"prompt": expected a list, got dict'),
    ({"prompt": [U], "completion": 5}, '"completion": expected a list, got int'),
    ({"prompt": [U], "completion": [{"role": "gpt"}]}, '"completion", turn 1: expected an object'),
    ({"messages": [turn("assistant", None)]}, "turn 1: expected text, got null"),
    ({"messages": [turn("gpt", None, tool_calls="f")]}, 'turn 1: "tool_calls": expected a list'),
    ({"chosen": "\n\nHuman: hi"}, '"chosen": expected a list, got str'),
    ({"instruction": ["x"]}, '"instruction": expected text, got list'),
    ({"instruction": "x", "history": [["a"]]}, '"history": expected a list of pairs'),
    ({"turns": []}, '"turns": expected a list of texts'),
    ({"turns": [5]}, '"turns": expected text, got int'),
    ({"messages": [U, A], "system": 5}, '"system": expected text, got int'),
    ({"prompt_ids": [2**31], "response_ids": [1]}, '"prompt_ids": expected a list of token ids'),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, tokenizer: Tokenizer, record: Record, message: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(PLAIN)}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=f"^{file}, line 2: .*{message}"):
        read_examples([file], tokenizer, max_length=512)
    with pytest.raises(ValueError, match=f"^{file}, line 2: .*{message}"):
        read_prompts([file], tokenizer)
    assert read_examples([file], tokenizer, max_length=512, skip_bad=True).report.num_bad == 1
    assert read_prompts([file], tokenizer, skip_bad=True)[1].num_bad == 1


@pytest.mark.parametrize("fault", ["m.content + 1", "m.content.x.y", "1 // 0", "'%d' % m.content"])
def test_whatever_a_template_raises_is_named_or_skipped(tmp_path: Path, fault: str) -> None:
    """As those do that were written for contents of another kind."""
    tokenizer = letter_tokenizer(
        "{% for m in messages %}{% if m.content == 'x' %}{{ "
        + fault
        + " }}{% endif %}{% endfor %}"
        + CHATML
    )
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(PLAIN)}\n{json.dumps({'messages': [turn('user', 'x'), A]})}\n")
    with pytest.raises(ValueError, match=f"^{file}, line 2: .+"):
        read_examples([file], tokenizer, max_length=512)
    assert read_examples([file], tokenizer, max_length=512, skip_bad=True).report.num_bad == 1
    assert read_prompts([file], tokenizer, skip_bad=True)[1].num_bad == 1
