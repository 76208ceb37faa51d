"""The Llama family over trees: against ``transformers``, and against itself to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specrt.cache import CacheBatch, CachedSequence
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.models.loader import load_weights
from specrt.models.model import LlamaModel
from specrt.models.step import FINAL_TAP, layer_tap
from specrt.tree import TreeBuilder, chain_tree
from specrt.types import DraftTree
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.trees import trees_of

VOCAB = 97
PROMPT = [(11 * i * i + 3 * i) % VOCAB for i in range(150)]  # more than one piece of `extend`

STAGED = ("draft_tokens", "depth", "ancestors", "num_nodes")

# Sums of a few hundred float32 products in another order: some 1e-6 of the largest logit a layer.
FLOAT32_TOLERANCE = 2e-5


def make_model(path: Path, dtype: torch.dtype = torch.float32) -> LlamaModel:
    config = ModelConfig.from_directory(path)
    return LlamaModel(config, load_weights(path, config, dtype))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    path = tmp_path_factory.mktemp("target")
    make_checkpoint("llama", path)
    return make_model(path)


def random_tree(num_nodes: int, seed: int) -> TreeBuilder:
    rng = random.Random(seed)
    tree = TreeBuilder(rng.randrange(VOCAB))
    while len(tree) < num_nodes:
        tree.add(rng.choice([len(tree) - 1, rng.randrange(len(tree))]), rng.randrange(VOCAB))
    return tree


def paths(tree: TreeBuilder) -> list[list[int]]:
    """For each node the nodes from the root down to it."""
    found: list[list[int]] = []
    for node, parent in enumerate(tree.parents):
        found.append([*(found[parent] if parent >= 0 else []), node])
    return found


def started(
    model: LlamaModel, prompts: Sequence[Sequence[int]], page_size: int = 64, room: int = 300
) -> CacheBatch:
    cache = model.new_cache(page_size)
    sequences = [cache.open(len(prompt) + room) for prompt in prompts]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        for _ in model.extend(prompt, CacheBatch(cache, [sequence])):
            pass
    return CacheBatch(cache, sequences)


def their_rows(
    theirs: PreTrainedModel, prompt: list[int], tree: TreeBuilder
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``transformers``' logits and hidden states of each node, its path run as plain text."""
    texts = [prompt + [tree.tokens[node] for node in path] for path in paths(tree)]
    longest = max(len(text) for text in texts)
    # Causal, so what pads a text on its right does not matter.
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        output = theirs(ids, output_hidden_states=True)
    rows, last = torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])
    return output.logits[rows, last], [state[rows, last] for state in output.hidden_states]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# --- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_taps_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = make_checkpoint(family, tmp_path)
    model = make_model(tmp_path)
    tree = random_tree(14, seed=1)
    logits, hidden = their_rows(theirs, PROMPT, tree)
    layers = model.config.num_layers
    taps = (FINAL_TAP, *(layer_tap(i) for i in range(layers)))
    output = model.forward(trees_of([tree]), started(model, [PROMPT]), taps=taps)
    assert error(output.logits[0], logits) < FLOAT32_TOLERANCE
    # Their first state is the embedding, their last one is behind the final norm.
    for index in range(layers - 1):
        got = output.taps[layer_tap(index)][0]
        assert error(got, hidden[index + 1]) < FLOAT32_TOLERANCE, index
    assert error(output.taps[FINAL_TAP][0], hidden[-1]) < FLOAT32_TOLERANCE
    with torch.no_grad():
        last = theirs.model.norm(output.taps[layer_tap(layers - 1)][0])
    assert error(last, hidden[-1]) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_of_a_prompt_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = make_checkpoint(family, tmp_path)
    model = make_model(tmp_path)
    with torch.no_grad():
        hidden = theirs(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
    cache = model.new_cache()
    batch = CacheBatch(cache, [cache.open(200)])
    starts = []
    for start, taps in model.extend(PROMPT, batch, taps=("layer.1", "final")):
        starts.append(start)
        for tap, state in (("layer.1", hidden[2]), ("final", hidden[-1])):
            assert taps[tap].shape[0] == 1
            expected = state[0, start : start + taps[tap].shape[1]]
            assert error(taps[tap][0], expected) < FLOAT32_TOLERANCE
    assert starts == [0, 128]
    assert batch.kv_len.tolist() == [batch.sequences[0].length] == [len(PROMPT)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_cost_less_than_rounded_activations(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Weights and cache are rounded, activations are not."""
    make_checkpoint(family, tmp_path, dtype=dtype)
    # Not that model itself: casting it has rounded its rotary frequencies too.
    rounded, widened = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d).eval()
        for d in (dtype, torch.float32)
    )
    model = make_model(tmp_path, dtype)
    ids = PROMPT[:70]
    with torch.no_grad():
        lossy = rounded(torch.tensor([ids])).logits[0, 40:].float()
        exact = widened(torch.tensor([ids])).logits[0, 40:]
    batch = started(model, [ids[:40]])
    got = model.forward(chain_tree(torch.tensor([ids[40:]], dtype=torch.int32)), batch).logits[0]
    assert error(got, exact) < 0.5 * error(lossy, exact)


# --- to the bit -----------------------------------------------------------------------------------


def test_a_padded_batch_equals_single_runs(model: LlamaModel) -> None:
    prompts = [PROMPT[:1], PROMPT[:63], PROMPT[:129], PROMPT[5:70]]
    trees = [random_tree(size, seed=size) for size in (1, 17, 64, 100)]
    taps = ("layer.0", "final")
    alone = []
    for prompt, tree in zip(prompts, trees, strict=True):
        output = model.forward(trees_of([tree]), started(model, [prompt]), taps=taps)
        alone.append([output.logits[0].clone(), *(output.taps[tap][0].clone() for tap in taps)])
    output = model.forward(trees_of(trees), started(model, prompts), taps=taps)
    together = [output.logits, *(output.taps[tap] for tap in taps)]
    for row, (tree, expected) in enumerate(zip(trees, alone, strict=True)):
        for got, single in zip(together, expected, strict=True):
            assert torch.equal(got[row, : len(tree)], single)


def by_level(tree: DraftTree) -> list[tuple[DraftTree, int]]:
    """One sequence's tree, whose nodes come level by level, as one piece for each level."""
    pieces = []
    depth = tree.depth[0].tolist()
    for level in range(max(depth) + 1):
        first, end = depth.index(level), len(depth) - depth[::-1].index(level)
        nodes = slice(first, end)
        piece = replace(
            tree,
            draft_tokens=tree.draft_tokens[:, nodes],
            parents=tree.parents[:, nodes],
            depth=tree.depth[:, nodes],
            ancestors=tree.ancestors[:, nodes],
            num_nodes=torch.tensor([end - first], dtype=torch.int32),
        )
        pieces.append((piece, first))
    return pieces


def fan(width: int, levels: int) -> TreeBuilder:
    tree = TreeBuilder(3)
    above = [0]
    for level in range(levels):
        rng = random.Random(level)
        above = sorted({tree.add(rng.choice(above), (7 * i + level) % VOCAB) for i in range(width)})
    return tree


def test_level_by_level_is_all_at_once(model: LlamaModel) -> None:
    # The wide tree takes two words of ancestors, the other one: same level shapes, other masks.
    for levels in (10, 5, 10):
        tree = trees_of([fan(12, levels)])
        whole = model.forward(tree, started(model, [PROMPT])).logits.clone()
        batch = started(model, [PROMPT])
        for piece, first in by_level(tree):
            at = torch.tensor([first], dtype=torch.int32)
            logits = model.forward(piece, batch, first_node=at).logits
            assert torch.equal(logits[0], whole[0, first : first + logits.shape[1]]), first
        assert batch.kv_len.tolist() == [len(PROMPT)]


def test_first_node_may_differ_in_a_batch(model: LlamaModel) -> None:
    trees = [random_tree(9, seed=5), random_tree(12, seed=6)]
    prompts = [PROMPT[:20], PROMPT[:90]]
    tree = trees_of(trees)
    whole = model.forward(tree, started(model, prompts)).logits.clone()
    batch = started(model, prompts)
    starts = [4, 7]
    model.forward(trees_of(trees), batch)  # earlier nodes' rows
    rows = [torch.arange(start, start + 5) for start in starts]

    def rest(field: torch.Tensor) -> torch.Tensor:
        return torch.stack([field[row, index] for row, index in enumerate(rows)])

    piece = replace(
        tree,
        draft_tokens=rest(tree.draft_tokens),
        parents=rest(tree.parents),
        depth=rest(tree.depth),
        ancestors=rest(tree.ancestors),
        num_nodes=torch.tensor([5, 5], dtype=torch.int32),
    )
    at = torch.tensor(starts, dtype=torch.int32)
    assert torch.equal(model.forward(piece, batch, first_node=at).logits, rest(whole))


@pytest.mark.parametrize("page_size", [16, 64])
def test_page_sizes_do_not_show(model: LlamaModel, page_size: int) -> None:
    tree = trees_of([random_tree(40, seed=2)])
    expected = model.forward(tree, started(model, [PROMPT], 128)).logits.clone()
    assert torch.equal(model.forward(tree, started(model, [PROMPT], page_size)).logits, expected)


def test_a_tree_grows_into_text(model: LlamaModel) -> None:
    """Committing a path gives the cache that running its tokens gives."""
    tree = random_tree(30, seed=3)
    batch = started(model, [PROMPT])
    model.forward(trees_of([tree]), batch)
    path = max(paths(tree), key=len)
    batch.commit(
        torch.tensor([path], dtype=torch.int32), torch.tensor([len(path)], dtype=torch.int32)
    )
    assert batch.sequences[0].length == len(PROMPT) + len(path)
    next_tree = trees_of([random_tree(5, seed=4)])
    got = model.forward(next_tree, batch).logits.clone()
    text = PROMPT + [tree.tokens[node] for node in path]
    assert torch.equal(got, model.forward(next_tree, started(model, [text])).logits)


def test_tensors_that_are_filled_again_every_round(model: LlamaModel) -> None:
    """As a drafter's static buffers are: what they hold counts, not which they are."""
    batch = started(model, [PROMPT, PROMPT[:70]])
    trees = [trees_of([random_tree(20, seed), random_tree(9 + seed, -seed)]) for seed in (3, 4, 5)]
    expected = []
    for tree in trees:  # by a model each, which has staged nothing else
        other = LlamaModel(model.config, model.weights)
        expected.append(other.forward(tree, batch).logits.clone())
    buffers = replace(trees[0], **{name: getattr(trees[0], name).clone() for name in STAGED})
    for tree, logits in zip(trees, expected, strict=True):
        for name in STAGED:
            getattr(buffers, name).copy_(getattr(tree, name))
        assert torch.equal(model.forward(buffers, batch).logits, logits)


def test_a_mask_with_a_word_too_few(model: LlamaModel) -> None:
    """What lacks is nobody's ancestor, whatever was staged before."""
    tree, batch = trees_of([random_tree(70, seed=2)]), started(model, [PROMPT])
    lacking, zeroed = tree.ancestors[..., :1], tree.ancestors.clone()
    zeroed[..., 1] = 0
    expected = model.forward(replace(tree, ancestors=zeroed), batch).logits.clone()
    assert not torch.equal(model.forward(tree, batch).logits, expected)
    assert torch.equal(model.forward(replace(tree, ancestors=lacking), batch).logits, expected)


def test_a_cache_that_grows_between_launches(model: LlamaModel) -> None:
    tree = trees_of([random_tree(8, seed=7)])
    batch = started(model, [PROMPT])
    cache = batch.cache
    expected = model.forward(tree, batch).logits.clone()
    before = cache.kv.data_ptr()
    others = [cache.open(5000)]
    assert cache.kv.data_ptr() != before
    assert torch.equal(model.forward(tree, batch).logits, expected)
    # The rows went to the new pages: the path can be committed and read.
    path = torch.tensor([[0]], dtype=torch.int32)
    batch.commit(path, torch.tensor([1], dtype=torch.int32))
    got = model.forward(tree, batch).logits.clone()
    text = [*PROMPT, int(tree.draft_tokens[0, 0])]
    assert torch.equal(got, model.forward(tree, started(model, [text])).logits)
    for sequence in (*batch.sequences, *others):
        cache.close(sequence)
        cache.close(sequence)
    assert cache.num_free_pages == cache.num_pages


def test_a_growing_load_drops_graphs_a_logarithm_of_times(model: LlamaModel) -> None:
    growing = LlamaModel(model.config, model.weights, Device(max_steps=4096))
    version = growing.device.version
    cache = growing.new_cache(page_size=16)
    batch, tokens = CacheBatch(cache), torch.zeros(8, 64, dtype=torch.int32)
    sequences = list[CachedSequence]()
    for size in range(1, 9):
        sequences.append(cache.open())
        for num_nodes in range(1, 65, 3):
            for one in sequences:
                cache.reserve(one, one.length + num_nodes)
            batch.update(sequences)
            growing.forward(chain_tree(tokens[:size, :num_nodes].contiguous()), batch)
            path = torch.zeros(size, 1, dtype=torch.int32)
            batch.commit(path, torch.ones(size, dtype=torch.int32))
    assert (cache.num_pages, len(growing._cos_sin["main"])) == (128, 256)
    moves = growing.device.version - version
    assert moves == 6 + 4 + 2  # rows from 16 to 512, pages from 16, positions from 128


def test_the_steps_that_run_are_kept(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was given up and comes again has other buffers than its first graph."""
    monkeypatch.setattr("specrt.models.model._MAX_STEPS", 3)
    captured = list[int]()

    class Counting(Device):
        def _first(self, launch: Callable[[], None]) -> Callable[[], None]:
            captured.append(size)
            return super()._first(launch)

    other = LlamaModel(model.config, model.weights, Counting())
    batch = started(model, [PROMPT])
    other.reserve(1, 16, batch.num_positions, has_logits=True)
    version = other.device.version
    for turn, size in enumerate((1, 2, 3, 1, 4, 1, 5, 2, 4, 1)):
        tree = trees_of([random_tree(size, seed=turn)])
        expected = model.forward(tree, batch).logits.clone()
        assert torch.equal(other.forward(tree, batch).logits, expected)
    assert captured == [1, 2, 3, 4, 5, 2, 4, 1] and other.device.version == version


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_in_chunks(model: LlamaModel, seed: int) -> None:
    """However it is cut: the same keys, values and taps, and logits behind it."""
    text, taps = [*PROMPT, *PROMPT[:130]], (FINAL_TAP, layer_tap(1))
    cuts = sorted({0, *random.Random(seed).sample(range(1, len(text)), 5), len(text)})

    def run(cuts: Sequence[int]) -> tuple[torch.Tensor, ...]:
        cache = model.new_cache(page_size=16)
        other, sequence = cache.open(20), cache.open()
        batch, states = CacheBatch(cache, [sequence]), list[torch.Tensor]()
        for start, stop in pairwise(cuts):
            cache.reserve(sequence, stop)
            cache.reserve(other, stop)  # so that pages of both lie among each other
            for first, piece in model.extend(text[start:stop], batch.update([sequence]), taps):
                assert start + first == sum(len(state) for state in states)
                states.append(torch.cat([piece[tap][0] for tap in taps], dim=1))
        cache.reserve(sequence, len(text) + 8)
        logits = model.forward(trees_of([random_tree(8, seed)]), batch.update([sequence])).logits
        rows = cache.kv[:, :, sequence.pages].flatten(2, 3)[:, :, : len(text)]
        return torch.cat(states), rows, logits.clone()

    for got, expected in zip(run(cuts), run([0, len(text)]), strict=True):
        assert torch.equal(got, expected)


def test_closed_pages_are_used_again_without_a_trace(model: LlamaModel) -> None:
    tree = trees_of([random_tree(8, seed=7)])
    expected = model.forward(tree, started(model, [PROMPT])).logits.clone()
    cache = model.new_cache()
    for text in (PROMPT[::-1], [96] * 200, PROMPT):
        sequence = cache.open(400)
        batch = CacheBatch(cache, [sequence])
        for _ in model.extend(text, batch):
            pass
        got = model.forward(tree, batch).logits.clone()
        cache.close(sequence)
    assert torch.equal(got, expected)


def test_two_caches_do_not_mix(model: LlamaModel) -> None:
    tree = trees_of([random_tree(8, seed=8)])
    prompts = [PROMPT, PROMPT[::-1]]
    batches = [started(model, [prompt]) for prompt in prompts]
    first = [model.forward(tree, batch).logits.clone() for batch in batches]
    assert not torch.equal(first[0], first[1])
    for _ in range(2):  # captured by now
        for batch, expected in zip(batches, first, strict=True):
            assert torch.equal(model.forward(tree, batch).logits, expected)


def test_two_models_of_one_device_do_not_mix(tmp_path: Path) -> None:
    """A drafter of the target's own shape has the same step keys."""
    device, models = Device(), []
    for seed in (0, 1):
        path = tmp_path / str(seed)
        make_checkpoint("llama", path, seed=seed)
        config = ModelConfig.from_directory(path)
        weights = load_weights(path, config, torch.float32)
        models.append(LlamaModel(config, weights, device))
    tree = trees_of([random_tree(8, seed=8)])
    expected = [
        make_model(tmp_path / str(seed)).forward(tree, started(m, [PROMPT])).logits.clone()
        for seed, m in enumerate(models)
    ]
    batches = [started(m, [PROMPT]) for m in models]
    for _ in range(3):
        for m, batch, logits in zip(models, batches, expected, strict=True):
            got = m.forward(tree, batch).logits
            assert torch.equal(got, logits)
            got.fill_(float("nan"))  # or the last round's would still lie there


def test_what_is_asked_for_does_not_change_the_rest(model: LlamaModel) -> None:
    tree, batch = trees_of([random_tree(20, seed=9)]), started(model, [PROMPT])
    logits = model.forward(tree, batch).logits.clone()
    output = model.forward(tree, batch, taps=("layer.2", "layer.0"))
    states = {tap: state.clone() for tap, state in output.taps.items()}
    assert set(states) == {"layer.2", "layer.0"}
    assert torch.equal(output.logits, logits)
    output = model.forward(tree, batch, taps=("layer.0",), has_logits=False)
    assert output.logits.shape == (1, 0, VOCAB)
    assert torch.equal(output.taps["layer.0"], states["layer.0"])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", ["layer.3", "layer.-1", "layer.00", "last", ""])
def test_unknown_taps_are_refused(model: LlamaModel, tap: str) -> None:
    batch = started(model, [PROMPT[:3]])
    words = r"taps: expected 'final', 'logits' or 'layer.0' .. 'layer.2'"
    with pytest.raises(ValueError, match=words):
        model.forward(trees_of([random_tree(2, seed=0)]), batch, taps=("final", tap))


def test_trees_of_more_than_128_nodes_are_refused(model: LlamaModel) -> None:
    batch = started(model, [PROMPT[:3]])
    tokens = torch.zeros(1, 129, dtype=torch.int32)
    model.forward(chain_tree(tokens[:, :128]), batch)
    with pytest.raises(ValueError, match="tree: expected at most 128 nodes, got 129"):
        model.forward(chain_tree(tokens), batch)
