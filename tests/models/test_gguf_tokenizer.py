"""The tokenizer of a GGUF file, against those that such files are written from."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from specrt.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from specrt.types import CheckpointError
from tests.checkpoints import make_checkpoint
from tests.gguf_files import Vocabulary, write_gguf

WORDS = (
    "abc", "de", "fghij", "can't", "WE'LL", "1234", "99", "éà", "Straße", "中文", "русский",
    "हिन्दी", "😀", "e\u0301", "don’t", "½", "x_1", "//",
)  # fmt: skip
ATOMS = (
    *WORDS, " ", "  ", "\n", "\r\n", "\t", "'s", "'S", " a", "aaa", "…", "\u00a0", "\u0600", "▁",
    "<",
)  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# As their authors' tokenizer.json have them.
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def texts(count: int = 300) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(ATOMS, k=rng.randint(0, 12))) for _ in range(count)]


def loaded(path: Path, vocabulary: Vocabulary, **options: Any) -> Tokenizer:
    make_checkpoint("llama", path, vocab_size=len(vocabulary.tokens), num_hidden_layers=1)
    write_gguf(path, path / "x.gguf", vocabulary=vocabulary, **options)
    return load_tokenizer(path / "x.gguf")


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A byte-level model whose pairs cross whatever any rule cuts."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s*\S{1,6}"), "isolated"), BYTE_LEVEL]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(texts(2000), trainer)
    model: dict[str, Any] = json.loads(fast.to_str())["model"]
    return model


def byte_level(model: dict[str, Any], pre: str | None = "llama-bpe") -> Vocabulary:
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    extra = {"<s>": 3, "<|end|>": 3, "<think>": 4, "[PAD0]": 5}
    kinds = [TokenType.NORMAL] * len(tokens) + [TokenType(kind) for kind in extra.values()]
    ends = {"bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1}
    merges = [" ".join(merge) for merge in model["merges"]]
    return Vocabulary([*tokens, *extra], kinds, pre=pre, merges=merges, settings=ends)


def reference(model: dict[str, Any], pre: str) -> FastTokenizer:
    """The model as a ``tokenizer.json`` of its family would cut texts."""
    merges = [tuple(merge) for merge in model["merges"]]
    takes_whole_words = pre in ("llama-bpe", "tekken")
    fast = FastTokenizer(models.BPE(model["vocab"], merges, ignore_merges=takes_whole_words))
    if pre == "qwen2":
        fast.normalizer = normalizers.NFC()
    cuts = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
        "gpt-2": [GPT2],
    }
    split = [pre_tokenizers.Split(Regex(PATTERNS.get(pre, "")), "isolated"), BYTE_LEVEL]
    fast.pre_tokenizer = pre_tokenizers.Sequence(cuts.get(pre, split))
    return fast


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "smollm", "gpt-2"])
def test_text_is_cut_as_the_authors_do(pre: str, trained: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = loaded(tmp_path, byte_level(trained, pre)), reference(trained, pre)
    for text in texts():
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids) == (theirs.normalizer or normalizers.Replace("", "")).normalize_str(
            text
        )
    begins = ours.encode("abc")[:1] == ours.encode("<s>", add_special_tokens=False)
    assert begins == (pre in ("llama-bpe", "tekken"))


def test_special_tokens(trained: dict[str, Any], tmp_path: Path) -> None:
    size = len(trained["vocab"])
    ours = loaded(tmp_path, byte_level(trained), template=TEMPLATE)
    a, b = (ours.encode(text, add_special_tokens=False) for text in ("a", "b"))
    ids = ours.encode("a<s>b<think>a<|end|>", add_special_tokens=False)
    assert ids == [*a, size, *b, size + 2, *a, size + 1]
    assert ours.decode(ids) == "ab<think>a"
    assert ours.special_tokens == {size: "<s>", size + 1: "<|end|>", size + 3: ""}
    # What is unused is no token.
    assert size + 3 not in ours.encode("[PAD0]")
    messages = [{"role": "user", "content": "a"}]
    assert ours.apply_chat_template(messages) == [size, *a, size + 1]


@pytest.mark.parametrize(("has_bos", "has_eos"), [(True, False), (False, True), (True, True)])
def test_what_is_put_around_a_text(
    has_bos: bool, has_eos: bool, trained: dict[str, Any], tmp_path: Path
) -> None:
    plain = byte_level(trained)
    settings = {**plain.settings, "add_bos_token": has_bos, "add_eos_token": has_eos}
    ours = loaded(tmp_path, replace(plain, settings=settings))
    size, ids = len(trained["vocab"]), ours.encode("abc", add_special_tokens=False)
    assert ours.encode("abc") == [size] * has_bos + ids + [size + 1] * has_eos


# --- SentencePiece --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceProcessor:
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(texts(2000)).splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        character_coverage=0.98,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=out.getvalue())


def pieces(model: SentencePieceProcessor, **settings: Any) -> Vocabulary:
    numbers = range(model.vocab_size())
    is_kind: list[tuple[Callable[[int], bool], TokenType]] = [
        (model.is_unknown, TokenType.UNKNOWN),
        (model.is_control, TokenType.CONTROL),
        (model.is_byte, TokenType.BYTE),
    ]
    kinds = [
        next((kind for is_so, kind in is_kind if is_so(number)), TokenType.NORMAL)
        for number in numbers
    ]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return Vocabulary(
        [model.id_to_piece(number) for number in numbers],
        kinds,
        model="llama",
        pre="default",
        scores=[model.get_score(number) for number in numbers],
        settings=ends | settings,
    )


def test_ids_are_sentencepieces(sentencepiece: SentencePieceProcessor, tmp_path: Path) -> None:
    ours = loaded(tmp_path, pieces(sentencepiece))
    for text in filter(None, texts()):
        ids = sentencepiece.encode(text)
        assert ours.encode(text) == [1, *ids], text
        assert ours.decode(ids) == text.replace("▁", " ")
    # Behind a special token another text begins, as in llama.cpp.
    a = sentencepiece.encode("a")
    assert ours.encode("a</s>a") == [1, *a, 2, *a]
    assert len(ours._byte_tokens) == 256


def test_no_space_before_a_text(sentencepiece: SentencePieceProcessor, tmp_path: Path) -> None:
    ours = loaded(tmp_path, pieces(sentencepiece, add_space_prefix=False, add_bos_token=False))
    assert ours.encode(" a") == sentencepiece.encode("a")
    assert ours.encode("a") == [sentencepiece.piece_to_id("a")]
    assert ours.decode(ours.encode(" a")) == " a"


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "t5", r"tokenizer.ggml.model: 't5' is not supported \(supported: gpt2, llama\)"),
        ("model", ..., "missing key tokenizer.ggml.model"),
        ("pre", "kimi-k2", r"tokenizer.ggml.pre: 'kimi-k2' is not supported \(supported: llama-b"),
        ("pre", "default", "tokenizer.ggml.pre: 'default' is not supported"),
        ("pre", ..., "tokenizer.ggml.pre: missing"),
        ("tokens", ..., "missing key tokenizer.ggml.tokens"),
        ("merges", ..., "missing key tokenizer.ggml.merges"),
        ("merges", ["ab"], "tokenizer.ggml.merges: expected two tokens and a space between"),
        ("merges", ["a nothing"], "the tokenizer cannot be made: .*nothing"),
        ("token_type", [1, 1], "token_type: expected 97, as many as tokenizer.ggml.tokens, got 2"),
        ("bos_token_id", 97, "bos_token_id: expected a token below 97, got 97"),
        ("add_bos_token", 3, "add_bos_token: expected true or false, got 3"),
    ],
)
def test_what_is_refused_by_its_key(key: str, value: Any, message: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, num_hidden_layers=1)
    file = tmp_path / "x.gguf"
    named = f"tokenizer.ggml.{key}"
    write_gguf(tmp_path, file, edit=lambda metadata: metadata.update({named: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_scores_are_needed(sentencepiece: SentencePieceProcessor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing key tokenizer\.ggml\.scores"):
        loaded(tmp_path, replace(pieces(sentencepiece), scores=()))


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, num_hidden_layers=1)
    file = tmp_path / "x.gguf"
    write_gguf(tmp_path, file, edit=lambda m: m.update({"tokenizer.chat_template": 5}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template: expected a text"):
        load_tokenizer(file)


def test_where_a_tokenizer_is(tmp_path: Path) -> None:
    assert tokenizer_file(tmp_path) is None
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert tokenizer_file(tmp_path) == tmp_path / "x.gguf"
