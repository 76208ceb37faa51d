"""One-layer drafters beside their target on a GPU, simulated or real: texts, trees, launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specrt import ops
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.checkpoint import (
    ARCHS,
    read_checkpoint,
    reduce_vocabulary,
    write_checkpoint,
)
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import Activations, Rows
from specrt.draft.kind import DraftWindow
from specrt.draft.length.control import ControlOptions
from specrt.draft.length.envelope import GPU_ENVELOPES
from specrt.models.gate_up import interleaved
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.models.step import FINAL_TAP
from specrt.sampling import SamplingParams
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.drafters.fspad_rig import Rig, budget, make_drafter
from tests.engine.support import make_engine, texts
from tests.ops.conftest import load_simt
from tests.oracles.tile_maxima import draft_maxima
from tests.simulated_gpu import only_simulated

VOCAB = 41  # so few that random drafters are right now and then
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPTS = [[(7 * i * i + i) % VOCAB for i in range(n)] for n in (70, 1, 9)]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)
SHAPE = DraftParams(depth=3, top_k=4, total_tokens=14)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path, **SIZES)
    return path


@pytest.fixture(scope="module")
def drafters(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafters")
    for arch in ARCHS:
        make_draft_checkpoint(target, folder / arch, arch)
    config, tensors = read_checkpoint(folder / "fspad", ModelConfig.from_directory(target))
    few = reduce_vocabulary(config, tensors, torch.arange(VOCAB), 24)
    write_checkpoint(folder / "reduced", *few)
    return {path.name: path for path in folder.iterdir()}


def make_model(path: Path, device: Device) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    weights = place_weights(load_weights(path, config, torch.bfloat16), device)
    return LlamaModel(config, weights, device)


# --- text -----------------------------------------------------------------------------------------

SETTINGS = {"greedy": GREEDY, "seed": SAMPLED}
BY_CHANCE = ControlOptions("beta-ts", prior=(9.0, 1.0))
Case = tuple[str, str, DraftParams | None, dict[str, Any]]
CASES: list[Case] = [
    ("fspad", "seed", SHAPE, {}),
    ("fspad", "greedy", None, {}),
    ("fspad", "seed", None, {"control": BY_CHANCE, "fold": True}),
    ("eagle2", "greedy", SHAPE, {"fold": False, "window": DraftWindow(20, 2)}),
    ("reduced", "seed", SHAPE, {"fold": False}),
    ("fspad", "greedy", SHAPE, {"fold": True, "weights": "fp8", "hot_tokens": range(5, VOCAB)}),
]
MORE_CASES: list[Case] = [
    (arch, setting, shape, {"fold": is_folded})
    for arch in ARCHS
    for setting in SETTINGS
    for shape in (SHAPE, None)
    for is_folded in (False, True)
]
MORE_CASES.append(("fspad", "seed", SHAPE, {"fold": False, "weights": "fp8"}))


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[int]]]:
    """Plain decoding's on the device, by device and setting."""
    return {}


@pytest.mark.parametrize(
    ("name", "setting", "shape", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_bits_do_not_change(
    target: Path,
    drafters: Mapping[str, Path],
    answers: dict[str, list[list[int]]],
    gpu: Device,
    name: str,
    setting: str,
    shape: DraftParams | None,
    options: dict[str, Any],
) -> None:
    """Sequences of unequal lengths join and leave."""
    model = make_model(target, gpu)
    params = [replace(SETTINGS[setting], max_new_tokens=count) for count in (7, 10, 4)]
    there = f"{gpu} {setting}"
    if there not in answers:
        engine = make_engine(model, max_batch=1)
        answers[there] = texts(engine.generate(PROMPTS, params))
    drafter = make_drafter(model, drafters[name], **options)
    results = make_engine(model, drafter, max_batch=2).generate(PROMPTS, params, shape)
    assert texts(results) == answers[there]
    assert all(result.stats.num_draft_tokens for result in results)
    if shape is not None or name == "fspad":  # the others' own sizes catch nothing by chance
        assert sum(result.stats.num_accepted_tokens for result in results)
    assert drafter.cache.num_held_pages == 0


# --- weights --------------------------------------------------------------------------------------


def test_tables_are_shared_and_matrices_have_the_targets_dtype(
    target: Path, drafters: Mapping[str, Path], gpu: Device
) -> None:
    model = make_model(target, gpu)
    for name, is_folded in (("fspad", True), ("reduced", False)):
        weights = make_drafter(model, drafters[name], fold=is_folded).layer.weights
        tensors = {key: t for key, t in vars(weights).items() if isinstance(t, torch.Tensor)}
        assert all(gpu.holds(tensor) for tensor in tensors.values())
        matrices = {key: t for key, t in tensors.items() if t.dim() == 2}
        assert {t.dtype for t in matrices.values()} == {torch.bfloat16}
        assert weights.embed is model.weights.embed
        assert (weights.head is model.weights.lm_head) == (name == "fspad")
        assert (weights.token_gate is not None) == is_folded


def test_gate_and_up_lie_in_turn(target: Path, drafters: Mapping[str, Path], gpu: Device) -> None:
    """No text would tell: a drafter that computes something else is accepted more seldom."""
    here, there = (
        make_drafter(make_model(target, device), drafters["fspad"], fold=False).layer.weights
        for device in (Device(), gpu)
    )
    assert there.is_interleaved and not here.is_interleaved
    assert torch.equal(gpu.read(there.gate_up), interleaved(here.gate_up.bfloat16()))
    assert torch.equal(gpu.read(there.qkv), here.qkv.bfloat16())


# --- trees ----------------------------------------------------------------------------------------


def fields(tree: Proposal) -> tuple[torch.Tensor, ...]:
    return tree.draft_tokens, tree.parents, tree.num_nodes


class Scripted:
    """In place of what a layer computes: logits that are the same on every device."""

    def __init__(self, drafter: FspadDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rng = torch.Generator().manual_seed(3)
        self._device = drafter.layer.device
        monkeypatch.setattr(drafter.layer, "finish", self.finish)

    def finish(
        self, q: Any, ancestors: Any, rows: Rows, cache: Any, work: Activations, *rest: Any
    ) -> torch.Tensor:
        logits = work.logits[: rows.depth.numel()]
        script = (4 * torch.randn(logits.shape, generator=self._rng)).round(decimals=1)  # ties
        logits.copy_(self._device.there(script))
        maxima = rest[-1]
        if maxima is not None:  # a head on a GPU leaves these
            read = self._device.read
            told = (
                t if not isinstance(t, torch.Tensor) else read(t) for t in vars(maxima).values()
            )
            left = draft_maxima(script, ops.DraftMaxima(*told))
            for there, host in zip((maxima.keys, maxima.masses), left, strict=True):
                there.copy_(self._device.there(host))
        return logits


@pytest.mark.parametrize("name", ["fspad", "reduced"])
def test_trees_are_those_of_the_cpu(
    target: Path,
    drafters: Mapping[str, Path],
    gpu: Device,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Greedy, coupled and filtered, side by side, from equal logits."""
    outcomes = []
    for device in (Device(is_eager=True), gpu):
        model = make_model(target, device)
        drafter = make_drafter(model, drafters[name])
        Scripted(drafter, monkeypatch)
        states = []
        for row, options in enumerate(({}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 7})):
            rig = Rig(model, drafter, PROMPTS[0])
            states.append(rig.state(20 + 9 * row, **options))
            rig.begin(states[-1])
        for shape in ({"depth": 4, "top_k": 5, "total_tokens": 24}, {"depth": 1, "top_k": 9}):
            tree = drafter.propose(states, budget(**shape))
            outcomes.append([device.read(t).clone() for t in fields(tree)])
            path = device.there(torch.zeros(3, 1, dtype=torch.int32))
            result = AcceptResult(path, torch.zeros(3, dtype=torch.int32), path)
            zeros = device.zeros(3, 1, 64, dtype=drafter.layer.activation_dtype)
            drafter.observe(states, tree, result, {FINAL_TAP: zeros})
            for state in states:
                state.token_ids.append(1)
    half = len(outcomes) // 2
    for ours, theirs in zip(outcomes[half:], outcomes[:half], strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert outcomes[0][2].tolist() == [24, 24, 24]


def test_pairs_of_undrafted_rounds_are_caught_up(
    target: Path, drafters: Mapping[str, Path], gpu: Device
) -> None:
    model, shape = make_model(target, gpu), budget(depth=2, top_k=3, total_tokens=9)
    rig = Rig(model, make_drafter(model, drafters["fspad"]), PROMPTS[0])
    drafter, state = rig.drafter, rig.state(4)
    rig.begin(state)
    path = gpu.there(torch.zeros(1, 1, dtype=torch.int32))
    for length in range(4, 24):
        root = drafter.propose([state], budget(depth=0))
        result = AcceptResult(path, torch.zeros(1, dtype=torch.int32), path)
        taps = {FINAL_TAP: rig.features[None, length - 1 : length]}
        drafter.observe([state], root, result, taps)
        state.token_ids.append(rig.ids[length])
    before = gpu.num_reads
    trees = [drafter.propose([state], shape), rig.fresh(24, shape)]
    assert gpu.num_reads == before
    ours, theirs = ([gpu.read(t).tolist() for t in fields(tree)] for tree in trees)
    assert ours == theirs


# --- what a round takes ---------------------------------------------------------------------------


class Counted:
    """What a drafter's proposals take, as they are made, where no round is launched ahead."""

    def __init__(self, drafter: FspadDrafter, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        self._drafter, self._gpu, self._propose = drafter, gpu, drafter.propose
        self._upload, self._num_uploads = gpu.upload, 0
        self.rounds: list[tuple[int, int, int, int]] = []
        """Of each: reads before it, its launches, its uploads, the most pairs of a sequence."""
        self.sizes: set[int] = set()
        monkeypatch.setattr(drafter, "plan", lambda states, budget: None)
        monkeypatch.setattr(drafter, "propose", self.propose)
        monkeypatch.setattr(gpu, "upload", self.upload)

    def upload(self, host: torch.Tensor, out: torch.Tensor) -> None:
        self._num_uploads += 1
        self._upload(host, out)

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        simt, reads = load_simt(), self._gpu.num_reads
        launches, uploads = simt.num_launches(), self._num_uploads
        pairs = max(len(self._drafter._drafts[state].pending) for state in states)
        proposal = self._propose(states, budget)
        made = simt.num_launches() - launches, self._num_uploads - uploads
        self.rounds.append((reads, *made, pairs))
        self.sizes.add(proposal.draft_tokens.shape[1])
        return proposal


FIRST_STEP = 5
"""Launches of the accepted pairs' step: feature sampling's norm; append, attention and norm of the
layer; expand."""


@only_simulated
def test_a_round_is_read_once_and_told_once(
    target: Path, drafters: Mapping[str, Path], gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launches are those of three levels, commit and choice; products have a stand-in."""
    model = make_model(target, gpu)
    drafter = make_drafter(model, drafters["fspad"], fold=False)
    counted = Counted(drafter, gpu, monkeypatch)
    engine = make_engine(model, drafter, max_batch=3, prefill_chunk=1024)
    engine.generate(PROMPTS[:2], GREEDY, SHAPE)
    drafted = counted.rounds[1:-3]  # features come with the first; the end is near at last
    assert len(drafted) > 5
    reads = [each[0] for each in counted.rounds]
    assert reads == list(range(reads[0], reads[0] + len(reads)))
    for _, launches, _, pairs in drafted:
        assert launches == 3 * FIRST_STEP + 2 + (pairs > 1)
    assert {uploads for _, _, uploads, _ in drafted[1:]} == {1}


@only_simulated
def test_sizes_are_envelopes_that_were_decided_before(
    target: Path, drafters: Mapping[str, Path], gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(target, gpu)
    drafter = make_drafter(model, drafters["fspad"])
    counted = Counted(drafter, gpu, monkeypatch)
    engine = make_engine(model, drafter, prefill_chunk=1024)
    engine.generate(PROMPTS[1], replace(GREEDY, max_new_tokens=16))
    assert len(counted.sizes) > 1 and counted.sizes <= set(GPU_ENVELOPES)
    reads = [each[0] for each in counted.rounds]
    assert reads == list(range(reads[0], reads[0] + len(reads)))
