"""Targets of every form: against float64, against themselves to the bit, and what they launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from specrt import _C
from specrt.cache import CacheBatch
from specrt.config import Form
from specrt.device import Device
from specrt.draft.eesd.checkpoint import NUM_MODES, ExitConfig, ExitWeights
from specrt.draft.eesd.model import ExitModel
from specrt.models.heads import pad_heads
from specrt.models.loader import Weights
from specrt.models.model import LlamaModel
from specrt.models.prefill import Prompts
from specrt.models.step import FINAL_TAP, StepRows, layer_tap
from specrt.tree import TreeBuilder, chain_tree
from tests.forms import FORMS, NUM_LAYERS, VOCAB, form_config, form_weights, named_config
from tests.oracles import decoder
from tests.trees import trees_of

PROMPT = [(11 * i * i + 3 * i) % VOCAB for i in range(150)]
TOLERANCE = 2e-5  # float32 sums in another order, by the largest value of a layer


def make_target(name: str) -> LlamaModel:
    config = named_config(name)
    return LlamaModel(config, form_weights(config))


def started(model: LlamaModel, prompts: Sequence[Sequence[int]], room: int = 60) -> CacheBatch:
    cache = model.new_cache(16)
    sequences = [cache.open(len(prompt) + room) for prompt in prompts]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        for _ in model.extend(prompt, CacheBatch(cache, [sequence])):
            pass
    return CacheBatch(cache, sequences)


def padded(weights: Weights, head_dim: int) -> Weights:
    """Heads of 16, as they are loaded where the model's are smaller."""
    keys = {
        "qkv": "self_attn.q_proj.weight",
        "qkv_bias": "self_attn.q_proj.bias",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "o": "self_attn.o_proj.weight",
    }
    layers = []
    for layer in weights.layers:
        tensors = {name: getattr(layer, name) for name in keys}
        changed = {
            name: pad_heads(keys[name], tensor, head_dim, 16)
            for name, tensor in tensors.items()
            if tensor is not None
        }
        layers.append(replace(layer, **changed))
    return replace(weights, layers=tuple(layers))


def branching() -> tuple[TreeBuilder, list[list[int]]]:
    """A tree of 21 nodes, and of each the nodes from the root down to it."""
    tree, paths = TreeBuilder(5), [[0]]
    for node in range(1, 21):
        parent = (node * node) % node if node % 3 else node - 1
        parent = max(0, node - 1 - node % 3) if node % 4 else parent
        tree.add(parent, (7 * node) % VOCAB)
        paths.append([*paths[parent], node])
    return tree, paths


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("head_dim", [16, 10])
@pytest.mark.parametrize("name", FORMS)
def test_logits_and_states_are_those_of_the_form(name: str, head_dim: int) -> None:
    config = named_config(name, head_dim=head_dim)
    weights = form_weights(config)
    model = LlamaModel(config, padded(weights, head_dim))
    tree, paths = branching()
    taps = (*map(layer_tap, range(NUM_LAYERS)), FINAL_TAP)
    output = model.forward(trees_of([tree]), started(model, [PROMPT]), taps=taps)
    for node in (0, 9, 20):
        text = PROMPT + [tree.tokens[above] for above in paths[node]]
        logits, states, feature = decoder.run(config, weights, text)
        assert error(output.logits[0, node], logits[-1]) < TOLERANCE
        for tap, state in zip(taps, [*states, feature], strict=True):
            assert error(output.taps[tap][0, node], state[-1]) < TOLERANCE, tap


@pytest.mark.parametrize("name", FORMS)
def test_a_tree_is_what_decoding_gives(name: str) -> None:
    """To the bit, in a batch, and from steps that were captured."""
    model = make_target(name)
    tree, paths = branching()
    prompts = [PROMPT[:30], PROMPT]
    for _ in range(2):
        logits = model.forward(trees_of([tree] * 2), started(model, prompts)).logits.clone()
    longest = max(paths, key=len)
    for row, prompt in enumerate(prompts):
        batch = started(model, [prompt])
        for node in longest:
            one = torch.tensor([[tree.tokens[node]]], dtype=torch.int32)
            alone = model.forward(chain_tree(one), batch).logits[0, 0]
            assert torch.equal(alone, logits[row, node]), node
            path = torch.zeros(1, 1, dtype=torch.int32)
            batch.commit(path, torch.ones(1, dtype=torch.int32))


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_is_the_same_in_any_pieces(name: str) -> None:
    model = make_target(name)

    tree, text = trees_of([branching()[0]]), [*PROMPT, *PROMPT]

    def run(most: int, most_of_chain: int) -> tuple[torch.Tensor, torch.Tensor]:
        model.prompts = Prompts(model.device, most, most_of_chain)
        cache = model.new_cache(16)
        batch, states = CacheBatch(cache, [cache.open(len(text) + 21)]), []
        for _, taps in model.extend(text, batch, (FINAL_TAP,)):
            states.append(taps[FINAL_TAP][0].clone())
        return torch.cat(states), model.forward(tree, batch).logits.clone()

    expected = run(128, 128)
    for sizes in ((16, 16), (128, 32)):  # the latter of four chains that go on in one another
        for got, wanted in zip(run(*sizes), expected, strict=True):
            assert torch.equal(got, wanted), sizes


class Launches:
    """The kernels that are launched, by name, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = list[str]()
        for name in (
            "activate", "embed", "layer_norm", "linear", "rms_norm", "rope_append", "scale_add",
            "tree_attention",
        ):  # fmt: skip
            monkeypatch.setattr(_C, name, self._noting(name, getattr(_C, name)))

    def _noting(self, name: str, kernel: object) -> object:
        def launch(*arguments: object) -> None:
            self.names.append(name)
            kernel(*arguments)  # type: ignore[operator]

        return launch


_ATTENTION = ["linear", "rope_append", "tree_attention", "linear"]  # on the CPU, which appends
_MLP = ["linear", "activate", "linear"]
_RMS, _LAYER, _ADD = ["rms_norm"], ["layer_norm"], ["scale_add"]
LAUNCHES = {
    "llama": [*_RMS, *_ATTENTION, *_RMS, *_MLP],
    "post": ["linear", *_RMS, *_RMS, *_ATTENTION[1:], *_RMS, *_ADD, *_MLP, *_RMS, *_ADD],
    "parallel": [*_LAYER, "linear", *_MLP[:2], *_ATTENTION[1:], "linear"],
    "parallel, two norms": [
        *_LAYER, "linear", *_LAYER, *_MLP[:2], *_ATTENTION[1:], *_ADD, "linear", *_ADD,
    ],
    "scaled": [*_RMS, *_ATTENTION, *_ADD, *_RMS, *_MLP, *_ADD],
    "learned positions": [*_LAYER, *_ATTENTION, *_LAYER, *_MLP],
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_layer_launches_what_its_form_asks_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = named_config(name)
    model = LlamaModel(config, form_weights(config), Device(is_eager=True))
    batch, tree = started(model, [PROMPT]), trees_of([branching()[0]])
    launches = Launches(monkeypatch)
    model.forward(tree, batch)
    norm = "layer_norm" if config.form.norm == "layer" else "rms_norm"
    head = [norm, "linear", *(_ADD if name == "scaled" else [])]
    assert launches.names == ["embed", *(LAUNCHES[name] * NUM_LAYERS), *head]


@pytest.mark.parametrize("name", FORMS)
def test_an_exit_is_a_layer_of_the_targets_last_kind(name: str) -> None:
    """What it gives is what a target of N + 1 layers would, whose last one is the exit's."""
    model = make_target(name)
    config = ExitConfig.for_target(model.config, NUM_LAYERS - 1, name="target")
    last = replace(
        form_weights(replace(config.layer, num_layers=1), seed=1),
        embed=model.weights.embed,
        lm_head=model.weights.lm_head,
        head_bias=model.weights.head_bias,
    )
    calibration = torch.zeros(NUM_MODES, model.config.hidden_size)
    weights = ExitWeights(last, calibration, torch.zeros(NUM_MODES), torch.ones(NUM_MODES))
    exit_model = ExitModel(config, weights, model)
    joined = replace(
        model.weights,
        layers=(*model.weights.layers[:-1], *last.layers),
        final_norm=last.final_norm,
        final_norm_bias=last.final_norm_bias,
    )
    expected = decoder.run(model.config, joined, PROMPT[:60])[0]
    batch = started(model, [[]])
    tokens = torch.tensor([PROMPT[:60]], dtype=torch.int32)
    states = model.forward(chain_tree(tokens), batch, taps=(exit_model.tap,)).taps[exit_model.tap]
    cache = exit_model.new_cache()
    chain, own = chain_tree(tokens), CacheBatch(cache, [cache.open(60)])
    exit_model.reserve(1, 60, own.num_positions)
    zeros = torch.zeros(1, dtype=torch.int32)
    rows = StepRows(
        chain.depth, chain.ancestors, chain.num_nodes, zeros, own.kv_len, own.block_tables
    )
    hidden, logits = torch.empty(60, model.config.hidden_size), torch.empty(60, VOCAB)
    evidence = torch.empty(60, NUM_MODES)
    exit_model.launch_exit(states[0], rows, cache, hidden, logits, evidence)
    assert error(logits, expected) < TOLERANCE


def test_a_model_has_a_rotary_table_for_each_choice_of_its_layers() -> None:
    model = make_target("both")
    assert list(model._cos_sin) == ["local", "none", "main"]
    other = LlamaModel(model.config, model.weights, ropes=model.ropes)
    assert list(other.ropes) == list(model.ropes)
    plain = form_config(Form(), rope_theta=500.0)  # whose only one is the other's local one
    shared = LlamaModel(plain, form_weights(plain), ropes=model.ropes)
    assert list(shared.ropes) == [model._ropes["local"]]


def test_logits_that_are_more_than_the_product_have_no_maxima() -> None:
    changed = {"both", "scaled"}
    assert {name for name in FORMS if not make_target(name).has_maxima} == changed


def test_an_embeddings_scale_is_rounded_to_the_weights_dtype() -> None:
    config = form_config(Form(embed_scale=8.1))
    weights = form_weights(config)
    for dtype, scale in ((torch.float32, 8.1), (torch.bfloat16, 8.125)):
        model = LlamaModel(config, replace(weights, dtype=dtype))
        assert model._embed_scale == pytest.approx(scale, abs=1e-6)
