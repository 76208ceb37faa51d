"""The tokenizer wrapper against the ``transformers`` tokenizer behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specrt.models.tokenizer import load_tokenizer
from specrt.types import CheckpointError

TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
    "{{ bos_token + ' ask ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' answer' }}{% endif %}"
)


def make_tokenizer(path: Path, template: str | None, adds_bos: bool) -> None:
    words = ["<unk>", "<s>", "</s>", "ask", "answer", "how", "many", "?"]
    fast = FastTokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(path)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_text_goes_as_in_transformers(adds_bos: bool, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, None, adds_bos)
    tokenizer = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("how many ?")
    assert ids == theirs("how many ?")["input_ids"]
    assert ids == ([1] if adds_bos else []) + [5, 6, 7]
    # Not "how many?": cleaning up would change what the model said.
    assert tokenizer.decode([1, 5, 6, 7, 2]) == "how many ?"


@pytest.mark.filterwarnings("error")
def test_a_second_bos_is_warned_of_and_can_be_left_out(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, None, adds_bos=True)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match=r"begins with '<s>' .* add_special_tokens=False"):
        assert tokenizer.encode("<s> how") == [1, 1, 5]
    assert tokenizer.encode("<s> how", add_special_tokens=False) == [1, 5]
    assert tokenizer.encode("how", add_special_tokens=False) == [5]
    make_tokenizer(tmp_path, None, adds_bos=False)
    assert load_tokenizer(tmp_path).encode("<s> how") == [1, 5]


def test_half_a_character_is_refused_by_its_position(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, TEMPLATE, adds_bos=True)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"^prompt: .*'\\ud83d', at position 4$"):
        tokenizer.encode("how \ud83d many")
    assert tokenizer.encode("\U0001f600")  # a whole one


def test_chat_has_one_bos_and_opens_the_answer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, TEMPLATE, adds_bos=True)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "how many"}])
    assert ids == [1, 3, 5, 6, 4]
    with pytest.raises(ValueError, match="prompt: the chat template refuses it: users only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def test_chat_without_a_template(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, None, adds_bos=True)
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    make_tokenizer(tmp_path, None, adds_bos=True)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: the tokenizer cannot be loaded: ")
    assert "\n" not in message
