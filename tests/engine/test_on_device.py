"""Whole rounds on a GPU, simulated or real: all stages there, one read a round, the same text.

What the CPU's engine says is another model's word: activations have 16 bits on a GPU. So texts are
held against plain decoding on the same device, and laws against the CPU's kernels in tests/ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, DraftParams
from specrt.draft.prompt_lookup.on_device import DevicePromptLookupDrafter
from specrt.draft.recycle.on_device import DeviceRecycleDrafter
from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
from specrt.engine.batch import Batch
from specrt.engine.engine import Engine
from specrt.engine.request import Request
from specrt.engine.stop import OutputEnd, TextTracker
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.tree import chain, check_proposal
from specrt.types import Proposal, RequestHandle, SequenceState
from tests.checkpoints import make_checkpoint
from tests.engine.support import RandomTreeDrafter, make_engine, texts
from tests.interrupts import interrupted
from tests.simulated_gpu import only_simulated

VOCAB = 97
SIZES = {
    "num_hidden_layers": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[5, 9, 5, 9, 5] * 3, [3], [(11 * i * i + 3 * i) % VOCAB for i in range(70)], [7, 8] * 4]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
MIXED = [
    replace(GREEDY, logprobs=True),
    replace(GREEDY, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2),
    replace(GREEDY, temperature=1.0, top_k=7, min_p=0.01, seed=6, logit_bias={11: 3.0, 12: -2.0}),
    replace(GREEDY, temperature=1.3, seed=7, frequency_penalty=0.4, presence_penalty=0.3),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Weights]:
    path: Path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, **SIZES)
    config = ModelConfig.from_directory(path)
    return config, load_weights(path, config, torch.bfloat16)


@pytest.fixture
def model(loaded: tuple[ModelConfig, Weights], gpu: Device) -> LlamaModel:
    config, weights = loaded
    return LlamaModel(config, place_weights(weights, gpu), gpu)


@pytest.fixture(scope="module")
def known() -> dict[str, list]:
    """What :func:`plainly` has found: it says the same whoever drafts."""
    return {}


def plainly(model: LlamaModel, params: list[SamplingParams], known: dict[str, list]) -> list:
    """Plain decoding, a sequence at a time."""
    key = f"{model.device.place} {params}"
    if key not in known:
        known[key] = generated(make_engine(model, max_batch=1), params, None)
    return known[key]


def hitting(model: LlamaModel, answers: list[list[int]]) -> RandomTreeDrafter:
    """Random trees with the right tokens here and there, from the host."""
    known = {tuple(p): answer for p, answer in zip(PROMPTS, answers, strict=True)}
    return RandomTreeDrafter(known, VOCAB, 12)


DRAFTERS: Mapping[str, Callable[[LlamaModel, list[list[int]]], Drafter]] = {
    "trees": hitting,
    "prompt-lookup": lambda model, _: DevicePromptLookupDrafter(model.device),
    "recycle": lambda model, _: DeviceRecycleDrafter(VOCAB, model.device),
    "small model": lambda model, _: DeviceSmallModelDrafter(model, depth=3, width=2),
}


def generated(engine: Engine, params: list[SamplingParams], draft: DraftParams | None) -> list:
    """Texts and log-probabilities; sequences join and leave along the way."""
    results = engine.generate(PROMPTS, params, draft=draft)
    assert not [result.error for result in results if result.error]
    return [(result.token_ids, result.logprobs) for result in results]


@pytest.mark.parametrize("params", [[GREEDY] * 4, MIXED], ids=["greedy", "mixed"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafting_changes_nothing(
    model: LlamaModel,
    name: str,
    params: list[SamplingParams],
    known: dict[str, list],
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = [replace(p, max_new_tokens=6 + 3 * i) for i, p in enumerate(params)]
    expected = plainly(model, params, known)
    drafter = DRAFTERS[name](model, [ids for ids, _ in expected])
    engine = make_engine(model, drafter, max_batch=3, max_nodes=16)
    shape = DraftParams(depth=3, top_k=2) if name == "recycle" else None
    results = engine.generate(PROMPTS, params, draft=shape)
    assert [(one.token_ids, one.logprobs) for one in results] == expected
    assert not caplog.messages  # a drafter that fails goes unheard of otherwise
    assert sum(one.stats.num_draft_tokens for one in results)
    if name in ("trees", "small model"):
        assert sum(one.stats.num_accepted_tokens for one in results)


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_host_reads_once_a_round(
    model: LlamaModel, name: str, known: dict[str, list], caplog: pytest.LogCaptureFixture
) -> None:
    answers = [ids for ids, _ in plainly(model, [GREEDY] * 4, known)]
    engine = make_engine(model, DRAFTERS[name](model, answers), max_batch=4, prefill_chunk=1024)
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    while not engine.is_idle:
        before = model.device.num_reads
        ends = sum(chunk.result is not None for chunk in engine.step())
        # Where one ends, the round that is under way is read too.
        assert model.device.num_reads - before <= 1 + (ends > 0)
    assert not caplog.messages


def test_outputs_end_where_they_should(model: LlamaModel) -> None:
    """At a stop token, a stop string, and the limit, in the middle of accepted paths."""
    plain = make_engine(model)
    answers = texts(plain.generate(PROMPTS, GREEDY))
    stops = [
        replace(GREEDY, stop_token_ids=[answers[0][4]]),
        replace(GREEDY, stop=[chr(32 + answers[1][5])]),
        replace(GREEDY, max_new_tokens=2),
        GREEDY,
    ]
    expected = plain.generate(PROMPTS, stops)
    results = make_engine(model, hitting(model, answers)).generate(PROMPTS, stops)
    assert texts(results) == texts(expected)
    assert [one.finish_reason for one in results] == [one.finish_reason for one in expected]
    assert len(results[0].token_ids) <= 5 and len(results[2].token_ids) == 2


def test_room_is_what_was_said_last_after_any_interrupt(model: LlamaModel) -> None:
    batch = Batch(model.new_cache(), 2, VOCAB)
    for prompt in PROMPTS[:2]:
        state = SequenceState(list(prompt), len(prompt), 99, 0, 0.0)
        end = partial(OutputEnd, TextTracker(str), stop_ids={}, stop_strings=(), keeps_stop=False)
        new_end = partial(end, num_left=9, limit_reason="length", is_streamed=False)
        handle = RequestHandle(0, None)
        batch.join(Request(handle, GREEDY, DraftParams(), state, new_end, print))
    number, was_interrupted = 1, True
    while was_interrupted:
        batch.set_room([1, 2])
        was_interrupted = interrupted(lambda: batch.set_room([5, 2]), number)
        batch.set_room([5, 2])
        assert model.device.read(batch.room).tolist() == [5, 2], number
        number += 1
    assert number > 4


@only_simulated
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] == 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: torch.equal(x, x),
        lambda x: x[[0, 1]],
        lambda x: x + torch.zeros(3),
    ],
)
def test_what_a_gpu_waits_for_or_refuses_fails(
    gpu: Device, wait: Callable[[torch.Tensor], object]
) -> None:
    with pytest.raises(AssertionError, match="GPU"):
        wait(gpu.zeros(3, dtype=torch.int32))


@only_simulated
def test_a_proposal_lies_in_one_place(gpu: Device) -> None:
    host = chain(torch.zeros(1, 2, dtype=torch.int32))
    there = Proposal(*map(gpu.there, (host.draft_tokens, host.parents, host.num_nodes)))
    for good in (host, there):
        check_proposal(good, 1, gpu)
    for name in ("parents", "num_nodes"):
        mixed = replace(there, **{name: getattr(host, name)})
        with pytest.raises(ValueError, match=f"{name}: .* on simulated, .*, got one on cpu"):
            check_proposal(mixed, 1, gpu)
        mixed = replace(host, **{name: getattr(there, name)})
        with pytest.raises(ValueError, match=f"{name}: .* on the CPU, got one on simulated"):
            check_proposal(mixed, 1, gpu)
