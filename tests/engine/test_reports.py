"""What is told of an output: likeliest tokens, prompts' log-probabilities, trees, choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from specrt.accept import accept, logprobs_of
from specrt.cache import CacheBatch
from specrt.device import Device
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine import head_by_need
from specrt.engine.engine import Engine
from specrt.engine.reports import _LawReader
from specrt.engine.results import GenerationResult, StreamChunk, TokenLogprob
from specrt.models.model import LlamaModel
from specrt.sampling import SamplingParams, SamplingTable
from specrt.tree import chain_tree
from specrt.types import DraftTree
from tests.engine.support import RandomTreeDrafter, make_engine, prompts, sampled, texts
from tests.engine.test_launched import OneAfterAnother, PlannedTrees, loaded
from tests.engine.test_launched import model as gpu_model

__all__ = ["gpu_model", "loaded"]

VOCAB = 97
PROMPTS = prompts(5, VOCAB)
GPU_PROMPTS = [[5, 9, 5, 9, 5] * 4, [3], [7, 8] * 4]
ALL = sampled(3, top_logprobs=4, prompt_logprobs=2, report_trees=True)


@pytest.fixture(scope="module")
def alone(model: LlamaModel) -> list[GenerationResult]:
    """Each prompt by itself, undrafted."""
    return make_engine(model, max_batch=1).generate(PROMPTS, ALL)


@pytest.fixture(scope="module")
def answers(alone: list[GenerationResult]) -> dict[tuple[int, ...], list[int]]:
    return {tuple(p): one.token_ids for p, one in zip(PROMPTS, alone, strict=True)}


def told(result: GenerationResult) -> tuple[object, ...]:
    return (
        result.token_ids,
        result.logprobs,
        result.top_logprobs,
        result.prompt_logprobs,
        result.prompt_top_logprobs,
    )


def raw_logits(model: LlamaModel, ids: Sequence[int]) -> torch.Tensor:
    """``[n, V]``, of a text of its own."""
    cache = model.new_cache()
    batch = CacheBatch(cache, [cache.open(len(ids))])
    tree = chain_tree(torch.tensor([ids], dtype=torch.int32))
    return model.forward(tree, batch).logits[0].clone()


def likeliest(row: torch.Tensor, count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token].item(), token))[:count]


# --- log-probabilities ----------------------------------------------------------------------------


def test_laws_are_those_of_the_targets_own_logits(model: LlamaModel) -> None:
    """Also under edits, and with more wanted than there are."""
    prompt = PROMPTS[2][:30]
    params = SamplingParams(
        max_new_tokens=12, ignore_eos=True, temperature=0.7, seed=1, repetition_penalty=1.4,
        logit_bias={5: 3.0}, top_logprobs=VOCAB + 9, prompt_logprobs=3,
    )  # fmt: skip
    for given in (params, replace(params, allowed_token_ids=range(40))):
        (result,) = make_engine(model).generate([prompt], given)
        whole = prompt + result.token_ids
        laws = raw_logits(model, whole).double().log_softmax(1)
        logits = raw_logits(model, whole)
        assert result.logprobs is not None and result.top_logprobs is not None
        for at, (token, own, top) in enumerate(
            zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True),
            start=len(prompt) - 1,
        ):
            assert [one.token_id for one in top] == likeliest(logits[at], VOCAB)
            values = torch.tensor([one.logprob for one in top], dtype=torch.float64)
            ids = [one.token_id for one in top]
            assert torch.allclose(values, laws[at, ids], rtol=1e-6, atol=1e-6)
            assert dict(top)[token] == own, "the very bits"
        assert result.prompt_logprobs is not None and result.prompt_top_logprobs is not None
        assert result.prompt_logprobs[0] is None and result.prompt_top_logprobs[0] == []
        rest = zip(prompt, result.prompt_logprobs, result.prompt_top_logprobs, strict=True)
        for at, (token, own, top) in enumerate(list(rest)[1:]):
            assert own == pytest.approx(laws[at, token].item(), rel=1e-6, abs=1e-6)
            assert [one.token_id for one in top] == likeliest(logits[at], 3)
            assert own == dict(top).get(token, own)


@pytest.mark.parametrize("num_nodes", [6, 24])
def test_they_are_the_same_bits_in_any_batch_on_any_path(
    model: LlamaModel,
    alone: list[GenerationResult],
    answers: dict[tuple[int, ...], list[int]],
    num_nodes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever drafts, however prompts are cut, with logits of all nodes or by need."""
    drafter = RandomTreeDrafter(answers, VOCAB, num_nodes, hit_rate=0.8)
    sizes = {"max_batch": 3, "max_nodes": num_nodes, "prefill_chunk": 7}
    found = make_engine(model, drafter, **sizes).generate(PROMPTS, ALL)
    assert max(result.stats.tau for result in found) > 2
    assert list(map(told, found)) == list(map(told, alone))
    monkeypatch.setattr(head_by_need, "_LEAST_BYTES", 0)
    by_need = make_engine(model, drafter, **sizes).generate(PROMPTS, ALL)
    assert list(map(told, by_need)) == list(map(told, alone))
    looked_up = make_engine(model, PromptLookupDrafter(), max_batch=2).generate(PROMPTS, ALL)
    assert list(map(told, looked_up)) == list(map(told, alone))


def test_who_asks_changes_nothing_and_hears_what_was_asked(
    model: LlamaModel, alone: list[GenerationResult]
) -> None:
    plain = replace(ALL, top_logprobs=0, prompt_logprobs=None, report_trees=False)
    asked = [
        plain,
        replace(plain, logprobs=True),
        replace(plain, top_logprobs=1),
        replace(plain, prompt_logprobs=0),
        ALL,
    ]
    found = make_engine(model, max_batch=5).generate(PROMPTS, asked)
    assert texts(found) == texts(alone)
    heard = [[part is not None for part in told(result)[1:]] for result in found]
    assert heard == [
        [False, False, False, False],
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, True],
        [True, True, True, True],
    ]
    first_of = [top[:1] for top in alone[2].top_logprobs or []]
    assert found[2].top_logprobs == first_of
    assert found[3].prompt_logprobs == alone[3].prompt_logprobs
    assert found[3].prompt_top_logprobs == [[]] * len(PROMPTS[3])


def tied_rows() -> torch.Tensor:
    """Logits with ties, both zeros, infinities below, and rows that are no law."""
    g = torch.Generator().manual_seed(2)
    rows = torch.randint(-3, 4, (21, VOCAB), generator=g).float()
    rows[0] = 0.0
    rows[0, ::2] = -0.0
    rows[1, 10:] = -math.inf
    rows[2, 7] = math.nan
    rows[3, 7] = math.inf
    rows[4] = -math.inf
    rows[5] = torch.randn(VOCAB, generator=g) * 1e-30
    rows[6:] += torch.randn(15, VOCAB, generator=g).round(decimals=1)
    return rows


def read_laws(device: Device, rows: torch.Tensor, tokens: Sequence[int], k: int) -> list[Any]:
    there = device.there(rows)
    return _LawReader(VOCAB, device).read(there.split(16), tokens, k)


def accepted(rows: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """What acceptance reports of tokens that it is made to take, and cannot take of minus infinity:
    a walk of one node has the log-probability of the raw logits, whatever lifts its token."""
    count = len(tokens)
    if count == 0:
        return []
    forced = [SamplingParams(logit_bias={token: 1e30}, logprobs=True) for token in tokens]
    sampling = SamplingTable.build(forced, [0] * count, rows.shape[1])
    roots, ones = torch.zeros(count, 1, dtype=torch.int32), torch.ones(count, dtype=torch.int32)
    found = accept(
        chain_tree(roots), rows[:, None].contiguous(), sampling, roots, ones, want_logprobs=True
    )
    assert found.logprobs is not None
    values = zip(found.logprobs[:, 0].tolist(), rows[range(count), tokens].tolist(), strict=True)
    return [-math.inf if logit == -math.inf else value for value, logit in values]


def check_tied_rows(device: Device, counts: Sequence[int]) -> None:
    rows, tokens = tied_rows(), [(5 * i) % VOCAB for i in range(21)]
    good = [i for i in range(21) if i not in (2, 3, 4)]
    exact = accepted(rows[good], [tokens[i] for i in good])
    assert logprobs_of(rows[good], [tokens[i] for i in good]).tolist() == exact
    for k in counts:
        laws = read_laws(device, rows, tokens, k)
        for i in (2, 3, 4):
            assert math.isnan(laws[i].logprob) and laws[i].top == []
        assert [laws[i].logprob for i in good] == exact, "acceptance's own bits"
        for i in good:
            ids = [one.token_id for one in laws[i].top]
            assert ids == likeliest(rows[i], k)
            assert [one.logprob for one in laws[i].top] == accepted(rows[[i] * len(ids)], ids)


def test_ties_go_by_id_and_what_is_no_law_has_none() -> None:
    check_tied_rows(Device(), (0, 1, 20, VOCAB, VOCAB + 1))


def test_ties_go_by_id_on_a_gpu(gpu: Device) -> None:
    check_tied_rows(gpu, (0, 20))


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_that_gave_way_is_not_read_again(
    model: LlamaModel, alone: list[GenerationResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read, bare = [0], _LawReader.read

    def read(self: Any, pieces: Any, tokens: Sequence[int], count: int) -> Any:
        num_read[0] += len(tokens) if count == 2 else 0  # the prompts', not the rounds'
        return bare(self, pieces, tokens, count)

    monkeypatch.setattr(_LawReader, "read", read)
    engine = make_engine(model, max_batch=4, max_cached_tokens=256, prefill_chunk=50)
    restarts, preempt = [0], engine._core._places.preempt

    def counted(request: Any) -> None:
        restarts[0] += 1
        preempt(request)

    monkeypatch.setattr(engine._core._places, "preempt", counted)
    assert list(map(told, engine.generate(PROMPTS, ALL))) == list(map(told, alone))
    assert restarts[0] > 0
    assert num_read[0] == sum(len(prompt) - 1 for prompt in PROMPTS)


def test_a_prompt_that_is_kept_is_read_all_the_same(model: LlamaModel) -> None:
    prompt = [(3 * i * i + i) % VOCAB for i in range(150)]
    params = SamplingParams(max_new_tokens=3, prompt_logprobs=1)
    expected = make_engine(model).generate(prompt, params)
    engine = make_engine(model)
    engine.generate(prompt, max_new_tokens=1)
    shared = engine.generate(prompt, max_new_tokens=1)
    assert shared.stats.num_cached_tokens > 0
    found = engine.generate(prompt, replace(params, n=2))
    assert [told(one) for one in found] == [told(expected)] * 2


def test_a_prompt_that_was_not_run_to_its_end(model: LlamaModel) -> None:
    engine = make_engine(model, prefill_chunk=8)
    prompt = PROMPTS[1][:20]
    whole = engine.generate(prompt, prompt_logprobs=1, max_new_tokens=1).prompt_logprobs
    handle = engine.add(prompt, prompt_logprobs=1)
    engine.step()
    assert engine.abort(handle)
    (chunk,) = engine.step()
    assert chunk.result is not None and whole is not None
    assert chunk.result.prompt_logprobs == whole[:9] + [None] * 11
    tops = chunk.result.prompt_top_logprobs
    assert tops is not None and [len(top) for top in tops] == [0] + [1] * 8 + [0] * 11


# --- several answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [11, 2**64 - 2, -2])
def test_an_answer_is_that_of_its_own_seed(model: LlamaModel, seed: int) -> None:
    params = replace(ALL, seed=seed, n=4, max_new_tokens=12)
    engine = make_engine(model, PromptLookupDrafter(), max_batch=3)
    found = engine.generate(PROMPTS[:2], params)
    assert [one.choice for one in found] == [0, 1, 2, 3] * 2
    seeds = [seed, *((seed + i) % 2**64 for i in (1, 2, 3))]
    assert [one.seed for one in found] == seeds * 2
    assert len({tuple(one.token_ids) for one in found[:4]}) == 4
    lone = [
        make_engine(model, max_batch=1).generate(prompt, replace(params, n=1, seed=one))
        for prompt in PROMPTS[:2]
        for one in seeds
    ]
    assert list(map(told, found)) == list(map(told, lone))


def test_answers_are_a_list_and_streams_say_whose(model: LlamaModel) -> None:
    engine = make_engine(model, max_batch=3)
    both = engine.generate(PROMPTS[0], max_new_tokens=5, ignore_eos=True, n=2)
    assert isinstance(both, list) and len({tuple(one.token_ids) for one in both}) == 1
    each = [SamplingParams(max_new_tokens=6, temperature=1.0, seed=4, n=n) for n in (2, 1, 3)]
    expected = engine.generate(PROMPTS[:3], each)
    places = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    ids: dict[tuple[int, int], list[int]] = {place: [] for place in places}
    for chunk in engine.stream(PROMPTS[:3], each):
        ids[chunk.index, chunk.choice] += chunk.token_ids
        assert chunk.result is None or chunk.result.choice == chunk.choice
    assert [ids[place] for place in places] == texts(expected)
    drawn = engine.generate(PROMPTS[:2], max_new_tokens=3, temperature=1.0, n=2)
    first, second, third, _ = (one.seed for one in drawn)
    assert second == (first + 1) % 2**64 and third != first
    with pytest.raises(ValueError, match=r"^n: expected 1, got 3; add each answer"):
        engine.add(PROMPTS[0], n=3)
    assert engine.is_idle


# --- streams and trees ----------------------------------------------------------------------------


def streamed(engine: Engine, params: SamplingParams) -> list[list[StreamChunk]]:
    chunks = list(engine.stream(PROMPTS, params))
    return [[chunk for chunk in chunks if chunk.index == i] for i in range(len(PROMPTS))]


def joined(chunks: Sequence[StreamChunk], part: Callable[[StreamChunk], Any]) -> list[Any]:
    return [one for chunk in chunks for one in part(chunk)]


def test_chunks_together_are_the_result(
    model: LlamaModel,
    alone: list[GenerationResult],
    answers: dict[tuple[int, ...], list[int]],
) -> None:
    engine = make_engine(model, RandomTreeDrafter(answers, VOCAB, 12), max_batch=3)
    for chunks, result in zip(streamed(engine, ALL), alone, strict=True):
        assert joined(chunks, lambda chunk: chunk.token_ids) == result.token_ids
        assert joined(chunks, lambda chunk: chunk.logprobs) == result.logprobs
        assert joined(chunks, lambda chunk: chunk.top_logprobs) == result.top_logprobs
    for chunk in engine.stream(PROMPTS, replace(ALL, top_logprobs=0, report_trees=False)):
        assert (chunk.logprobs, chunk.top_logprobs, chunk.tree) == (None, None, None)


def test_a_tree_is_what_was_verified_and_its_path_what_was_taken(
    model: LlamaModel,
    answers: dict[tuple[int, ...], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where an output ends inside of a path."""
    verified: list[tuple[list[int], list[int]]] = []
    bare = LlamaModel.forward

    def forward(self: LlamaModel, tree: DraftTree, *rest: Any, **options: Any) -> Any:
        for row, count in enumerate(tree.num_nodes.tolist()):
            tokens, parents = (x[row, :count].tolist() for x in (tree.draft_tokens, tree.parents))
            verified.append((tokens, parents))
        return bare(self, tree, *rest, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    drafter = RandomTreeDrafter(answers, VOCAB, 16, hit_rate=0.95)
    num_cut = 0
    for num_tokens in (40, 13, 9):
        engine = make_engine(model, drafter, max_batch=3)
        for prompt, chunks in zip(
            PROMPTS, streamed(engine, replace(ALL, max_new_tokens=num_tokens)), strict=True
        ):
            last = prompt[-1]
            for chunk in chunks:
                tree = chunk.tree
                assert tree is not None
                assert (tree.token_ids, tree.parents) in verified
                assert tree.token_ids[0] == last and tree.parents[0] == -1
                assert tree.path[0] == 0
                assert [tree.parents[node] for node in tree.path[1:]] == tree.path[:-1]
                accepted = [tree.token_ids[node] for node in tree.path[1:]]
                assert accepted == chunk.token_ids[: chunk.num_accepted]
                assert len(chunk.token_ids) - len(accepted) in (0, 1)
                num_cut += len(accepted) == len(chunk.token_ids)
                last = chunk.token_ids[-1]
    assert num_cut > 0, "no output ended inside of a path"


# --- on a GPU -------------------------------------------------------------------------------------


def test_the_same_on_a_gpu(gpu_model: LlamaModel) -> None:
    """Where rounds are launched, those who ask have the host in theirs."""
    params = SamplingParams(
        max_new_tokens=6, ignore_eos=True, temperature=0.9, seed=4,
        top_logprobs=3, prompt_logprobs=2, report_trees=True,
    )  # fmt: skip
    plain = replace(params, top_logprobs=0, prompt_logprobs=None, report_trees=False)
    expected = make_engine(gpu_model, OneAfterAnother(), max_batch=1).generate(GPU_PROMPTS, params)
    assert all(dict(top).get(token, own) == own for one in expected for token, own, top in zip(
        one.token_ids, one.logprobs or [], one.top_logprobs or [], strict=True
    ))  # fmt: skip
    drafter = PlannedTrees(gpu_model, texts(expected), prompts=GPU_PROMPTS)
    engine = make_engine(gpu_model, drafter, max_batch=3, prefill_chunk=9)
    found = engine.generate(GPU_PROMPTS, [params, plain, params])
    assert texts(found) == texts(expected)
    assert drafter.plans > 0, "nothing was launched"
    for i in (0, 2):
        assert told(found[i]) == told(expected[i])
    assert isinstance(found[0].top_logprobs and found[0].top_logprobs[0][0], TokenLogprob)
    pair = engine.generate(GPU_PROMPTS[0], replace(params, n=2))
    assert told(pair[0]) == told(expected[0]) and pair[1].choice == 1
    chunks = list(engine.stream(GPU_PROMPTS[0], params))
    for chunk in chunks:
        assert chunk.tree is not None
        accepted = [chunk.tree.token_ids[node] for node in chunk.tree.path[1:]]
        assert accepted == chunk.token_ids[: chunk.num_accepted]
    assert any(len(chunk.tree.path) > 1 for chunk in chunks if chunk.tree is not None)
