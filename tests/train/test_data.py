"""Training files: every form, the assistant's tokens, the cut, the split, every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.builtin import heldout_prompts, target_path
from specrt.models.tokenizer import Tokenizer, load_tokenizer
from specrt.train.data.dataset import Dataset, read_examples
from specrt.train.data.prompts import read_prompts
from tests.train.chat_tokenizers import BARE, CHATML, THINKING, letter_tokenizer, spoken

PROBLEM = {"question": "How much is 2+3?", "answer": "2+3 = <<2+3=5>>5.\n#### 5"}
SAID = " 2+3 = 5.\n#### 5</s>"
TURNS = (("user", "Hi"), ("assistant", "Hello."), ("user", "2+3?"), ("assistant", "5"))


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return load_tokenizer(target_path())


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(tmp_path: Path, tokenizer: Tokenizer, *records: Any, **options: Any) -> Dataset:
    file = write(tmp_path / "data.jsonl", *records)
    return read_examples([file], tokenizer, **{"max_length": 512, **options})


def openai(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {
        "conversations": [{"from": names.get(role, role), "value": text} for role, text in turns]
    }


def text(tokenizer: Tokenizer, dataset: Dataset, index: int = 0) -> str:
    return str(tokenizer.inner.decode(dataset[index].token_ids.tolist()))


# --- forms ----------------------------------------------------------------------------------------


def test_a_problem_reads_as_the_bundled_model_was_trained(
    tmp_path: Path, bundled: Tokenizer
) -> None:
    dataset = read(tmp_path, bundled, PROBLEM)
    asked = "<s>Question: How much is 2+3?\nAnswer:"
    assert text(bundled, dataset) == asked + SAID
    assert spoken(bundled, dataset[0]) == SAID
    assert dataset[0].token_ids.dtype == torch.int64
    assert dataset[0].loss_mask.dtype == torch.bool


def test_a_problem_without_a_template_reads_the_same(tmp_path: Path, bundled: Tokenizer) -> None:
    plain = load_tokenizer(target_path())
    plain.inner.chat_template = None
    with_template, without = (read(tmp_path, one, PROBLEM) for one in (bundled, plain))
    assert torch.equal(with_template.token_ids, without.token_ids)
    assert torch.equal(with_template.loss_mask, without.loss_mask)


def test_forms_of_one_conversation_are_one(tmp_path: Path, bundled: Tokenizer) -> None:
    turns = (("user", PROBLEM["question"]), ("assistant", "2+3 = 5.\n#### 5"))
    parts = openai(*turns)
    parts["messages"][1]["content"] = [{"type": "text", "text": "2+3 = "}, {"text": "5.\n#### 5"}]
    pair = {"prompt": "Question: How much is 2+3?\nAnswer:", "response": " 2+3 = 5.\n#### 5"}
    completion = {"prompt": pair["prompt"], "completion": pair["response"]}
    dataset = read(
        tmp_path, bundled, PROBLEM, openai(*turns), sharegpt(*turns), parts, pair, completion
    )
    assert len(dataset) == 6
    for example in map(dataset.__getitem__, range(6)):
        assert torch.equal(example.token_ids, dataset[0].token_ids)
        assert torch.equal(example.loss_mask, dataset[0].loss_mask)


def test_the_targets_own_tokens_are_kept(tmp_path: Path, bundled: Tokenizer) -> None:
    # No tokenizer would write "ab" as these.
    record = {"prompt": "x", "response": "ab", "prompt_ids": [0, 9, 9], "response_ids": [7, 7, 1]}
    (token_ids, loss_mask) = read(tmp_path, bundled, record)[0]
    assert token_ids.tolist() == [0, 9, 9, 7, 7, 1]
    assert loss_mask.tolist() == [False] * 3 + [True] * 3


def test_a_json_list_and_lines_after_a_byte_order_mark(tmp_path: Path, bundled: Tokenizer) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        listed, lines = tmp_path / "list.json", tmp_path / "lines.json"
        listed.write_bytes(mark + json.dumps([PROBLEM, PROBLEM], indent=1).encode())
        lines.write_bytes(mark + b"\n" + json.dumps(PROBLEM).encode() + b"\n\n")
        dataset = read_examples([listed, lines], bundled, max_length=512)
        assert [spoken(bundled, dataset[i]) for i in range(3)] == [SAID] * 3


# --- the assistant's tokens -----------------------------------------------------------------------


def test_every_turn_of_the_bundled_template(tmp_path: Path, bundled: Tokenizer) -> None:
    dataset = read(tmp_path, bundled, openai(*TURNS))
    assert len(dataset) == 1
    assert text(bundled, dataset) == (
        "<s>Question: Hi\nAnswer: Hello.</s><s>Question: 2+3?\nAnswer: 5</s>"
    )
    assert spoken(bundled, dataset[0]) == " Hello.</s> 5</s>"


def test_every_turn_of_chatml(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(CHATML)
    dataset = read(tmp_path, tokenizer, sharegpt(("system", "Be brief."), *TURNS))
    assert text(tokenizer, dataset).endswith("<|im_end|>\n")
    # Neither the opening nor the newline behind the end is said by the assistant.
    assert spoken(tokenizer, dataset[0]) == "Hello.<|im_end|>5<|im_end|>"


def test_an_end_that_is_not_the_eos_token(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(CHATML, eos=None)
    assert spoken(tokenizer, read(tmp_path, tokenizer, openai(*TURNS))[0]) == (
        "Hello.<|im_end|>5<|im_end|>"
    )


def test_a_template_that_rewrites_history_makes_several_examples(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(THINKING)
    dataset = read(tmp_path, tokenizer, openai(*TURNS))
    said = [spoken(tokenizer, dataset[i]) for i in range(len(dataset))]
    assert said == ["<think></think>Hello.<|im_end|>", "<think></think>5<|im_end|>"]
    assert text(tokenizer, dataset, 1).count("<think>") == 1


def test_a_template_without_opening_or_end(tmp_path: Path) -> None:
    tokenizer = letter_tokenizer(BARE)
    said = spoken(tokenizer, read(tmp_path, tokenizer, openai(*TURNS))[0])
    assert said == "assistant:Hello.;assistant:5;"


def test_what_follows_the_last_response_is_left_out(tmp_path: Path, bundled: Tokenizer) -> None:
    one = read(tmp_path, bundled, openai(*TURNS))
    other = read(tmp_path, bundled, openai(*TURNS, ("user", "And 3+4?")))
    assert torch.equal(one.token_ids, other.token_ids)


def test_an_opening_by_the_assistant_is_left_out(tmp_path: Path, bundled: Tokenizer) -> None:
    one = read(tmp_path, bundled, openai(*TURNS))
    other = read(tmp_path, bundled, openai(("assistant", "Welcome!"), *TURNS))
    assert torch.equal(one.token_ids, other.token_ids)


def test_a_response_whose_first_letters_merge_into_the_prompt(
    tmp_path: Path, bundled: Tokenizer
) -> None:
    dataset = read(tmp_path, bundled, {"prompt": "How many clip", "response": "s altogether"})
    assert text(bundled, dataset) == "<s>How many clips altogether</s>"
    assert spoken(bundled, dataset[0]).endswith("s altogether</s>")


# --- counts ---------------------------------------------------------------------------------------


def test_long_examples_are_cut_and_counted(tmp_path: Path, bundled: Tokenizer) -> None:
    whole = read(tmp_path, bundled, PROBLEM)
    limit = whole.lengths[0] - 2
    cut = read(tmp_path, bundled, PROBLEM, openai(*TURNS[:2]), max_length=limit)
    assert cut.lengths[0] == limit
    assert torch.equal(cut[0].token_ids, whole[0].token_ids[:limit])
    assert cut.report.num_truncated == 1
    assert any(f"1 examples cut to {limit} tokens" in line for line in cut.report.lines())
    assert cut.report.num_tokens == sum(cut.lengths)
    assert cut.report.num_loss_tokens == sum(int(cut[i].loss_mask.sum()) for i in range(2))


def test_conversations_without_a_response_are_skipped_and_counted(
    tmp_path: Path, bundled: Tokenizer
) -> None:
    silent = (openai(TURNS[0]), openai(), {"prompt": "x"}, {"question": "x"})
    empty = {"prompt_ids": [0, 5], "response_ids": []}
    late = {"prompt_ids": [5] * 100, "response_ids": [6]}  # beyond the cut
    dataset = read(tmp_path, bundled, PROBLEM, *silent, empty, late, max_length=60)
    assert (len(dataset), dataset.report.num_records) == (1, 7)
    assert dataset.report.num_without_response == 6
    assert dataset.report.num_truncated == 0
    assert any("6 conversations without a response" in line for line in dataset.report.lines())


def test_nothing_left_is_an_error(tmp_path: Path, bundled: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no example with a response in .*data.jsonl \(2 read"):
        read(tmp_path, bundled, openai(TURNS[0]), {"prompt": "x"})


# --- the split ------------------------------------------------------------------------------------


def answers(count: int, *, times: int = 1) -> list[dict[str, Any]]:
    prompts = range(3, 3 + count)
    return [
        {"prompt_ids": [0, prompt], "response_ids": [5 + time, 1]}
        for time in range(times)
        for prompt in prompts
    ]


def test_the_split_follows_the_prompts(tmp_path: Path, bundled: Tokenizer) -> None:
    dataset = read(tmp_path, bundled, *answers(200, times=3))
    train, held_out = dataset.split(0.2)
    assert sorted(train + held_out) == list(range(600))
    # 40 of 200 expected; 6 standard deviations are 34.
    assert 6 <= len(held_out) / 3 <= 74
    prompts = {int(dataset[i].token_ids[1]) for i in held_out}
    assert prompts.isdisjoint(int(dataset[i].token_ids[1]) for i in train)
    turned = read(tmp_path, bundled, *reversed(answers(200, times=3)))
    assert {int(turned[i].token_ids[1]) for i in turned.split(0.2)[1]} == prompts


def test_texts_without_a_prompt_are_told_apart_by_themselves(
    tmp_path: Path, bundled: Tokenizer
) -> None:
    """The target's own text from its first token on, which all of them share."""
    texts = [{"prompt_ids": [0], "response_ids": [9, n]} for n in range(2, 102)]
    train, held_out = read(tmp_path, bundled, *texts).split(0.2)
    assert len(train) + len(held_out) == 100 and 1 <= len(held_out) <= 44  # 6 deviations


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_sides_get_something(tmp_path: Path, bundled: Tokenizer, share: float) -> None:
    train, held_out = read(tmp_path, bundled, *answers(3)).split(share)
    assert train and held_out and len(train) + len(held_out) == 3


def test_a_split_that_cannot_be(tmp_path: Path, bundled: Tokenizer) -> None:
    dataset = read(tmp_path, bundled, *answers(1, times=4))
    assert dataset.split(0.0) == ([0, 1, 2, 3], [])
    with pytest.raises(ValueError, match="held_out: expected at least two different prompts"):
        dataset.split(0.5)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="held_out: expected a share"):
            dataset.split(share)


def test_the_hash_sees_tokens_masks_and_borders(tmp_path: Path, bundled: Tokenizer) -> None:
    def hash_of(*records: Any) -> str:
        return read(tmp_path, bundled, *records).content_hash

    def tokens(prompt: list[int], response: list[int]) -> dict[str, Any]:
        return {"prompt_ids": prompt, "response_ids": response}

    first = hash_of(tokens([3, 4], [5, 6, 7, 8]))
    assert hash_of(tokens([3, 4], [5, 6, 7, 8])) == first
    others = {
        hash_of(tokens([3, 4], [5, 6, 7, 9])),
        hash_of(tokens([3, 4, 5], [6, 7, 8])),
        hash_of(tokens([3, 4], [5, 6]), tokens([], [7, 8])),
    }
    assert len(others | {first}) == 4


# --- mistakes -------------------------------------------------------------------------------------


BAD = [
    ('{"prompt": "x"', "not JSON"),
    ('{"prompt": "\xff"}', "not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ('{"text": "x"}', "got text"),
    ("{}", "got no keys"),
    ('{"prompt": 5, "response": "x"}', '"prompt": expected text, got int'),
    ('{"prompt": "x", "response": 5}', '"response": expected text, got int'),
    ('{"question": "x", "answer": ["y"]}', '"answer": expected text, got list'),
    ('{"messages": "hello"}', '"messages": expected a list, got str'),
    ('{"messages": [{"role": "user"}]}', "turn 1: expected an object"),
    ('{"messages": [{"role": "wizard", "content": "x"}]}', "turn 1.*'wizard'"),
    ('{"messages": [{"role": "user", "content": null}]}', "turn 1: expected text, got null"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "turn 1: expected text"),
    ('{"conversations": [{"from": "human", "text": "x"}]}', 'turn 1.*"from" and "value"'),
    ('{"prompt_ids": [1, -2], "response_ids": [3]}', '"prompt_ids": expected a list of token ids'),
    ('{"prompt_ids": [1], "response_ids": [true]}', '"response_ids": expected a list of token ids'),
    ('{"prompt_ids": [1]}', '"response_ids": expected a list of token ids'),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, bundled: Tokenizer, line: str, message: str
) -> None:
    file = tmp_path / "data.jsonl"
    content = json.dumps(PROBLEM) + "\n\n" + line + "\n"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{file}, line 3: .*{message}"):
        read_examples([file], bundled, max_length=512)
    dataset = read_examples([file], bundled, max_length=512, skip_bad=True)
    assert (len(dataset), dataset.report.num_bad) == (1, 1)
    assert "1 malformed lines skipped" in dataset.report.lines()


def test_a_conversation_the_template_refuses_is_named(tmp_path: Path, bundled: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: .*only user and assistant turns"):
        read(tmp_path, bundled, PROBLEM, openai(("system", "Be brief."), *TURNS))


def test_a_conversation_without_a_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: chat messages given, but .* no chat template"):
        read(tmp_path, letter_tokenizer(None), openai(*TURNS))


def test_missing_and_empty_files_are_named(tmp_path: Path, bundled: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        read_examples([tmp_path / "nowhere.jsonl"], bundled, max_length=512)
    assert missing.value.filename == str(tmp_path / "nowhere.jsonl")
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]")):
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(ValueError, match=f"{file}: .*empty (file|array)"):
            read_examples([file], bundled, max_length=512)
    with pytest.raises(ValueError, match="in no files"):
        read_examples([], bundled, max_length=512)


def test_bad_items_of_a_list_are_named(tmp_path: Path, bundled: Tokenizer) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([PROBLEM, {"text": "x"}]))
    with pytest.raises(ValueError, match=f"{file}, item 2: expected"):
        read_examples([file], bundled, max_length=512)
    file.write_text("[1, 2")
    with pytest.raises(ValueError, match=f"{file}: not JSON"):
        read_examples([file], bundled, max_length=512)


def test_a_limit_too_small(tmp_path: Path, bundled: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length: expected at least 2, got 1"):
        read(tmp_path, bundled, PROBLEM, max_length=1)


# --- prompts --------------------------------------------------------------------------------------


def test_a_problems_prompt_is_the_bundled_models_own(tmp_path: Path, bundled: Tokenizer) -> None:
    text = heldout_prompts(1)[0]
    question = text.removeprefix("Question: ").removesuffix("\nAnswer:")
    for record in ({"question": question}, {"question": question, "answer": "5"}, {"prompt": text}):
        (prompt,), _ = read_prompts([write(tmp_path / "p.jsonl", record)], bundled)
        assert prompt.text == text
        assert list(prompt.token_ids) == bundled.encode(text)


def test_prompts_end_before_the_last_response(tmp_path: Path, bundled: Tokenizer) -> None:
    records = (openai(*TURNS), sharegpt(*TURNS[:3]), openai(("assistant", "Hi!"), *TURNS))
    prompts, report = read_prompts([write(tmp_path / "p.jsonl", *records)], bundled)
    assert [prompt.text for prompt in prompts] == [
        "Question: Hi\nAnswer: Hello.</s><s>Question: 2+3?\nAnswer:"
    ]
    assert (report.num_records, report.num_empty, report.num_repeated) == (3, 0, 2)


def test_prompts_of_tokens_and_empty_ones(tmp_path: Path, bundled: Tokenizer) -> None:
    tokens = {"prompt_ids": [0, 9, 9], "response_ids": [7]}
    file = write(tmp_path / "p.jsonl", tokens, {"prompt": ""}, openai(TURNS[1]))
    prompts, report = read_prompts([file], bundled)
    assert [prompt.token_ids for prompt in prompts] == [(0, 9, 9)]
    assert report.num_empty == 2
    with pytest.raises(ValueError, match=f"prompts: none in {file}"):
        read_prompts([write(file, {"prompt": ""})], bundled)


def test_a_bad_prompt_is_named(tmp_path: Path, bundled: Tokenizer) -> None:
    file = write(tmp_path / "p.jsonl", PROBLEM, openai(("system", "Be brief."), *TURNS))
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: .*only user and assistant"):
        read_prompts([file], bundled)
