"""Ctrl-C behind any call, in what later rounds rely on: tables, buffers, captured launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.cache import CacheBatch, CachedSequence
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.engine.core import EngineCore
from specrt.engine.drafting import Drafting
from specrt.engine.results import StreamChunk
from specrt.models.model import LlamaModel
from specrt.ops.graph import CpuGraph
from specrt.tree import chain_tree
from specrt.types import SequenceState
from tests.engine.support import make_engine, make_model
from tests.interrupts import interrupted


def test_capturing_ends_wherever_it_is_interrupted() -> None:
    """Or all later launches of the thread would be added to a graph that is gone."""
    x, weight, out = torch.ones(1, 4), torch.ones(2, 4), torch.empty(1, 2)

    def launch() -> None:
        ops.linear(x, weight, out=out)

    number = 1
    while interrupted(lambda: CpuGraph.capture(launch), number):
        assert CpuGraph.capture(launch).num_launches == 1, number
        number += 1
    assert number > 4


def test_tables_are_those_of_their_sequences_after_any_interrupt(checkpoint: Path) -> None:
    """One more sequence, a wider table, another order; then the same again, undisturbed."""
    cache = make_model(checkpoint).new_cache(page_size=2)
    short, other, longer = (CachedSequence([list(range(1, 1 + n))], n) for n in (3, 4, 9))
    for wanted in ([short, other], [short, longer], [other]):
        number, was_interrupted = 1, True
        while was_interrupted:
            batch = CacheBatch(cache, [short])
            was_interrupted = interrupted(lambda: batch.update(wanted), number)  # noqa: B023
            for sequences in (wanted, [short], [other, short]):
                batch.update(sequences)
                width = batch.block_table.shape[1]
                rows = [one.pages + [0] * (width - len(one.pages)) for one in sequences]
                assert batch.block_table.tolist() == rows
                assert batch.kv_len.tolist() == [one.length for one in sequences]
            number += 1
        assert number > 4


def test_no_launch_outlives_its_buffers(checkpoint: Path) -> None:
    """They grow, interrupted anywhere: where they have moved, graphs and steps are gone."""
    small = make_model(checkpoint)
    tree = chain_tree(torch.zeros(1, 2, dtype=torch.int32))
    number, was_interrupted = 1, True
    while was_interrupted:
        model = LlamaModel(small.config, small.weights)
        cache = model.new_cache()
        model.forward(tree, CacheBatch(cache, [cache.open(8)]), taps=("layer.0",))
        work, table, taps = model._workspace, model._cos_sin, model._tap_buffers["layer.0"]
        was_interrupted = interrupted(lambda: model.reserve(1, 40, 600), number)  # noqa: B023
        has_moved = model._workspace is not work or model._cos_sin is not table
        if has_moved or model._tap_buffers.get("layer.0") is not taps:
            assert len(model._steps) == len(model.device._steps) == 0, number
        number += 1
    assert number > 4
    assert has_moved


def test_an_interrupted_end_of_a_sequence_is_made_up_for(checkpoint: Path) -> None:
    """A small model's; trained drafters' are in their own files."""
    drafter, number, was_interrupted = SmallModelDrafter(make_model(checkpoint)), 1, True
    while was_interrupted:
        state = SequenceState([1] * 9, 9, 20, 0, 0.0)
        drafter.start(state)
        drafter.cache.reserve(drafter._cached[state], 9)
        was_interrupted = interrupted(lambda: drafter.finish(state), number)  # noqa: B023
        drafter.finish(state)
        assert drafter.cache.num_held_pages == 0, number
        number += 1
    assert number > 3


def test_what_a_step_gave_is_handed_over_once(checkpoint: Path) -> None:
    """Interrupted behind the round, it waits for the next step."""
    engine = make_engine(make_model(checkpoint))
    options = {"max_new_tokens": 3, "ignore_eos": True}
    answer = engine.generate([1, 2], **options).token_ids
    number, was_interrupted = 1, True
    while was_interrupted:
        handle, told = engine.add([1, 2], **options), list[StreamChunk]()
        was_interrupted = interrupted(lambda: told.extend(engine.step()), number)  # noqa: B023
        while not engine.is_idle:
            told += engine.step()
        assert [token for chunk in told for token in chunk.token_ids] == answer, number
        results = [chunk.result.token_ids for chunk in told if chunk.result is not None]
        assert results == [answer]
        assert {chunk.handle for chunk in told} == {handle}
        number += 1
    assert number > 200


def test_an_interrupt_may_be_followed_by_another(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one anywhere in what the first makes necessary."""
    model, options = make_model(checkpoint), {"max_new_tokens": 4, "ignore_eos": True}
    prompts = [[1, 2, 3], [4, 5]]
    expected = [result.token_ids for result in make_engine(model).generate(prompts, **options)]
    was_interrupted = list[bool]()
    observe, start_over = Drafting.observe, EngineCore._start_over

    def interrupted_round(drafting: Drafting, *given: Any) -> None:
        observe(drafting, *given)
        raise KeyboardInterrupt

    def interrupted_start_over(core: EngineCore) -> None:
        number = len(was_interrupted) + 1
        was_interrupted.append(interrupted(lambda: start_over(core), number))

    while not was_interrupted or was_interrupted[-1]:
        engine, chunks = make_engine(model), list[StreamChunk]()
        handles = [engine.add(prompt, **options) for prompt in prompts]
        chunks += engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(Drafting, "observe", interrupted_round)
            patch.setattr(EngineCore, "_start_over", interrupted_start_over)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        while not engine.is_idle:
            chunks += engine.step()
        for handle, tokens in zip(handles, expected, strict=True):
            own = [chunk for chunk in chunks if chunk.handle is handle]
            assert [token for chunk in own for token in chunk.token_ids] == tokens
        assert engine.cache.num_held_pages == 0
    assert len(was_interrupted) > 100
