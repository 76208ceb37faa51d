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
