"""Rounds of launches alone where something fails: a drafter, memory, the GPU, or Ctrl-C comes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, EmptyDrafter, RootsAlone, RoundPlan, StageTimes
from specrt.engine import batch as batch_module
from specrt.engine.batch import Batch
from specrt.engine.drafting import Drafting
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.ops.graph import CudaGraph
from specrt.sampling import SamplingParams
from specrt.types import RoundReport, SequenceState
from tests.checkpoints import make_checkpoint
from tests.engine.support import make_engine, texts
from tests.interrupts import interrupted
from tests.simulated_gpu import only_simulated

SIZES = {
    "num_hidden_layers": 1,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[5, 9, 5, 9, 5], [3], [7, 8] * 4]
GREEDY = SamplingParams(max_new_tokens=5, ignore_eos=True)

pytestmark = only_simulated


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


class Rooted(RootsAlone, EmptyDrafter):
    """A drafter of launched rounds that does nothing: tests break a part of it."""


class Forgetful(Rooted):
    """Fails as it hears of the round behind which one more is left."""

    def told(
        self,
        states: Sequence[SequenceState],
        plan: RoundPlan,
        report: RoundReport,
        times: StageTimes,
    ) -> None:
        if states[0].num_left == 2:
            raise ArithmeticError("broken")


def test_who_starts_again_may_end_by_the_round_that_is_under_way(
    model: LlamaModel, caplog: pytest.LogCaptureFixture
) -> None:
    answers = texts(make_engine(model).generate(PROMPTS, GREEDY))
    engine = make_engine(model, Forgetful())
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers
    assert engine.cache.num_held_pages == 0


@pytest.mark.parametrize(
    "plan",
    [7, RoundPlan("1"), RoundPlan(1.5), RoundPlan(0), RoundPlan(65), RoundPlan(1, [])],  # type: ignore[arg-type]
    ids=str,
)
def test_a_plan_that_is_none_costs_only_its_drafter(model: LlamaModel, plan: Any) -> None:
    class Planless(Rooted):
        def plan(self, states: Sequence[SequenceState], budget: Budget) -> RoundPlan:
            return plan

    params = replace(GREEDY, max_new_tokens=2)
    answers = texts(make_engine(model).generate(PROMPTS, params))
    assert texts(make_engine(model, Planless()).generate(PROMPTS, params)) == answers


def test_a_launched_round_without_memory_for_its_report(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was asked for ends; the next has as many tokens as the host believes to be in
    the row, and not as many as there are."""
    engine = make_engine(model)
    follower = PROMPTS[2][: len(PROMPTS[0]) + 1]
    wanted = replace(GREEDY, logprobs=True)
    expected = engine.generate(follower, wanted).logprobs
    engine.add(PROMPTS[0], GREEDY)
    engine.step()

    def no_memory(tensor: torch.Tensor) -> None:
        raise MemoryError("pinned")

    with monkeypatch.context() as patch:
        patch.setattr(model.device, "post", no_memory)
        assert [chunk.result.error for chunk in engine.step() if chunk.result] == ["pinned"]
    assert engine.generate(follower, wanted).logprobs == expected


def test_python_collects_garbage_after_any_interrupted_capture(gpu: Device) -> None:
    number = 1
    while interrupted(lambda: CudaGraph.capture(lambda: None, gpu.place), number):
        assert gc.isenabled(), number
        number += 1
    assert number > 4


def test_all_that_an_engine_launches_goes_to_the_device_s_stream(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its steps too, whoever's stream is current then: what is freed by an abort, by a
    stream that was dropped, when an engine is closed; and what one is made with."""
    depth, strays = 0, list[str]()
    working = Device.working

    @contextmanager
    def counted(device: Device) -> Iterator[None]:
        nonlocal depth
        with working(device):
            depth += 1
            try:
                yield
            finally:
                depth -= 1

    def watched(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **options: object) -> object:
            if depth == 0:
                strays.append(name)
            return call(*args, **options)

        return noted

    monkeypatch.setattr(Device, "working", counted)
    for owner, names in ((model.device, ("upload", "zeros", "post")), (Batch, ("leave", "clear"))):
        for name in names:
            monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))

    def broken(drafting: Drafting, *asked: object) -> None:
        raise KeyboardInterrupt

    with make_engine(model, max_batch=3) as engine:
        stream = engine.stream(PROMPTS[0], GREEDY)
        handle = engine.add(PROMPTS[1], GREEDY)
        engine.add(PROMPTS[2], GREEDY)
        next(stream)
        assert engine.abort(handle)
        stream.close()
        with monkeypatch.context() as patch:
            patch.setattr(Drafting, "plan", broken)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    assert not strays


@pytest.mark.parametrize("stage", ["launch_propose", "launch_observe"])
def test_a_drafter_without_memory_costs_no_request(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    answer = make_engine(model).generate(PROMPTS[0], GREEDY).token_ids

    def no_memory(*_: object) -> None:
        raise MemoryError("broken")

    monkeypatch.setattr(Rooted, stage, no_memory)
    result = make_engine(model, Rooted()).generate(PROMPTS[0], GREEDY)
    assert (result.token_ids, result.error) == (answer, None)


def test_pages_and_histories_have_room_for_two_rounds(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens go past the 64 of a page and of a table that is as wide as the first round asks."""

    class OneAfterAnother(EmptyDrafter):
        pass

    monkeypatch.setattr(batch_module, "_FIRST_TOKENS", 1)
    params = replace(GREEDY, max_new_tokens=10, logprobs=True)
    prompt = [(7 * i * i + i) % 97 for i in range(58)]
    expected = make_engine(model, OneAfterAnother()).generate(prompt, params)
    result = make_engine(model).generate(prompt, params)
    assert (result.token_ids, result.error) == (expected.token_ids, None)
    assert result.logprobs == expected.logprobs
