"""A small target by ``linear``'s own CUDA source, under the shim or on a GPU: nothing stands in.

Its second half of an MLP is wide enough to be summed in slices. What other tests look at with a
stand-in is asked here once: logits, rows in company, and that drafting changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.loader import Weights, load_weights
from specrt.models.model import LlamaModel
from specrt.models.placement import place_weights
from specrt.sampling import SamplingParams
from specrt.tree import TreeBuilder
from tests.checkpoints import make_checkpoint
from tests.engine.support import RandomTreeDrafter, make_engine, texts
from tests.ops.conftest import Backend, load_simt
from tests.trees import trees_of

VOCAB = 97
PROMPTS = [[5, 9, 5, 9, 5, 61], [3]]
GREEDY = SamplingParams(max_new_tokens=4, ignore_eos=True)
Loaded = tuple[ModelConfig, Weights]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path: Path = tmp_path_factory.mktemp("target")
    make_checkpoint(
        "llama_biased",
        path,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=256,
        dtype=torch.bfloat16,
    )
    config = ModelConfig.from_directory(path)
    assert ops.linear_workspace(config.hidden_size, config.intermediate_size, 1) > 0
    return config, load_weights(path, config, torch.bfloat16)


def logits_of(model: LlamaModel, trees: list[TreeBuilder]) -> torch.Tensor:
    """``[B, N, V]`` behind each prompt, on the model's device."""
    cache = model.new_cache()
    sequences = [cache.open(len(prompt) + 40) for prompt in PROMPTS[: len(trees)]]
    for prompt, sequence in zip(PROMPTS, sequences, strict=False):
        for _ in model.extend(prompt, CacheBatch(cache, [sequence])):
            pass
    return model.forward(trees_of(trees), CacheBatch(cache, sequences)).logits.clone()


def tree_of(tokens: list[int]) -> TreeBuilder:
    """A root, a chain of half of the others, and the rest of them its children."""
    tree = TreeBuilder(tokens[0])
    half = len(tokens) // 2
    tree.add_path(tokens[1:half], 128)
    for token in tokens[half:]:
        tree.add(0, token)
    return tree


@pytest.fixture(scope="module")
def by_the_cpu(loaded: Loaded) -> torch.Tensor:
    """Logits of the first tree in float32 activations."""
    return logits_of(LlamaModel(*loaded), TREES[:1])[0]


TREES = [tree_of([(7 * i + 2) % VOCAB for i in range(11)]), tree_of([4, 5, 6, 7])]


def test_logits_and_company(loaded: Loaded, by_the_cpu: torch.Tensor, backend: Backend) -> None:
    """Close to the CPU's, whose activations are float32; the same bits alone and together."""
    if not backend.runs_cuda_source:
        pytest.skip("the CPU has tests of its own")
    config, weights = loaded
    place = Device(backend.device, is_gpu=True)
    model = LlamaModel(config, place_weights(weights, place), place)
    together = logits_of(model, TREES)
    assert torch.equal(logits_of(model, TREES[:1])[0], together[0, :11])
    alone = logits_of(model, [TreeBuilder(TREES[0].tokens[0])])
    assert torch.equal(alone[0, 0], together[0, 0])
    exact = by_the_cpu.to(backend.device)
    error = (together[0, :11] - exact).square().mean().sqrt()
    assert 0 < error < 0.02 * exact.square().mean().sqrt()


def test_every_launch_of_a_pass_is_ours(loaded: Loaded, backend: Backend) -> None:
    """Embedding; norm, qkv, attention, o, norm, gate and up, down; a norm and the head."""
    if backend.name != "simt":
        pytest.skip("the extension's launches are not counted")
    config, weights = loaded
    place = Device(is_gpu=True)
    model = LlamaModel(config, place_weights(weights, place), place)
    cache, simt = model.new_cache(), load_simt()
    batch, tree = CacheBatch(cache, [cache.open(40)]), trees_of(TREES[:1])
    before = simt.num_launches()
    model.forward(tree, batch)
    assert simt.num_launches() - before == 1 + 7 + 2


@pytest.mark.runs_linear
def test_drafting_changes_nothing(loaded: Loaded, gpu: Device) -> None:
    config, weights = loaded
    model = LlamaModel(config, place_weights(weights, gpu), gpu)
    params = replace(GREEDY, logprobs=True)
    expected = make_engine(model, max_batch=1).generate(PROMPTS, params)
    known = {tuple(p): one.token_ids for p, one in zip(PROMPTS, expected, strict=True)}
    drafter = RandomTreeDrafter(known, VOCAB, 9)
    results = make_engine(model, drafter, max_batch=2, max_nodes=16).generate(PROMPTS, params)
    assert texts(results) == texts(expected)
    assert [one.logprobs for one in results] == [one.logprobs for one in expected]
    assert sum(one.stats.num_accepted_tokens for one in results)
