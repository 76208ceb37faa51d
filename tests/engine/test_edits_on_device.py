"""Edited logits on a GPU, simulated or real: a batch of their own, whose neighbours stay launched.

Texts are held against plain decoding on the same device, a sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, DraftParams, EmptyDrafter
from specrt.draft.prompt_lookup.on_device import DevicePromptLookupDrafter
from specrt.draft.recycle.on_device import DeviceRecycleDrafter
from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
from specrt.engine import core
from specrt.engine.batch import Batch
from specrt.engine.engine import Engine
from specrt.engine.launched import LaunchedRounds
from specrt.engine.results import GenerationResult
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams, StructuredOutput
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter
from tests.engine.exits import make_exit_pair, make_launched_drafter
from tests.engine.support import LetterTokenizer, RandomTreeDrafter, make_engine
from tests.simulated_gpu import only_simulated
from tests.text_tokenizers import printable

VOCAB = 97
SIZES = {
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[5, 9, 5, 9, 5] * 3, [3], [7, 8] * 4, [(11 * i * i + 3 * i) % VOCAB for i in range(20)]]
FREE = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
DRAWN = replace(FREE, temperature=0.9, seed=4, repetition_penalty=1.2)


def shift(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    return row + 2.0 * torch.roll(row, sum(ids) % 5 + 1)


PARAMS = [
    replace(FREE, logits_processor=shift),
    DRAWN,
    replace(DRAWN, allowed_token_ids=list(range(40)), bad_words=["'(", "+,"]),
    FREE,
]
"""Who is edited, and not, in turn."""


@dataclass(frozen=True)
class Loaded:
    config: ModelConfig
    weights: Weights
    exit: Path
    fspad: Path
    answers: dict[str, list[Any]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("edits")
    target, directory = make_exit_pair(folder, **SIZES)
    make_draft_checkpoint(target, folder / "fspad", "fspad")
    config = ModelConfig.from_directory(target)
    weights = load_weights(target, config, torch.bfloat16)
    return Loaded(config, weights, directory, folder / "fspad")


@pytest.fixture
def model(loaded: Loaded, gpu: Device) -> LlamaModel:
    return LlamaModel(loaded.config, place_weights(loaded.weights, gpu), gpu)


def said(results: Sequence[GenerationResult]) -> list[Any]:
    assert not [result.error for result in results if result.error]
    return [(r.token_ids, r.logprobs, r.finish_reason) for r in results]


@pytest.fixture
def alone(loaded: Loaded, model: LlamaModel) -> list[Any]:
    """Plain decoding there, a sequence at a time."""
    there = str(model.device)
    if there not in loaded.answers:
        loaded.answers[there] = said(make_engine(model, max_batch=1).generate(PROMPTS, PARAMS))
    return loaded.answers[there]


def hitting(model: LlamaModel, loaded: Loaded) -> Drafter:
    answers = [one[0] for one in loaded.answers[str(model.device)]]
    known = {tuple(p): answer for p, answer in zip(PROMPTS, answers, strict=True)}
    return RandomTreeDrafter(known, VOCAB, 12, hit_rate=0.8)


SHAPE = DraftParams(depth=3, top_k=2, total_tokens=7)
DRAFTERS: Mapping[str, tuple[Callable[[LlamaModel, Loaded], Drafter], DraftParams | None, bool]] = {
    "none": (lambda model, _: EmptyDrafter(), None, True),
    "trees": (hitting, None, False),
    "prompt-lookup": (lambda model, _: DevicePromptLookupDrafter(model.device), None, True),
    "recycle": (
        lambda model, _: DeviceRecycleDrafter(VOCAB, model.device),
        DraftParams(depth=3, top_k=2),
        True,
    ),
    "small model": (lambda model, _: DeviceSmallModelDrafter(model, depth=3, width=2), None, True),
    "fspad": (lambda model, loaded: make_drafter(model, loaded.fspad), SHAPE, True),
    "eesd": (lambda model, loaded: make_launched_drafter(model, loaded.exit), None, True),
}


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[bool]]]:
    """Of each round whether it was launched, and whose it was: which are edited."""
    seen: list[tuple[str, list[bool]]] = []
    launch, run_round = LaunchedRounds.launch, core.run_round

    def launched(self: LaunchedRounds, planned: Any, batch: Batch, before: Any) -> object:
        seen.append(("launched", [r.needs_host for r in batch.requests]))
        return launch(self, planned, batch, before)

    def run(stages: Any, drafting: Any, batch: Batch) -> object:
        seen.append(("run", [r.needs_host for r in batch.requests]))
        return run_round(stages, drafting, batch)

    monkeypatch.setattr(LaunchedRounds, "launch", launched)
    monkeypatch.setattr(core, "run_round", run)
    return seen


_SLOW = "recycle", "small model"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in DRAFTERS]
)
def test_neighbours_stay_launched_and_texts_are_those_alone(
    model: LlamaModel,
    loaded: Loaded,
    alone: list[Any],
    rounds: list[tuple[str, list[bool]]],
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, shape, is_launched = DRAFTERS[name]
    rounds.clear()
    engine = make_engine(model, make(model, loaded), max_batch=3, max_nodes=16)
    results = engine.generate(PROMPTS, PARAMS, shape)
    assert said(results) == alone
    assert engine.cache.num_held_pages == 0
    assert not caplog.messages, "a drafter that fails goes unheard of otherwise"
    assert all(len({*edited}) == 1 for _, edited in rounds), "nobody waits for another's host"
    kinds = {(kind, edited[0]) for kind, edited in rounds}
    assert ("run", True) in kinds and ("launched", True) not in kinds
    assert (("launched", False) in kinds) == is_launched
    if name != "none":
        assert sum(result.stats.num_draft_tokens for result in results[::2])
    if name in ("trees", "small model", "eesd"):
        assert sum(result.stats.num_accepted_tokens for result in results[::2])


@only_simulated
def test_neighbours_rounds_and_graphs_are_as_many_as_without(
    model: LlamaModel, rounds: list[tuple[str, list[bool]]], caplog: pytest.LogCaptureFixture
) -> None:
    """One request is answered for a while; then another that is edited joins and leaves."""
    caplog.set_level("DEBUG", "specrt")
    engine = make_engine(model)
    long = replace(FREE, max_new_tokens=20)

    def made() -> int:
        return sum("a graph of" in message for message in caplog.messages)

    expected = engine.generate(PROMPTS[0], long)
    num_rounds, num_graphs = len(rounds), made()
    engine.add(PROMPTS[0], long)
    rounds.clear()
    engine.step()
    engine.add(PROMPTS[2], PARAMS[2])
    results = []
    while not engine.is_idle:
        results += [chunk.result for chunk in engine.step() if chunk.result is not None]
    assert results[-1].token_ids == expected.token_ids
    assert [kind for kind, edited in rounds if not edited[0]] == ["launched"] * num_rounds
    assert sum(kind == "run" for kind, _ in rounds) == 6
    assert num_graphs == 1
    # Passes over the edited one's roots are captured steps too; no further round of its neighbour.
    assert not [m for m in caplog.messages[num_graphs:] if "of 20 launches" in m]


def test_a_fault_and_an_end_leave_the_others_rounds_alone(
    model: LlamaModel, alone: list[Any]
) -> None:
    def raising(ids: list[int], row: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    params = [replace(FREE, logits_processor=raising), *PARAMS[1:]]
    results = make_engine(model).generate(PROMPTS, params)
    assert results[0].error is not None and results[0].error.startswith("logits_processor: KeyErr")
    assert [r.token_ids for r in results[1:]] == [one[0] for one in alone[1:]]


def test_structured_output_beside_a_free_one(model: LlamaModel, loaded: Loaded) -> None:
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    form = StructuredOutput(regex="(ab|c){3}[0-9]")
    params = [SamplingParams(max_new_tokens=12, structured=form), replace(FREE, logprobs=False)]
    expected = None
    for drafter in (EmptyDrafter(), make_drafter(model, loaded.fspad)):
        results = Engine(model, drafter, printable()).generate(
            PROMPTS[:2], params, SHAPE if expected else None
        )
        assert results[0].finish_reason == "stop" and results[0].text[-1].isdigit()
        assert results[0].text[:-1].replace("ab", "c") == "ccc"
        found = [result.token_ids for result in results]
        assert expected is None or found == expected
        expected = found


def test_words_are_spelled_as_letters() -> None:
    """What the cases above forbid are tokens below those that are allowed."""
    assert [LetterTokenizer().encode(word) for word in ("'(", "+,")] == [[7, 8], [11, 12]]
