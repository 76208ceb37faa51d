"""A model's own generation settings: what applies by itself, what is offered, what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import specrt
from specrt import Engine, SamplingParams
from specrt.config import ModelConfig
from specrt.types import CheckpointError
from tests.checkpoints import edit_config, make_checkpoint
from tests.cli.test_cli import run, write_tokenizer

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SAID = {
    "repetition_penalty": 1.4,
    "suppress_tokens": [17, 29, 5000, -1],
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "max_new_tokens": 12,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen2", path, eos_token_id=None, bos_token_id=None)
    write_tokenizer(path)
    return path


def said(path: Path, content: dict[str, Any] | str) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "generation_config.json").write_text(text)
    return path


@pytest.fixture(scope="module")
def engine(directory: Path) -> Engine:
    return specrt.load(said(directory, SAID), "prompt-lookup", progress=False)


def tokens(engine: Engine, **sampling: Any) -> list[int]:
    given = SamplingParams(**{"max_new_tokens": 40, **sampling})
    ids: list[int] = engine.generate(PROMPT, given).token_ids
    return ids


def by_transformers(path: Path, **options: Any) -> list[int]:
    """Of its greedy decoding, the file's settings for sampling set aside."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    options = {"max_new_tokens": 40, "do_sample": False, "top_k": None, "top_p": None, **options}
    output = model.generate(torch.tensor([PROMPT]), **options, pad_token_id=0)
    ids: list[int] = output[0, len(PROMPT) :].tolist()
    return ids


def test_greedy_output_is_that_of_transformers(engine: Engine, directory: Path) -> None:
    own = tokens(engine)
    assert own == by_transformers(directory)
    unpenalised = tokens(engine, repetition_penalty=1.0)
    assert unpenalised == by_transformers(directory, repetition_penalty=1.0)
    free = tokens(engine, repetition_penalty=1.0, suppress_tokens=[])
    assert free == tokens(engine, repetition_penalty=1, suppress_tokens=())
    assert len({tuple(ids) for ids in (own, unpenalised, free)}) == 3, "each setting matters"
    assert not {17, 29} & set(unpenalised)


def test_a_request_suppresses_its_own_tokens(engine: Engine) -> None:
    banned = tokens(engine, suppress_tokens=[])[:2]
    ids = tokens(engine, suppress_tokens=banned, logit_bias={banned[0]: 50.0})
    assert not set(banned) & set(ids)
    biases = dict.fromkeys(banned, float("-inf"))
    assert ids == tokens(engine, suppress_tokens=(), logit_bias=biases)
    with pytest.raises(ValueError, match=r"suppress_tokens: expected token ids < 97, got 97"):
        tokens(engine, suppress_tokens=[97])
    with pytest.raises(ValueError, match=r"suppress_tokens: expected None or a sequence of ints"):
        tokens(engine, suppress_tokens=[-1])


def test_what_is_about_sampling_is_offered(engine: Engine) -> None:
    assert engine.default_sampling == SamplingParams(
        max_new_tokens=12,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.4,
        suppress_tokens=(17, 29),
    )


def test_the_command_line_takes_what_it_does_not_give(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(said(directory, SAID))
    given = ("--top-k", "3", "--seed", "5", "--prompt", "to be", "--json", "--target", path)
    _, out, _ = run(capsys, "generate", "--model-defaults", *given)
    flags = ("--temperature", "0.7", "--top-p", "0.8", "--max-new-tokens", "12")
    _, same, _ = run(capsys, "generate", *flags, *given)
    ids, expected = (json.loads(text)["token_ids"] for text in (out, same))
    assert len(ids) == 12
    assert ids == expected


def test_a_model_that_says_nothing(directory: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    assert SamplingParams.from_defaults(config.generation) == SamplingParams(
        repetition_penalty=1.0, suppress_tokens=()
    )
    assert config.generation.notice() is None


@pytest.mark.parametrize(
    ("content", "level", "parts"),
    [
        (
            SAID,
            logging.WARNING,
            [
                "repetition_penalty 1.4, suppress_tokens (2): by default",
                "do_sample, temperature 0.7, top_k 20, top_p 0.8: only if asked for",
                "default_sampling",
                "--model-defaults",
            ],
        ),
        ({"repetition_penalty": 1.05, "top_k": 50}, logging.INFO, ["1.05: by default"]),
        (
            {"no_repeat_ngram_size": 3, "num_beams": 1, "bad_words_ids": [[5]], "min_length": 0},
            logging.WARNING,
            ["bad_words_ids [[5]], no_repeat_ngram_size 3: not at all, though in transformers"],
        ),
    ],
)
def test_what_applies_is_said(
    content: dict[str, Any],
    level: int,
    parts: list[str],
    directory: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="specrt"):
        specrt.load(said(directory, content), None, progress=False)
    (record,) = [record for record in caplog.records if record.name == "specrt"]
    assert record.levelno == level
    assert record.getMessage().startswith(f"{directory}: the model's own generation settings")
    for part in parts:
        assert part in record.getMessage()


def test_old_configurations_have_such_settings_themselves(directory: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, repetition_penalty=1.2, num_beams=1, temperature=1.0, top_k=50)
    (tmp_path / "generation_config.json").unlink()
    defaults = ModelConfig.from_directory(tmp_path).generation
    assert defaults.repetition_penalty == 1.2
    assert defaults.is_complete
    said(tmp_path, {})
    assert ModelConfig.from_directory(tmp_path).generation.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected a JSON object"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number in 1e-05..99999, got 0"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty: expected a number"),
        ({"suppress_tokens": 5}, "suppress_tokens: expected a list of token ids, got 5"),
        ({"suppress_tokens": [True]}, "suppress_tokens: expected a list of token ids"),
        ({"do_sample": 1}, "do_sample: expected true or false, got 1"),
        ({"temperature": float("nan")}, "temperature: expected a number in 0..100000, got nan"),
        ({"top_k": 2**31}, "top_k: expected an integer in -1..2147483647, got 2147483648"),
        ({"top_p": 1.5}, "top_p: expected a number in 1e-30..1, got 1.5"),
        ({"min_p": []}, "min_p: expected a number in 0..1, got []"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an integer in 0..2147483647, got -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected token ids, got '</s>'"),
    ],
)
def test_broken_settings_are_refused(content: Any, part: str, directory: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_directory(said(directory, content))
    assert str(caught.value).startswith(f"{directory / 'generation_config.json'}: {part}")
