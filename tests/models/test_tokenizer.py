"""The tokenizer wrapper against the ``transformers`` tokenizer behind it."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
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


def test_a_special_token_that_is_none(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, None, adds_bos=False)
    file = tmp_path / "tokenizer_config.json"
    named = {**json.loads(file.read_text()), "eos_token": "", "unk_token": None}
    file.write_text(json.dumps(named))
    assert load_tokenizer(tmp_path).special_tokens.keys() >= {1, 2}


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


# --- SentencePiece's tokenizer.model --------------------------------------------------------------

WORDS = ("abc", "de", "fghij", "ca", "bad", "1234", "éa")
TEXTS = ("", "abc de", " abc", "  bad  ca ", "\n\tab", "é…€😀中", "▁a", "0.5", "a" * 100)


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """Llama's kind: pairs merged, bytes for what is rare, a space before each text."""
    out = io.BytesIO()
    rng = random.Random(0)
    SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(WORDS, k=9)) for _ in range(99)),
        model_writer=out,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def token(content: str) -> dict[str, object]:
    return {"__type": "AddedToken", "content": content, "normalized": True}


VICUNA = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "legacy": False,
    "bos_token": token("<s>"),
    "eos_token": token("</s>"),
    "unk_token": token("<unk>"),
}


@pytest.mark.parametrize(
    "config",
    [
        None,
        VICUNA,
        {**VICUNA, "legacy": True, "add_bos_token": False},
        {"tokenizer_class": "LLaMATokenizer"},
        {"tokenizer_class": "CodeLlamaTokenizer"},
    ],
)
def test_sentencepiece_gives_its_own_ids(
    config: dict[str, object] | None, sentencepiece_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    theirs = SentencePieceProcessor(model_proto=sentencepiece_model)
    bos = [theirs.bos_id()] if (config or {}).get("add_bos_token", True) else []
    for text in TEXTS:
        ids = theirs.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == bos + ids
        assert tokenizer.decode(ids) == theirs.decode(ids)


def test_other_ids_than_sentencepieces_are_refused(
    sentencepiece_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    config = {"tokenizer_class": "T5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tokenizer.model: T5Tokenizer of transformers gives"):
        load_tokenizer(tmp_path)


# --- refusals -------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"
REMOTE = '{"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", null]}}'
FORMS = "expected one of tokenizer.json, tokenizer.model, vocab.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, f": no tokenizer; {FORMS}"),
        ({"tekken.json": "{}"}, f"/tekken.json: a tokenizer in Mistral's own form; {FORMS}"),
        ({"vocab.json": "{}"}, "/vocab.json: expected merges.txt beside it"),
        ({"tokenizer.json": POINTER}, "/tokenizer.json: a Git-LFS pointer"),
        ({"tokenizer.model": POINTER}, "/tokenizer.model: a Git-LFS pointer"),
        ({"tokenizer.model": ""}, "/tokenizer.model: not a SentencePiece model"),
        # As tiktoken has it, beside the weights in Meta's own form.
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "/tokenizer.model: not a SentencePiece model"),
        ({"tokenizer.json": ""}, "/tokenizer.json: cannot be read as JSON"),
        ({"tokenizer.json": '{"added_tokens": ['}, "/tokenizer.json: cannot be read as JSON"),
        ({"tokenizer.json": "[]"}, "/tokenizer.json: expected a JSON object, got list"),
        ({"tokenizer.json": "{}"}, "/tokenizer.json: the tokenizer cannot be loaded: "),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "/tokenizer_config.json: cannot"),
        ({"tokenizer.json": "{}", "added_tokens.json": "[]"}, "/added_tokens.json: expected"),
        ({"tokenizer_config.json": REMOTE}, "/tokenizer_config.json: the tokenizer is code of"),
        (
            {"tokenizer_config.json": REMOTE, "tokenizer.json": "{}"},
            "/tokenizer_config.json: the tokenizer is code of the repository",
        ),
    ],
)
def test_one_line_names_what_is_wrong(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}{message}")
    assert "\n" not in said


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
