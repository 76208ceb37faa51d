"""The target in 16-bit activations: on the CPU's kernels, on the simulated CUDA kernels, on a GPU.

Where there is no GPU, the CPU's product stands in for ``linear``; ``test_linear_target.py`` runs
its kernel.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.timed_steps import TimedSteps
from specrt import ops
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, DraftParams
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.models.step import FINAL_TAP, layer_tap
from specrt.sampling import SamplingParams
from specrt.tree import TreeBuilder, chain_tree
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.engine.support import RandomTreeDrafter, make_engine, texts
from tests.ops.conftest import Backend, load_simt
from tests.trees import trees_of

pytestmark = pytest.mark.usefixtures("stand_in_linear")

VOCAB = 97
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "dtype": torch.bfloat16,
}
PROMPT = [(11 * i * i + 3 * i) % VOCAB for i in range(70)]  # more than a leaf of attention
PROMPTS = [PROMPT[:5] * 3, PROMPT[:1], PROMPT[:21]]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, path, **SIZES)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path, **SIZES)
    return path


def make_model(path: Path, backend: Backend, dtype: torch.dtype = torch.bfloat16) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    place = Device(backend.device, is_gpu=backend.runs_cuda_source, is_eager=True)
    weights = place_weights(load_weights(path, config, dtype), place)
    return LlamaModel(config, weights, place, activation_dtype=dtype)


def started(
    model: LlamaModel, prompts: Sequence[Sequence[int]], page_size: int = 64, piece: int = 128
) -> CacheBatch:
    cache = model.new_cache(page_size)
    sequences = [cache.open(len(prompt) + 40) for prompt in prompts]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        alone = CacheBatch(cache, [sequence])
        for start in range(0, len(prompt), piece):
            for _ in model.extend(prompt[start : start + piece], alone):
                pass
    return CacheBatch(cache, sequences)


def random_tree(num_nodes: int, seed: int) -> TreeBuilder:
    rng = random.Random(seed)
    tree = TreeBuilder(rng.randrange(VOCAB))
    while len(tree) < num_nodes:
        tree.add(rng.choice([len(tree) - 1, rng.randrange(len(tree))]), rng.randrange(VOCAB))
    return tree


def path_to(tree: TreeBuilder, node: int) -> list[int]:
    """The tokens from the root down to a node."""
    above = path_to(tree, tree.parents[node]) if node else []
    return [*above, tree.tokens[node]]


# --- against transformers -------------------------------------------------------------------------


TREE = random_tree(7, seed=1)


@dataclass(frozen=True)
class Reference:
    """What ``transformers`` gives for a tree's nodes, each run as plain text: ``[N, ...]``."""

    logits: torch.Tensor
    final: torch.Tensor
    first_layer: torch.Tensor


@cache
def reference(path: Path, dtype: torch.dtype, stored: torch.dtype) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=stored).to(dtype)
    rows = []
    for node in range(len(TREE)):
        ids = torch.tensor([PROMPT + path_to(TREE, node)])
        with torch.no_grad():
            rows.append(model(ids, output_hidden_states=True))
    hidden = [row.hidden_states for row in rows]
    return Reference(
        torch.stack([row.logits[0, -1] for row in rows]),
        torch.stack([states[-1][0, -1] for states in hidden]),
        torch.stack([states[1][0, -1] for states in hidden]),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_transformers(
    checkpoint: Path, backend: Backend, dtype: torch.dtype
) -> None:
    exact, theirs = (reference(checkpoint, kind, dtype) for kind in (torch.float64, dtype))
    model = make_model(checkpoint, backend, dtype)
    batch = started(model, [PROMPT])
    taps = (FINAL_TAP, layer_tap(0))
    output = model.forward(trees_of([TREE]), batch, taps=taps)
    for ours, name in (
        (output.logits, "logits"),
        (output.taps[FINAL_TAP], "final"),
        (output.taps[layer_tap(0)], "first_layer"),
    ):
        assert ours.device == backend.device
        right = getattr(exact, name)
        error = (ours[0].cpu().double() - right).square().mean().sqrt()
        usual = (getattr(theirs, name).double() - right).square().mean().sqrt()
        assert 0 < error <= 2 * usual, name


def test_the_cuda_sources_are_what_runs(llama: Path, backend: Backend) -> None:
    """The embedding; attention and two norms a layer; the last norm. Products have a stand-in."""
    if backend.name == "cuda":
        pytest.skip("the extension's launches are not counted")
    model = make_model(llama, backend)
    batch, tree, simt = started(model, [PROMPT]), trees_of([TREE]), load_simt()
    before = simt.num_launches()
    model.forward(tree, batch)
    expected = 3 * SIZES["num_hidden_layers"] + 2 if backend.name == "simt" else 0
    assert simt.num_launches() - before == expected


# --- a row's bits are its own ---------------------------------------------------------------------


@pytest.mark.tensor_cores("sm_90")
def test_a_node_alone_and_in_a_tree(checkpoint: Path, backend: Backend) -> None:
    model, tree = make_model(checkpoint, backend), random_tree(13, seed=2)
    batch = started(model, [PROMPT])
    whole = model.forward(trees_of([tree]), batch).logits[0].clone()
    for node in range(0, 13, 4):
        *above, last = path_to(tree, node)
        alone = started(model, [PROMPT + above])
        single = chain_tree(torch.tensor([[last]], dtype=torch.int32))
        assert torch.equal(model.forward(single, alone).logits[0, 0], whole[node]), node


def test_pieces_of_the_prompt_and_page_sizes(checkpoint: Path, backend: Backend) -> None:
    model = make_model(checkpoint, backend)
    tree = trees_of([random_tree(5, seed=3)])
    outcomes = [
        model.forward(tree, started(model, [PROMPT], page_size, piece)).logits.clone()
        for page_size, piece in ((64, 128), (16, 128), (16, 10), (64, 19))
    ]
    assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.tensor_cores("sm_80", "sm_90")
def test_company_changes_nothing(checkpoint: Path, backend: Backend) -> None:
    model = make_model(checkpoint, backend)
    trees = [random_tree(size, seed=size) for size in (3, 11, 6)]
    together = model.forward(trees_of(trees), started(model, PROMPTS)).logits.clone()
    for row, (tree, prompt) in enumerate(zip(trees, PROMPTS, strict=True)):
        alone = model.forward(trees_of([tree]), started(model, [prompt])).logits
        assert torch.equal(together[row, : len(tree)], alone[0]), row


def test_lengths_are_those_the_kernels_see(llama: Path, backend: Backend) -> None:
    batch = started(make_model(llama, backend), PROMPTS)
    path = torch.tensor([[0, 2, 3], [0, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    batch.commit(path, torch.tensor([3, 1, 0], dtype=torch.int32))
    lengths = [sequence.length for sequence in batch.sequences]
    assert lengths == batch.kv_len.tolist() == [len(PROMPTS[0]) + 3, 2, len(PROMPTS[2])]


def test_a_gpu_that_is_lost_in_the_midst(
    llama: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel that reads what it may not, in a round; the launches after it fail too."""
    if backend.name != "simt":
        pytest.skip("a GPU that is lost stays so")
    model, params = make_model(llama, backend), SETTINGS["greedy"]
    expected = texts(make_engine(model).generate(PROMPTS, params))
    monkeypatch.setattr(model.device, "wait", lambda: ops.activate(torch.zeros(1, 2)))
    engine = make_engine(model, max_batch=2)
    load_simt().break_device(100)
    results = engine.generate(PROMPTS, params)
    for result, answer in zip(results, expected, strict=True):
        assert result.token_ids == answer[: len(result.token_ids)]
        assert re.fullmatch("GPU lost: kernel .*: an illegal memory access was enc.*", result.error)
    assert results[0].token_ids
    with pytest.raises(RuntimeError, match=r"its GPU was lost .* \(kernel .*: an illegal memory"):
        engine.generate(PROMPTS, params)
    engine.close()


# --- speculation on is speculation off ------------------------------------------------------------

SETTINGS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(max_new_tokens=9, ignore_eos=True),
    "seed": SamplingParams(max_new_tokens=6, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True),
}


@pytest.mark.parametrize(
    ("checkpoint", "setting"),
    [
        ("llama", "greedy"),
        ("llama", "seed"),
        pytest.param("qwen3", "seed", marks=pytest.mark.slow),
        pytest.param("qwen3", "greedy", marks=pytest.mark.slow),
    ],
    indirect=["checkpoint"],
)
def test_speculation_changes_nothing(checkpoint: Path, backend: Backend, setting: str) -> None:
    model, params = make_model(checkpoint, backend), SETTINGS[setting]
    expected = texts(make_engine(model, max_batch=1).generate(PROMPTS, params))
    answers = {tuple(p): answer for p, answer in zip(PROMPTS, expected, strict=True)}
    drafters: dict[str, Drafter] = {
        "prompt lookup": PromptLookupDrafter(),
        "small model": SmallModelDrafter(model, depth=3, width=2),
        "garbage": RandomTreeDrafter(answers, VOCAB, 12),
    }
    accepted = 0
    for name, drafter in drafters.items():
        results = make_engine(model, drafter, max_batch=2).generate(PROMPTS, params)
        assert texts(results) == expected, name
        accepted += sum(result.stats.num_accepted_tokens for result in results)
    assert accepted  # or nothing was tested


@pytest.mark.gpu
def test_steps_captured_as_graphs_give_the_same_bits(checkpoint: Path) -> None:
    """Sequences that join and leave make caches grow and attention's workspace move between."""
    gpu = Backend("cuda", torch.device("cuda", 0))
    graphs = TimedSteps(gpu.device)
    eager = make_model(checkpoint, gpu)
    model = LlamaModel(eager.config, eager.weights, graphs)
    params = replace(SETTINGS["greedy"], max_new_tokens=20, logprobs=True)
    expected = make_engine(eager, max_batch=1).generate(PROMPTS, params)
    answers = {tuple(p): one.token_ids for p, one in zip(PROMPTS, expected, strict=True)}
    for max_batch in (1, 2):
        for drafter in (None, RandomTreeDrafter(answers, VOCAB, 12)):
            results = make_engine(model, drafter, max_batch=max_batch).generate(PROMPTS, params)
            assert texts(results) == texts(expected)
            assert [one.logprobs for one in results] == [one.logprobs for one in expected]
    assert len(graphs.take_seconds()) > 20


def test_fspad_drafts_where_the_target_is(llama: Path, backend: Backend, tmp_path: Path) -> None:
    model, params = make_model(llama, backend), SETTINGS["greedy"]
    expected = texts(make_engine(model).generate(PROMPTS, params))
    make_draft_checkpoint(llama, tmp_path)
    drafter = load_drafter(tmp_path, model, None, DrafterOptions())
    assert isinstance(drafter, FspadDrafter) and drafter.layer.device is model.device
    results = make_engine(model, drafter).generate(PROMPTS, params, DraftParams(3, 3, 8))
    assert texts(results) == expected
    assert all(result.stats.num_draft_tokens for result in results)
