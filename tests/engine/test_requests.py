"""What a call of the engine asks for: prompts in their forms, and options beside them."""

from __future__ import annotations

import pytest
import torch

from specrt.engine.engine import Engine
from specrt.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.support import LetterTokenizer, make_engine, make_model, texts

SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, num_hidden_layers=1)
    return make_engine(make_model(path))


def test_one_prompt_gives_a_result_and_many_a_list(engine: Engine) -> None:
    ids = LetterTokenizer().encode("abc")
    expected = engine.generate("abc", SHORT)
    assert expected.prompt_token_ids == ids
    for one in (torch.tensor(ids), iter(ids), {"prompt": "abc"}, {"input_ids": ids}):
        assert engine.generate(one, SHORT).token_ids == expected.token_ids
    mask = torch.tensor([[0, 1, 1, 1]])
    padded = {"input_ids": torch.tensor([[0, *ids]]), "attention_mask": mask}
    for many in (["abc"], torch.tensor([ids]), ("abc" for _ in "x"), padded):
        assert texts(engine.generate(many, SHORT)) == [expected.token_ids]


def test_options_stand_in_place_of_fields(engine: Engine) -> None:
    expected = engine.generate("abc", SHORT).token_ids
    assert engine.generate("abc", max_new_tokens=4, ignore_eos=True).token_ids == expected
    long = SamplingParams(max_new_tokens=9, ignore_eos=True)
    assert engine.generate("abc", long, max_new_tokens=4).token_ids == expected
    both = engine.generate(["abc", "b"], [SHORT, long], max_new_tokens=2)
    assert [len(result.token_ids) for result in both] == [2, 2]
    chunks = engine.stream("abc", long, max_new_tokens=4)
    assert [token for chunk in chunks for token in chunk.token_ids] == expected


def test_what_is_wrong_is_said_at_the_call(engine: Engine) -> None:
    for call in (engine.generate, engine.stream):
        with pytest.raises(TypeError, match="max_tokens: no sampling option; expected max_new_to"):
            call("abc", max_tokens=3)
        with pytest.raises(ValueError, match=r"^prompts\[1\]: expected at least one token"):
            call(["abc", ""], SHORT)
        with pytest.raises(ValueError, match=r"^prompts\[1\]\[0\]: expected .* got NoneType"):
            call(["abc", [None]], SHORT)
        with pytest.raises(ValueError, match=r"^prompts: expected .* got bytes"):
            call(b"abc", SHORT)


def test_special_tokens_are_the_callers_choice(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: object, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [5]

    monkeypatch.setattr(LetterTokenizer, "encode", encode)
    assert engine.generate("a", SHORT).prompt_token_ids == [1, 5] == engine.encode("a")
    assert engine.encode("a", add_special_tokens=False) == [5]
    for call in ("a", ["a"]):
        without = engine.generate(call, SHORT, add_special_tokens=False)
        assert (without[0] if isinstance(without, list) else without).prompt_token_ids == [5]
    (chunk, *_) = engine.stream("a", SHORT, add_special_tokens=False, max_new_tokens=1)
    assert chunk.result is not None
    assert chunk.result.prompt_token_ids == [5]
