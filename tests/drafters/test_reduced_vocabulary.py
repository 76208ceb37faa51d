"""Drafters whose head covers the most frequent tokens: the same text, from a smaller choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import specrt
from specrt.cache import CacheBatch
from specrt.draft.base import Budget, DraftParams
from specrt.draft.fspad.checkpoint import (
    ARCHS,
    TOKEN_IDS,
    read_checkpoint,
    reduce_vocabulary,
    write_checkpoint,
)
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import load_drafter
from specrt.draft.length.costs import RoundCost
from specrt.models.model import LlamaModel
from specrt.ops import gumbel_noise
from specrt.sampling import SamplingParams, sampling_row
from specrt.tree import MAX_NODES
from specrt.types import Proposal, SequenceState
from tests.checkpoints import make_checkpoint, make_draft_checkpoint
from tests.cli.test_cli import expect_one_line, run, write_tokenizer
from tests.engine.support import make_engine, prompts, sampled, texts
from tests.golden.check import token_paths

VOCAB = 97
SIZES = (1, 3, 40, VOCAB)
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True)
SETTINGS = {"greedy": GREEDY, "seed": sampled(1, ignore_eos=True)}
IDS = [(13 * i * i) % VOCAB for i in range(100)]


@pytest.fixture(scope="module")
def said(model: LlamaModel) -> dict[str, list[list[int]]]:
    """What plain decoding says."""
    return {
        name: texts(make_engine(model, max_batch=1).generate(prompts(6, VOCAB), params))
        for name, params in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def drafters(
    target: Path,
    said: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """``arch/full`` and ``arch/R`` for each size R, by how often the target says a token."""
    folder = tmp_path_factory.mktemp("drafters")
    spoken = torch.tensor([token for text in said["greedy"] for token in text])
    counts = spoken.bincount(minlength=VOCAB)
    for arch in ARCHS:
        make_draft_checkpoint(target, folder / arch / "full", arch)
        config, tensors = read_checkpoint(folder / arch / "full")
        for size in SIZES:
            reduced = reduce_vocabulary(config, tensors, counts, size)
            write_checkpoint(folder / arch / str(size), *reduced)
    return folder


class Recording(FspadDrafter):
    """Keeps every token it proposes."""

    proposed: set[int]

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        tree = super().propose(states, budget)
        for row, count in zip(tree.draft_tokens.tolist(), tree.num_nodes.tolist(), strict=True):
            self.proposed.update(row[1:count])
        return tree


def make_drafter(model: LlamaModel, path: Path, *, fold: bool | None = None) -> Recording:
    options = DrafterOptions(fold=fold)
    loaded = load_drafter(path, model, None, options)
    assert isinstance(loaded, FspadDrafter)
    drafter = Recording(loaded.layer)
    drafter.proposed = set()
    return drafter


def tree_at(
    model: LlamaModel, drafter: FspadDrafter, shape: DraftParams, temperature: float = 0.0
) -> Proposal:
    """What it proposes behind the first 60 of ``IDS``."""
    cache = model.new_cache()
    batch = CacheBatch(cache, [cache.open(len(IDS) + MAX_NODES)])
    parts = [taps["final"][0].clone() for _, taps in model.extend(IDS[:59], batch, taps=("final",))]
    row = sampling_row(SamplingParams(temperature=temperature, seed=5), 60)
    state = SequenceState(IDS[:60], 60, 400, 5, temperature, row)
    drafter.start(state)
    drafter.prefill(state, 0, {"final": torch.cat(parts)[None]})
    tree = drafter.propose([state], Budget(MAX_NODES, RoundCost(), shape))
    drafter.finish(state)
    return tree


# --- the text -------------------------------------------------------------------------------------

CASES = [("fspad", size) for size in SIZES] + [(arch, 40) for arch in ARCHS if arch != "fspad"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("arch", "size"), CASES)
def test_bits_do_not_change_and_no_other_token_is_proposed(
    model: LlamaModel,
    drafters: Path,
    said: dict[str, list[list[int]]],
    arch: str,
    size: int,
    setting: str,
) -> None:
    drafter = make_drafter(model, drafters / arch / str(size))
    kept = set(read_checkpoint(drafters / arch / str(size))[1][TOKEN_IDS].tolist())
    engine = make_engine(model, drafter, max_batch=4, max_nodes=MAX_NODES)
    accepted = 0
    width = min(size, 10)
    for shape in (None, DraftParams(), DraftParams(6, width, 60), DraftParams(depth=3)):
        results = engine.generate(prompts(6, VOCAB), SETTINGS[setting], shape)
        assert texts(results) == said[setting], shape
        accepted += sum(result.stats.num_accepted_tokens for result in results)
    assert drafter.proposed and drafter.proposed <= kept
    assert size < 40 or accepted > 0  # or this would test nothing
    assert drafter._cache.num_free_pages == drafter._cache.num_pages


@pytest.mark.parametrize("arch", ARCHS)
def test_load_takes_it_from_its_directory(target: Path, drafters: Path, arch: str) -> None:
    expected = texts(specrt.load(target).generate(prompts(4, VOCAB), GREEDY))
    for fold in (False, True):
        engine = specrt.load(target, drafters / arch / "40", fold=fold)
        assert texts(engine.generate(prompts(4, VOCAB), GREEDY, DraftParams(4, 4))) == expected
        assert engine.drafter.layer.weights.head.shape == (40, 64)


# --- the trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("arch", ARCHS)
def test_all_tokens_make_the_unreduced_tree(
    model: LlamaModel, drafters: Path, arch: str, temperature: float, fold: bool
) -> None:
    shape = DraftParams(depth=5, top_k=8, total_tokens=50)
    full, same = (
        make_drafter(model, drafters / arch / name, fold=fold) for name in ("full", str(VOCAB))
    )
    trees = [tree_at(model, drafter, shape, temperature) for drafter in (full, same)]
    assert token_paths(trees[0]) == token_paths(trees[1])
    for name in ("draft_tokens", "parents"):
        assert torch.equal(getattr(trees[0], name), getattr(trees[1], name))
    head = model.weights.lm_head.data_ptr()
    assert [d.layer.weights.head.data_ptr() for d in (full, same)] == [head, head]  # no copy


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_children_are_the_best_of_those_kept(
    model: LlamaModel, drafters: Path, temperature: float
) -> None:
    """Ranked as the whole head ranks them, with the noise the target draws with."""
    full, reduced = (make_drafter(model, drafters / "fspad" / name) for name in ("full", "40"))
    shape = DraftParams(depth=1, top_k=6, total_tokens=7)
    everything = tree_at(model, full, shape, temperature)
    logits = next(iter(full._rounds._values.values()))._work.logits[0].clone()
    if temperature > 0:
        logits = logits / temperature + gumbel_noise(5, 60, VOCAB)
    ids = reduced.layer.weights.token_ids
    assert ids is not None
    expected = ids[logits[ids.long()].topk(6).indices].tolist()
    tree = tree_at(model, reduced, shape, temperature)
    if temperature > 0:  # the first is the draw; the others follow in order of probability
        assert tree.draft_tokens[0, 1] == expected[0]
    else:
        assert tree.draft_tokens[0, 1:].tolist() == expected
    assert tree.draft_tokens.tolist() != everything.draft_tokens.tolist()


def test_more_children_than_tokens_are_refused_only_if_asked_for(
    target: Path, drafters: Path
) -> None:
    engine = specrt.load(target, drafters / "fspad" / "3")
    with pytest.raises(ValueError, match="top_k: expected at most the draft vocabulary 3, got 4"):
        engine.generate([1, 2, 3], GREEDY, DraftParams(top_k=4))
    for shape in (DraftParams(depth=3), DraftParams(total_tokens=9), DraftParams(top_k=3)):
        assert engine.generate([1, 2, 3], GREEDY, shape).stats.num_draft_tokens > 0


# --- reduce_vocabulary ----------------------------------------------------------------------------


def test_ties_go_to_the_lower_id_and_the_input_stays(drafters: Path) -> None:
    config, tensors = read_checkpoint(drafters / "fspad" / "full")
    before = dict(tensors)
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    counts[[50, 20, 96, 3]] = torch.tensor([7, 7, 9, 1])
    for size, ids in [
        (1, [96]),
        (2, [20, 96]),
        (3, [20, 50, 96]),
        (6, [0, 1, 3, 20, 50, 96]),
        (VOCAB, list(range(VOCAB))),
    ]:
        for given in (counts, counts.double() / 25):
            reduced, result = reduce_vocabulary(config, tensors, given, size)
            assert result[TOKEN_IDS].dtype == torch.int32
            assert result[TOKEN_IDS].tolist() == ids
            assert reduced.draft_vocab_size == size
            assert {key: result[key] for key in before} == before
    assert tensors == before and config.draft_vocab_size is None


def test_counts_and_sizes_that_do_not_fit(drafters: Path) -> None:
    config, tensors = read_checkpoint(drafters / "fspad" / "full")
    counts = torch.ones(VOCAB)
    for size in (0, -1, 98):
        with pytest.raises(ValueError, match=rf"size: expected 1\.\.97, got {size}"):
            reduce_vocabulary(config, tensors, counts, size)
    for wrong in (torch.ones(96), torch.ones(1, 97), torch.full((97,), torch.nan)):
        with pytest.raises(ValueError, match=r"counts: expected \[97\] numbers, got \["):
            reduce_vocabulary(config, tensors, wrong, 5)


def test_a_list_that_does_not_fit_its_target(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, drafters: Path
) -> None:
    make_checkpoint("llama", tmp_path / "other", vocab_size=80)
    write_tokenizer(tmp_path / "other")
    args = ("--target", str(tmp_path / "other"), "--prompt", "hi")
    done = run(capsys, "generate", *args, "--drafter", str(drafters / "fspad" / "3"))
    expect_one_line(done, "vocab_size: the target has 80, this drafter 97")
