"""Stopping, failing, streaming, batching: what a caller of the engine relies on."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specrt.draft.base import Drafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams
from specrt.tree import TreeBuilder
from specrt.types import SequenceState
from tests.checkpoints import make_checkpoint
from tests.engine.support import (
    LetterTokenizer,
    RandomTreeDrafter,
    make_engine,
    make_model,
    prompts,
    sampled,
    texts,
)

VOCAB = 97
LONG = SamplingParams(max_new_tokens=60, temperature=1.0, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def answer(model: LlamaModel) -> list[int]:
    """60 tokens of plain, varied text after prompt [3, 4, 5]."""
    return make_engine(model).generate([3, 4, 5], LONG).token_ids


def knowing(answer: list[int]) -> Drafter:
    """Proposes long chains that are right, so that every stop falls inside an accepted path."""
    return RandomTreeDrafter({(3, 4, 5): answer}, VOCAB, 16, hit_rate=0.97, seed=1)


@pytest.mark.parametrize("is_drafted", [False, True])
def test_stop_tokens_end_the_output(model: LlamaModel, answer: list[int], is_drafted: bool) -> None:
    drafter = knowing(answer) if is_drafted else None
    for index in (0, 1, 7, 30):
        stop = answer[index]
        first = answer.index(stop)
        params = SamplingParams(
            max_new_tokens=60, temperature=1.0, seed=11, ignore_eos=True, stop_token_ids=[stop]
        )
        result = make_engine(model, drafter).generate([3, 4, 5], params)
        assert result.finish_reason == "stop"
        assert result.token_ids == answer[: first + 1]


@pytest.mark.parametrize("is_drafted", [False, True])
def test_limits_end_the_output(model: LlamaModel, answer: list[int], is_drafted: bool) -> None:
    for limit in (1, 2, 13):
        drafter = knowing(answer) if is_drafted else None
        params = SamplingParams(max_new_tokens=limit, temperature=1.0, seed=11, ignore_eos=True)
        result = make_engine(model, drafter).generate([3, 4, 5], params)
        assert result.finish_reason == "length"
        assert result.token_ids == answer[:limit]


@pytest.mark.parametrize("is_drafted", [False, True])
def test_stop_strings_cut_the_text(model: LlamaModel, answer: list[int], is_drafted: bool) -> None:
    text = LetterTokenizer().decode(answer)
    for start, size in ((0, 1), (5, 3), (20, 6)):
        stop = text[start : start + size]
        drafter = knowing(answer) if is_drafted else None
        params = SamplingParams(
            max_new_tokens=60, temperature=1.0, seed=11, ignore_eos=True, stop=["\x00never", stop]
        )
        engine = make_engine(model, drafter)
        result = engine.generate([3, 4, 5], params)
        assert result.finish_reason == "stop"
        assert result.text == text[: text.index(stop)]
        assert result.token_ids == answer[: text.index(stop) + size]
        streamed = "".join(chunk.text for chunk in engine.stream([3, 4, 5], params))
        assert streamed == result.text


def test_the_context_limit_inside_a_tree(model: LlamaModel) -> None:
    limit = model.config.max_positions
    prompt = [(5 * i) % VOCAB for i in range(limit - 9)]
    params = SamplingParams(max_new_tokens=500, ignore_eos=True)
    expected = make_engine(model).generate(prompt, params)
    assert expected.finish_reason == "context"
    assert len(expected.token_ids) == 9
    drafter = RandomTreeDrafter({tuple(prompt): expected.token_ids}, VOCAB, 64, hit_rate=0.9)
    result = make_engine(model, drafter).generate(prompt, params)
    assert (result.token_ids, result.finish_reason) == (expected.token_ids, "context")


def test_a_failing_sequence_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, tie_word_embeddings=False)
    model = make_model(tmp_path)
    healthy = prompts(4, 50, seed=3)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, logit_bias={96: -100.0})
    expected = texts(make_engine(model).generate(healthy, params))
    model.weights.embed[96] = float("nan")
    engine = make_engine(model, PromptLookupDrafter(), max_batch=5)
    results = engine.generate([*healthy[:2], [1, 96, 2], *healthy[2:]], params)
    failed = results.pop(2)
    assert failed.finish_reason == "error"
    assert failed.error is not None and "NaN" in failed.error
    assert failed.stats.num_rounds + failed.stats.num_accepted_tokens == len(failed.token_ids)
    assert texts(results) == expected
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_a_failing_stream_shows_all_its_text(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, tie_word_embeddings=False)
    model = make_model(tmp_path)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=4)
    words = make_engine(model).generate([1, 2], params).token_ids
    poison = next(token for token in words[6:] if words.index(token) >= 6)
    spoken = words[: words.index(poison) + 1]
    model.weights.embed[poison] = float("nan")
    # Whatever is said last could be the beginning of this stop string, and is held back.
    stop = LetterTokenizer().decode(spoken[-2:]) + "\x00"
    held = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=4, stop=stop)
    chunks = list(make_engine(model).stream([1, 2], held))
    result = chunks[-1].result
    assert result is not None
    assert result.finish_reason == "error"
    assert result.token_ids == spoken
    assert (
        "".join(chunk.text for chunk in chunks) == result.text == LetterTokenizer().decode(spoken)
    )


def test_more_prompts_than_places(model: LlamaModel) -> None:
    params = [sampled(seed, ignore_eos=True) for seed in range(9)]
    expected = [
        make_engine(model).generate(prompt, p).token_ids
        for prompt, p in zip(prompts(9, VOCAB), params, strict=True)
    ]
    for max_batch in (2, 5, 16):
        engine = make_engine(model, PromptLookupDrafter(), max_batch=max_batch)
        assert texts(engine.generate(prompts(9, VOCAB), params)) == expected


def test_stream_gives_what_generate_gives(model: LlamaModel) -> None:
    engine = make_engine(model, PromptLookupDrafter(), max_batch=3)
    expected = engine.generate(prompts(5, VOCAB), LONG)
    tokens: dict[int, list[int]] = {}
    shown: dict[int, str] = {}
    for chunk in engine.stream(prompts(5, VOCAB), LONG):
        tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
        shown[chunk.index] = shown.get(chunk.index, "") + chunk.text
        if chunk.result is not None:
            assert chunk.result.text == shown[chunk.index]
    assert [tokens[i] for i in range(5)] == texts(expected)
    assert [shown[i] for i in range(5)] == [result.text for result in expected]


def test_an_abandoned_stream_frees_its_pages(model: LlamaModel) -> None:
    engine = make_engine(model, PromptLookupDrafter())
    stream = engine.stream(prompts(3, VOCAB), LONG)
    next(stream)
    assert engine.cache.num_free_pages < engine.cache.num_pages
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert engine.cache.num_free_pages == engine.cache.num_pages
    stream = engine.stream(prompts(3, VOCAB), LONG)
    next(stream)
    del stream
    gc.collect()
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_two_streams_at_once(model: LlamaModel) -> None:
    """The second makes the cache grow under the first, which must not notice."""
    engine = make_engine(model, PromptLookupDrafter())
    first, second = prompts(2, VOCAB, seed=5)
    expected = [engine.generate(p, LONG).token_ids for p in (first, second * 3)]
    fresh = make_engine(model, PromptLookupDrafter())
    got: list[list[int]] = [[], []]
    streams = [fresh.stream(first, LONG)]
    for _ in range(3):
        got[0] += next(streams[0]).token_ids
    streams.append(fresh.stream(second * 3, LONG))
    for chunk in streams[1]:
        got[1] += chunk.token_ids
        more = next(streams[0], None)
        got[0] += more.token_ids if more else []
    for chunk in streams[0]:
        got[0] += chunk.token_ids
    assert got == expected


def test_a_drafter_that_raises_loses_nothing(model: LlamaModel) -> None:
    class Broken(PromptLookupDrafter):
        rounds = 0

        def propose(self, states, budget):  # type: ignore[no-untyped-def]
            self.rounds += 1
            if self.rounds == 5:
                raise RuntimeError("broken drafter")
            return super().propose(states, budget)

    drafter = Broken()
    engine = make_engine(model, drafter)
    for _ in range(2):
        assert texts(engine.generate(prompts(2, VOCAB), LONG)) == texts(
            make_engine(model).generate(prompts(2, VOCAB), LONG)
        )
    assert drafter.rounds > 5
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_bad_prompts_are_refused_before_anything_runs(model: LlamaModel) -> None:
    engine = make_engine(model)
    limit = model.config.max_positions
    for prompt, words in (
        ("", "empty prompt"),
        ([], "empty prompt"),
        ([5, VOCAB], "outside the vocabulary"),
        ([5] * limit, f"context of {limit}"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.generate([[1, 2], prompt])
    with pytest.raises(ValueError, match="sampling: expected one for each of 2"):
        engine.generate([[1], [2]], [LONG])
    with pytest.raises(ValueError, match=f"suppress_tokens: expected token ids < {VOCAB}, got 97"):
        engine.generate([1, 2], SamplingParams(logit_bias={97: 1.0}))
    assert engine.generate([]) == []
    assert engine.cache.num_pages == engine.cache.num_free_pages


def test_out_of_memory_says_how_much(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)

    def refuse(*shape: object, **_: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("specrt.pages._untouched_zeros", refuse)
    result = engine.generate([1, 2, 3], LONG)
    assert result.finish_reason == "error" and result.token_ids == []
    assert re.fullmatch(r"KV cache: no memory for \d+ pages of 64 tokens, \d+ MiB", result.error)


def test_chat_messages_and_text(model: LlamaModel) -> None:
    engine: Engine = make_engine(model)
    messages = [{"role": "user", "content": "hi"}]
    one = engine.generate(messages, LONG)
    assert one.prompt_token_ids == LetterTokenizer().encode("<user>hi")
    two = engine.generate(["<user>hi", messages], LONG)
    assert [result.token_ids for result in two] == [one.token_ids] * 2


def test_statistics_add_up(model: LlamaModel) -> None:
    result = make_engine(model, PromptLookupDrafter()).generate([7, 8, 9] * 8, LONG)
    stats = result.stats
    assert stats.num_accepted_tokens == sum(stats.accept_lengths)
    assert stats.num_rounds == len(stats.accept_lengths)
    assert stats.tau == pytest.approx(len(result.token_ids) / stats.num_rounds)
    assert len(result.token_ids) == stats.num_accepted_tokens + stats.num_rounds
    assert sum(stats.accepted_by_depth) == stats.num_accepted_tokens
    assert all(0 <= rate <= 1 for rate in stats.acceptance_rate)


@pytest.mark.parametrize("num_tokens", [12, 15])
def test_logprobs_end_where_the_output_does(
    model: LlamaModel, answer: list[int], num_tokens: int
) -> None:
    """Inside an accepted path there are more of them than tokens."""
    whole = make_engine(model).generate([3, 4, 5], replace(LONG, logprobs=True)).logprobs
    assert whole is not None
    for ends in ({"max_new_tokens": num_tokens}, {"stop_token_ids": [answer[num_tokens - 1]]}):
        params = replace(LONG, logprobs=True, **ends)
        result = make_engine(model, Listening(answer)).generate([3, 4, 5], params)
        assert result.logprobs == whole[:num_tokens]


def test_a_drawn_seed_is_told_and_repeats_the_text(model: LlamaModel) -> None:
    drawn = SamplingParams(max_new_tokens=20, temperature=1.0, ignore_eos=True)
    engine = make_engine(model)
    results = engine.generate([[1, 2]] * 4, drawn)
    assert len({result.seed for result in results}) == 4, "one draw for all prompts of a call"
    assert len({tuple(result.token_ids) for result in results}) == 4
    for result in results:
        again = engine.generate([1, 2], replace(drawn, seed=result.seed))
        assert (again.token_ids, again.seed) == (result.token_ids, result.seed)
    assert engine.generate([1, 2], replace(drawn, seed=-5)).seed == -5


class Listening(RandomTreeDrafter):
    """Proposes one long right chain, and keeps what it is told came of it."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__({(3, 4, 5): answer}, VOCAB, 16)
        self.heard: list[int] = []

    def _tree(self, state: SequenceState, max_nodes: int) -> TreeBuilder:
        tree = TreeBuilder(state.token_ids[-1])
        said = len(state.token_ids) - state.prompt_len
        tree.add_path(self._answers[3, 4, 5][said : said + 7], max_nodes)
        return tree

    def observe(self, states, proposal, result, taps):  # type: ignore[no-untyped-def]
        self.heard += result.accept_length.tolist()


@pytest.mark.parametrize("num_tokens", [9, 12, 15, 16])
@pytest.mark.parametrize("ends_by", ["token", "string", "limit"])
def test_only_what_is_emitted_counts(
    model: LlamaModel, answer: list[int], ends_by: str, num_tokens: int
) -> None:
    """Rounds of eight tokens: an output ends with the first or a middle one of the second round,
    with its last drafted token, or with its bonus token."""
    letters = LetterTokenizer().decode(answer)
    ends: dict[str, dict[str, object]] = {
        "token": {"stop_token_ids": [answer[num_tokens - 1]]},
        "string": {"stop": letters[num_tokens - 3 : num_tokens]},
        "limit": {"max_new_tokens": num_tokens},
    }
    assert answer.index(answer[num_tokens - 1]) == num_tokens - 1, "the token comes earlier too"
    drafter = Listening(answer)
    chunks = list(make_engine(model, drafter).stream([3, 4, 5], replace(LONG, **ends[ends_by])))
    result = chunks[-1].result
    assert result is not None and len(result.token_ids) == num_tokens
    stats, is_cut = result.stats, num_tokens < 16
    assert stats.accept_lengths == [7, num_tokens - 9]
    assert (stats.num_rounds, stats.num_accepted_tokens) == (2, num_tokens - 2)
    assert stats.tau == num_tokens / 2
    assert sum(stats.accepted_by_depth) == stats.num_accepted_tokens
    assert [chunk.num_accepted for chunk in chunks] == [7, num_tokens - 8 - (not is_cut)]
    assert drafter.heard == [7, 7], "drafters learn from the whole path"
