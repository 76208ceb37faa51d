"""Engines of any sizes on a GPU, simulated or real, under any load: no drafter changes a text."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, Drafter, DraftParams, EmptyDrafter
from specrt.draft.prompt_lookup.on_device import DevicePromptLookupDrafter
from specrt.draft.recycle.on_device import DeviceRecycleDrafter
from specrt.draft.small_model.on_device import DeviceSmallModelDrafter
from specrt.engine import batch as batch_module
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter
from tests.engine.exits import make_exit_pair, make_launched_drafter
from tests.engine.support import RandomTreeDrafter, make_engine

VOCAB, MOST = 41, 128  # tokens of the longest text: two pages
SIZES = {
    "vocab_size": VOCAB,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MOST,
    "dtype": torch.bfloat16,
}
Asked = tuple[list[int], SamplingParams, DraftParams | None]
Fields = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class Loaded:
    config: ModelConfig
    weights: Weights
    exit: Path
    fspad: Path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("models")
    target, directory = make_exit_pair(folder, **SIZES)
    make_draft_checkpoint(target, folder / "fspad", "fspad")
    config = ModelConfig.from_directory(target)
    weights = load_weights(target, config, torch.bfloat16)
    return Loaded(config, weights, directory, folder / "fspad")


# --- who drafts -----------------------------------------------------------------------------------


def _stretched(name: str) -> Callable[[Fields], None]:
    def spoil(fields: Fields) -> None:
        fields[name] = fields[name] * 1000 - 500  # type: ignore[operator]

    return spoil


def _without_laws(fields: Fields) -> None:
    tokens = fields["draft_tokens"]
    assert tokens is not None
    laws = tokens[:, :, None].expand(-1, -1, VOCAB)
    fields["draft_probs"] = laws.float() * torch.nan


def _of_another_dtype(fields: Fields) -> None:
    fields["parents"] = fields["parents"].long()  # type: ignore[union-attr]


SPOILS = (_without_laws, _of_another_dtype, *map(_stretched, ("draft_tokens", "parents")))


class Hostile(RandomTreeDrafter):
    """Proposes on the device, here and there what cannot be; writes to all it has or had in hand,
    and fails now and then."""

    taps = ("final", "logits")

    def __init__(self, model: LlamaModel, answers: Mapping[tuple[int, ...], list[int]]) -> None:
        super().__init__(answers, VOCAB, 12, hit_rate=0.7)
        self._device = model.device
        self._given: list[torch.Tensor] = []

    def start(self, state: SequenceState) -> None:
        state.max_len = 1
        self._fail()

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        self._fail()
        self._write()
        larger = Budget(budget.max_nodes + 9, budget.cost)
        fields: Fields = {**vars(super().propose(states, larger))}
        if self._rng.random() < 0.7:
            for name, field in fields.items():
                fields[name] = None if field is None else self._device.there(field.clone())
        if self._rng.random() < 0.3:
            self._rng.choice(SPOILS)(fields)
        proposal = Proposal(**fields)  # type: ignore[arg-type]
        self._given = [proposal.draft_tokens, proposal.parents, proposal.num_nodes]
        return proposal

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        for tensor in (*taps.values(), result.path, result.tokens, result.accept_length):
            tensor.fill_(77)
        assert result.report is not None
        for words in (result.report.tokens, result.report.path, result.report.accept_length):
            words[:] = 77
        self._write()
        self._fail()

    def _write(self) -> None:
        for tensor in self._given:
            tensor.fill_(self._rng.randrange(-9, 200))

    def _fail(self) -> None:
        if self._rng.random() < 0.02:
            raise MemoryError("hostile")


def drafter_of(
    name: str, loaded: Loaded, model: LlamaModel, answers: Mapping[tuple[int, ...], list[int]]
) -> Drafter:
    match name:
        case "fspad":
            return make_drafter(model, loaded.fspad)
        case "eesd":
            return make_launched_drafter(model, loaded.exit, "cost-aware", max_draft=4)
        case "recycle":
            return DeviceRecycleDrafter(VOCAB, model.device)
        case "small model":
            return DeviceSmallModelDrafter(model, depth=3, width=2)
        case "plain":
            return EmptyDrafter()
        case "prompt lookup":
            return DevicePromptLookupDrafter(model.device)
        case "trees":
            return RandomTreeDrafter(answers, VOCAB, 12)
    return Hostile(model, answers)


# --- what is asked --------------------------------------------------------------------------------


def random_asked(rng: random.Random, most_nodes: int) -> Asked:
    """A prompt up to the context's end, filters, ends and a shape, of each what there is."""

    def maybe(**options: object) -> dict[str, object]:
        return {name: value for name, value in options.items() if rng.random() < 0.3}

    piece = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 20]))]
    prompt = (piece * MOST)[: rng.choice([1, 1, 5, 20, 62, MOST - 4, MOST - 1])]
    options = maybe(
        top_k=5,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.2,
        frequency_penalty=-0.3,
        logit_bias={rng.randrange(VOCAB): rng.choice([3.0, -2.0])},
        stop_token_ids=rng.sample(range(VOCAB + 5), rng.choice([1, 9])),
        stop=chr(32 + rng.randrange(VOCAB)),
        logprobs=True,
    )
    params = SamplingParams(
        max_new_tokens=rng.choice([1, 2, 5, 9]),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        seed=rng.randrange(99),
        ignore_eos=True,
        **options,  # type: ignore[arg-type]
    )
    shapes = DraftParams(depth=2, top_k=2, total_tokens=min(5, most_nodes)), DraftParams(depth=0)
    return prompt, params, rng.choice([None, None, *shapes])


def said(result: GenerationResult) -> tuple[object, ...]:
    return result.token_ids, result.text, result.logprobs, result.finish_reason, result.error


def answered(
    engine: Engine, asked: Sequence[Asked], rng: random.Random
) -> dict[int, GenerationResult]:
    """By an engine that requests join along the way, and leave now and then."""
    handles, results = {}, {}
    while len(handles) < len(asked) or not engine.is_idle:
        if len(handles) < len(asked) and (engine.is_idle or rng.random() < 0.5):
            handles[engine.add(*asked[len(handles)])] = len(handles)
        if rng.random() < 0.02:
            engine.abort(rng.choice(list(handles)))
        for chunk in engine.step():
            if chunk.result is not None:
                assert chunk.handle is not None
                results[handles[chunk.handle]] = chunk.result
    return results


NAMES = ("fspad", "eesd", "recycle", "small model", "prompt lookup", "plain", "trees", "hostile")
FEW = [("hostile", 5), ("fspad", 8)]
MANY = [(name, seed) for seed in range(12) for name in NAMES]


@pytest.mark.parametrize(
    ("name", "seed"), [*FEW, *(pytest.param(*each, marks=pytest.mark.slow) for each in MANY)]
)
def test_texts_are_those_of_plain_decoding(
    loaded: Loaded, gpu: Device, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(batch_module, "_FIRST_TOKENS", rng.choice([1, 256]))
    monkeypatch.setattr(batch_module, "_FEW_STOPS", rng.choice([0, 4]))
    model = LlamaModel(loaded.config, place_weights(loaded.weights, gpu), gpu)
    most_nodes = rng.choice([1, 2, 4, 16, 64])
    asked = [random_asked(rng, most_nodes) for _ in range(3)]
    plain = make_engine(model, max_batch=1)
    expected = [plain.generate(prompt, params) for prompt, params, _ in asked]
    answers = {tuple(p): one.token_ids for (p, *_), one in zip(asked, expected, strict=True)}
    sizes = {"max_batch": rng.choice([1, 2, 3]), "max_nodes": most_nodes}
    sizes |= {"prefill_chunk": rng.choice([7, 512])}
    sizes |= {"max_cached_tokens": rng.choice([128, 192, 512])}
    engine = make_engine(model, drafter_of(name, loaded, model, answers), **sizes)
    results = answered(engine, asked, rng)
    for index, one in enumerate(expected):
        result = results[index]
        if result.finish_reason == "abort":
            count = len(result.token_ids)
            assert result.token_ids == one.token_ids[:count]
        else:
            assert said(result) == said(one)
            counts = result.stats.num_rounds + result.stats.num_accepted_tokens
            assert counts == len(result.token_ids)
    assert engine.cache.num_held_pages == 0
