"""Text of an engine with a real tokenizer: what a result shows, and what ended it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_model
from tests.text_tokenizers import ids, metaspace

TOKENIZER = metaspace()
A, B, THE, END = ids(TOKENIZER, "▁a", "b", "▁the", "<|im_end|>")
VOCAB = len(TOKENIZER.inner)
SAMPLED = SamplingParams(max_new_tokens=24, temperature=1.0, seed=3, ignore_eos=True)
PROMPTS = [[A], [1], [A, 1, 2, 3], [THE, *[3] * 20], [B, A, B, A, B, A]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, vocab_size=VOCAB, eos_token_id=2)
    return Engine(make_model(path), PromptLookupDrafter(), TOKENIZER, max_batch=3)


def always(token: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=5, logit_bias={token: 1000.0})


def shown(result: GenerationResult) -> tuple[str, int | str | None]:
    assert result.finish_reason == "stop"
    return result.text, result.stop_reason


def test_text_is_what_the_output_adds(engine: Engine) -> None:
    """Streamed or not, and with a stop string that does not come."""
    results = engine.generate(PROMPTS, SAMPLED)
    texts = [result.text for result in results]
    for prompt, result in zip(PROMPTS, results, strict=True):
        before = TOKENIZER.decode(prompt)
        assert before + result.text == TOKENIZER.decode(prompt + result.token_ids)
        assert (result.finish_reason, result.stop_reason) == ("length", None)
    for params in (SAMPLED, replace(SAMPLED, stop="never")):
        chunks = list(engine.stream(PROMPTS, params))
        assert ["".join(c.text for c in chunks if c.index == i) for i in range(5)] == texts
        assert [result.text for result in engine.generate(PROMPTS, params)] == texts


def test_a_space_before_the_first_word_is_text(engine: Engine) -> None:
    assert engine.generate([A], always(THE)).text == " the" * 5
    assert shown(engine.generate([B], replace(always(THE), stop=" the"))) == ("", " the")


@pytest.mark.parametrize("is_kept", [False, True])
def test_what_ended_it_is_said_and_kept_if_asked_for(engine: Engine, is_kept: bool) -> None:
    def outcome(token: int, **options: object) -> tuple[str, int | str | None]:
        params = replace(always(token), include_stop_str_in_output=is_kept, **options)  # type: ignore[arg-type]
        return shown(engine.generate([B], params))

    assert outcome(2) == ("", None)  # the end of the sequence, a special token
    assert outcome(2, stop_token_ids=[2, B]) == ("", None)
    assert outcome(2, ignore_eos=True, stop_token_ids=[2]) == ("", 2)
    assert outcome(B, stop_token_ids=[B]) == ("b" if is_kept else "", B)
    assert outcome(B, stop="bb") == ("bb" if is_kept else "", "bb")
    assert outcome(END, stop=["<|im_end|>"]) == ("<|im_end|>" if is_kept else "", "<|im_end|>")


def test_special_tokens_are_shown_if_asked_for(engine: Engine) -> None:
    """In streams, and behind a prompt that ends with one."""
    params = replace(SAMPLED, temperature=3.0, skip_special_tokens=False)
    prompts = [*PROMPTS, [A, 3], [3]]
    results = engine.generate(prompts, params)
    assert sum("<|im_end|>" in result.text for result in results) > 2
    for prompt, result in zip(prompts, results, strict=True):
        before = TOKENIZER.inner.decode(prompt, clean_up_tokenization_spaces=False)
        whole = TOKENIZER.inner.decode(
            prompt + result.token_ids, clean_up_tokenization_spaces=False
        )
        assert before + result.text == whole
    chunks = list(engine.stream(prompts, params))
    for i, result in enumerate(results):
        assert "".join(c.text for c in chunks if c.index == i) == result.text


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("is_kept", [False, True])
def test_what_ends_an_output_is_shown_with_the_stop_alone(
    engine: Engine, is_kept: bool, is_streamed: bool
) -> None:
    """A special token that ends it is not text by itself; stop strings are what they were."""

    def outcome(token: int, **options: object) -> tuple[str, int | str | None]:
        params = replace(
            always(token),
            include_stop_str_in_output=is_kept,
            skip_special_tokens=False,
            **options,  # type: ignore[arg-type]
        )
        if not is_streamed:
            return shown(engine.generate([B], params))
        chunks = list(engine.stream([B], params))
        result = chunks[-1].result
        assert result is not None
        assert "".join(chunk.text for chunk in chunks) == result.text
        return shown(result)

    assert outcome(2) == ("</s>" if is_kept else "", None)
    assert outcome(2, stop="</s>") == ("</s>" if is_kept else "", "</s>")
    assert outcome(2, stop="b</s>") == ("</s>" if is_kept else "", None)
    assert outcome(2, ignore_eos=True, stop_token_ids=[2]) == ("</s>" if is_kept else "", 2)
    twice = "<|im_end|>" * 2
    assert outcome(END, stop=[twice]) == (twice if is_kept else "", twice)
    assert outcome(END, stop_token_ids=[END]) == ("<|im_end|>" if is_kept else "", END)
    # Of a part of its name too, now that it is text.
    assert outcome(END, stop="im_") == ("<|im_" if is_kept else "<|", "im_")
