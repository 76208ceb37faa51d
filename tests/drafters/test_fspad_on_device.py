"""The one-layer drafters beside their target on a simulated GPU: text, trees, launches, reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from specrt.draft.length.control import ControlOptions
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
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

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
SHAPE = DraftParams(depth=3, top_k=4, total_tokens=20)


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    simt = load_simt()
    simt.set_schedule(1)
    with simulated_gpu(simt, monkeypatch) as gpu:
        yield gpu


def make_model(path: Path, device: Device) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    weights = place_weights(load_weights(path, config, torch.bfloat16), device)
    return LlamaModel(config, weights, device)


# --- text -----------------------------------------------------------------------------------------

CASES: list[tuple[str, SamplingParams, DraftParams | None, dict[str, Any]]] = [
    ("fspad", GREEDY, SHAPE, {}),
    ("fspad", SAMPLED, SHAPE, {}),
    ("fspad", GREEDY, None, {}),
    ("fspad", SAMPLED, None, {"control": ControlOptions("beta-ts", prior=(9.0, 1.0))}),
    ("fspad", SAMPLED, SHAPE, {"fold": True}),
    ("eagle2", SAMPLED, SHAPE, {}),
    ("eagle2", GREEDY, SHAPE, {"fold": True}),
    ("reduced", SAMPLED, SHAPE, {}),
]


@pytest.mark.parametrize(("name", "params", "shape", "options"), CASES)
def test_bits_do_not_change(
    target: Path,
    drafters: Mapping[str, Path],
    gpu: SimulatedGpu,
    name: str,
    params: SamplingParams,
    shape: DraftParams | None,
    options: dict[str, Any],
) -> None:
    """Of plain decoding on the same device; sequences of unequal lengths join and leave."""
    model = make_model(target, gpu)
    each = [replace(params, max_new_tokens=count) for count in (9, 14, 6)]
    expected = texts(make_engine(model, max_batch=1).generate(PROMPTS, each))
    drafter = make_drafter(model, drafters[name], **options)
    results = make_engine(model, drafter, max_batch=2).generate(PROMPTS, each, shape)
    assert texts(results) == expected
    assert all(result.stats.num_draft_tokens for result in results)
    assert sum(result.stats.num_accepted_tokens for result in results)
    assert drafter.cache.num_held_pages == 0


# --- trees ----------------------------------------------------------------------------------------


class Scripted:
    """In place of what a layer computes: logits that are the same on every device."""

    def __init__(self, drafter: FspadDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rng = torch.Generator().manual_seed(3)
        self._device = drafter.layer.device
        monkeypatch.setattr(drafter.layer, "finish", self.finish)

    def finish(
        self, q: Any, ancestors: Any, rows: Rows, cache: Any, work: Activations, regressed: Any
    ) -> torch.Tensor:
        logits = work.logits[: rows.depth.numel()]
        script = (4 * torch.randn(logits.shape, generator=self._rng)).round(decimals=1)  # ties
        logits.copy_(self._device.there(script))
        return logits


@pytest.mark.parametrize("name", ["fspad", "reduced"])
def test_trees_are_those_of_the_cpu(
    target: Path,
    drafters: Mapping[str, Path],
    gpu: SimulatedGpu,
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
            outcomes.append(
                [device.read(t).clone() for t in (tree.draft_tokens, tree.parents, tree.num_nodes)]
            )
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


# --- what a round takes ---------------------------------------------------------------------------


def test_a_round_reads_once_and_says_what_the_host_knows_at_once(
    target: Path, drafters: Mapping[str, Path], gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, simt = make_model(target, gpu), load_simt()
    drafter, rounds = make_drafter(model, drafters["fspad"]), []
    bare_propose, bare_upload, uploads = drafter.propose, gpu.upload, []

    def upload(host: torch.Tensor, out: torch.Tensor) -> None:
        uploads.append(host.shape)
        bare_upload(host, out)

    def propose(states: Sequence[SequenceState], budget: Budget) -> Proposal:
        reads, launches, sent = gpu.num_reads, simt.num_launches(), len(uploads)
        pending = max(len(drafter._drafts[state].pending) for state in states)
        proposal = bare_propose(states, budget)
        rounds.append((reads, simt.num_launches() - launches, len(uploads) - sent, pending))
        return proposal

    monkeypatch.setattr(drafter, "propose", propose)
    monkeypatch.setattr(gpu, "upload", upload)
    engine = make_engine(model, drafter, max_batch=3, prefill_chunk=1024)
    engine.generate(PROMPTS, GREEDY, SHAPE)
    print(rounds)
