"""A real model: SmolLM2-135M-Instruct in Q4_1, against ``transformers`` on its values."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import specrt
from specrt import Engine, builtin
from specrt.config import ModelConfig
from specrt.targets import PACKAGED, SMOLLM2, how_to_install
from tests.models.test_gguf_tokenizer import ATOMS
from tools.export_checkpoint import export

QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Write a haiku about the sea.",
    "Explain photosynthesis to a child.", "List five fruits and their colours.",
    "Write a Python function that reverses a string.", "What is 17 times 23?",
    "Summarise the story of Romeo and Juliet.", "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish, German and Italian.", "Who was Ada Lovelace?",
    "What is the difference between a virus and a bacterium?", "Tell me a joke about penguins.",
    "Write an e-mail that asks for a day off.", "How do I tie a bowline?",
)  # fmt: skip


@pytest.fixture(scope="module")
def file() -> Path:
    found = PACKAGED[SMOLLM2].find()
    if found is None:
        pytest.skip(how_to_install(SMOLLM2))
    return found


@pytest.fixture(scope="module")
def engine(file: Path) -> Engine:
    """Of float32 values: what ``transformers`` multiplies by."""
    return specrt.load(SMOLLM2, dtype="float32", quantize="none", progress=False)


def chat(text: str, system: str | None = None) -> list[dict[str, str]]:
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": text}]


def assert_greedy(model: Any, prompt: Sequence[int], said: Sequence[int]) -> None:
    """Whether each token is the one that ``model`` finds likeliest behind those before it."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(said)


def test_greedy_text_is_that_of_transformers(file: Path, engine: Engine, tmp_path: Path) -> None:
    """A few tokens; of all prompts and many tokens: the slow test."""
    config = ModelConfig.from_directory(file)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    export(SMOLLM2, tmp_path, "float32")
    assert ModelConfig.from_directory(tmp_path) == replace(config, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    result = engine.generate(chat(QUESTIONS[1]), max_new_tokens=24)
    assert len(result.token_ids) == 24
    assert_greedy(model, result.prompt_token_ids, result.token_ids)


def test_a_drafter_changes_nothing_in_its_own_blocks(file: Path) -> None:
    engine = specrt.load(SMOLLM2, "prompt-lookup", progress=False)
    assert engine.target.weights.form == "Q4_1 + Q8_0"
    question = chat("Repeat this: one two three four, one two three four, one two three four.")
    drafted = engine.generate(question, max_new_tokens=32)
    plain = specrt.load(SMOLLM2, progress=False).generate(question, max_new_tokens=32)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.tau > 1
    assert plain.text == engine.tokenizer.decode(plain.token_ids)


def test_chat_template_and_special_tokens(engine: Engine) -> None:
    tokenizer, text = engine.tokenizer, "Hello <|im_end|> there"
    said = tokenizer.inner.decode(engine.encode(chat("Hi.", "Be brief.")))
    assert said == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "named SmolLM" in tokenizer.inner.decode(engine.encode(chat("Hi.")))
    assert engine.target.config.eos_ids == (2, 0)
    assert tokenizer.inner.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert 2 in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == "Hello  there"


def hard_texts() -> list[str]:
    rng = random.Random(1)
    made = ["".join(rng.choices(ATOMS, k=rng.randint(1, 12))) for _ in range(200)]
    return [
        *made,
        *QUESTIONS,
        *builtin.heldout_prompts(10),
        "\t\tif x:\n\n\n    y  = 3.14159e-10\n",
    ]


def test_texts_come_back(engine: Engine) -> None:
    for text in hard_texts():
        ids = engine.tokenizer.encode(text, add_special_tokens=False)
        assert engine.tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_long_greedy_texts_and_the_tokenizer_are_those_of_transformers(
    file: Path, engine: Engine
) -> None:
    """Against its own reading of the file: 20 chat prompts, 200 tokens each."""
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # It does not read which rule cuts texts first: this is that of SmolLM's tokenizer.json.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    assert theirs.chat_template == engine.tokenizer.inner.chat_template
    for text in hard_texts():
        ids = engine.tokenizer.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    problems = [one.removeprefix("Question: ")[:-8] for one in builtin.heldout_prompts(5)]
    prompts = [chat(text) for text in (*QUESTIONS, *problems)]
    expected = theirs.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
    results = engine.generate(prompts, max_new_tokens=200, ignore_eos=True)
    assert len(results) == 20
    for result, ids in zip(results, expected, strict=True):
        assert result.prompt_token_ids == list(ids)
        assert len(result.token_ids) == 200
        assert_greedy(model, ids, result.token_ids)
