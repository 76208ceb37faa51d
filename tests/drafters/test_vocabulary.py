"""Small models whose tables are padded otherwise than the target's, or of another tokenizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
import torch

import specrt
from specrt.draft.base import Budget
from specrt.draft.length.costs import RoundCost
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.draft.small_model.vocabulary import check_vocabulary
from specrt.types import CheckpointError, SequenceState
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint
from tests.cli.test_cli import write_tokenizer
from tests.engine.support import make_engine, make_model

SIZES = (97, 100, 128, 160)  # rows of tables for the 97 tokens there are
TARGET = 128
PROMPTS = [[5], [127, 3, 126, 8, 125], [*range(2, 60), 110, 120]]
BUDGET = Budget(64, RoundCost())


def replace_embedding(table: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = table


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One model with tables of each size; what a larger one adds it would say most of all."""
    folder = tmp_path_factory.mktemp("models")
    model = make_checkpoint("qwen2", folder / "whole", vocab_size=TARGET, eos_token_id=1)
    exact = model.model.embed_tokens.weight.detach()
    rows = torch.cat([exact, 20 * exact[: max(SIZES) - TARGET]])
    for size in SIZES:
        path = folder / str(size)
        copytree(folder / "whole", path)
        edit_config(path, vocab_size=size)
        edit_tensors(path, partial(replace_embedding, rows[:size].clone()))
        write_tokenizer(path)
    return {size: folder / str(size) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_text_is_the_targets(models: dict[int, Path], size: int, temperature: float) -> None:
    params = specrt.SamplingParams(
        max_new_tokens=30, temperature=temperature, seed=3, ignore_eos=True
    )
    expected = specrt.load(models[TARGET]).generate(PROMPTS, params)
    assert any(token >= 97 for result in expected for token in result.token_ids)
    engine = specrt.load(models[TARGET], models[size])
    results = engine.generate(PROMPTS, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    accepted = sum(result.stats.num_accepted_tokens for result in results)
    assert accepted > 0
    if size >= TARGET and temperature == 0:  # then the best token of both is the target's
        assert accepted > 0.7 * 3 * params.max_new_tokens


@pytest.mark.parametrize("size", [100, 160])
def test_only_tokens_that_both_have_are_proposed(models: dict[int, Path], size: int) -> None:
    drafter = SmallModelDrafter(make_model(models[size]), 3, 4, vocab_size=TARGET)
    for prompt in PROMPTS:
        state = SequenceState(list(prompt), len(prompt), 400, 0, 0.0)
        drafter.start(state)
        tree = drafter.propose([state], BUDGET)
        drafter.finish(state)
        assert int(tree.draft_tokens[0, 0]) == prompt[-1]  # the root is the target's own word
        assert int(tree.draft_tokens[0, 1:].max()) < min(size, TARGET)


@pytest.mark.parametrize("size", [100, 160])
def test_sampled_drafts_hand_over_a_law_of_the_targets_size(
    models: dict[int, Path], size: int
) -> None:
    drafter = SmallModelDrafter(make_model(models[size]), 4, is_sampled=True, vocab_size=TARGET)
    state = SequenceState([5, 127, 8], 3, 400, 7, 0.8)
    drafter.start(state)
    tree = drafter.propose([state], BUDGET)
    drafter.finish(state)
    law = tree.draft_probs
    assert law is not None and law.shape == (1, 5, TARGET)
    assert bool((law[0, :, size:] == 0).all())
    torch.testing.assert_close(law[0, :4].sum(-1), torch.ones(4))
    assert bool((law[0, :4].gather(1, tree.draft_tokens[0, 1:, None].long()) > 0).all())
    params = specrt.SamplingParams(max_new_tokens=20, temperature=0.8, seed=1, ignore_eos=True)
    engine = make_engine(make_model(models[TARGET]), drafter)
    results = engine.generate(PROMPTS, params)
    assert all(len(result.token_ids) == 20 for result in results)


def test_one_that_fell_behind_past_its_table(models: dict[int, Path]) -> None:
    """Known tokens are run in pieces then, unknown ones among them."""
    drafter = SmallModelDrafter(make_model(models[97]), 3, 2, vocab_size=TARGET)
    state = SequenceState([5], 1, 500, 0, 0.0)
    drafter.start(state)
    drafter.propose([state], BUDGET)
    state.token_ids += [(i * i) % TARGET for i in range(200)]
    tree = drafter.propose([state], BUDGET)
    fresh = SmallModelDrafter(make_model(models[97]), 3, 2, vocab_size=TARGET)
    other = SequenceState([min(t, 96) for t in state.token_ids], 201, 500, 0, 0.0)
    fresh.start(other)
    assert torch.equal(tree.draft_tokens[:, 1:], fresh.propose([other], BUDGET).draft_tokens[:, 1:])


# --- whose tokenizer ------------------------------------------------------------------------------


def edit_tokenizer(path: Path, **tokens: int) -> None:
    file = path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] |= tokens
    file.write_text(json.dumps(data))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with one tokenizer, written as two different files."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name)
    edit_tokenizer(tmp_path / "small")
    return tmp_path / "small", tmp_path / "large"


def test_tokenizers_are_compared_and_not_files(pair: tuple[Path, Path]) -> None:
    small, large = pair
    files = [(path / "tokenizer.json").read_bytes() for path in pair]
    assert files[0] != files[1]
    check_vocabulary(small, 97, large, 128)
    edit_tokenizer(small, more=100)  # one that the target lacks
    check_vocabulary(small, 160, large, 128)


def test_special_tokens_may_be_named_otherwise(pair: tuple[Path, Path]) -> None:
    small, large = pair
    file = small / "tokenizer.json"
    file.write_text(file.read_text().replace("</s>", "<|end|>"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (small / name).exists():
            text = (small / name).read_text()
            (small / name).write_text(text.replace("</s>", "<|end|>"))
    check_vocabulary(small, 97, large, 128)


@pytest.mark.parametrize("sizes", [(97, 97), (97, 128)])
def test_another_tokenizer_is_refused_whatever_the_sizes(
    pair: tuple[Path, Path], sizes: tuple[int, int]
) -> None:
    small, large = pair
    edit_tokenizer(small, a=68, b=67)  # they change places
    with pytest.raises(
        CheckpointError, match=r"small/tokenizer.json: .*: token 67 is 'b' here and 'a' in .*large"
    ):
        check_vocabulary(small, sizes[0], large, sizes[1])


def test_without_a_tokenizer_sizes_must_be_equal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for target in (pair[1], None):
        check_vocabulary(tmp_path, 128, target, 128)
        with pytest.raises(CheckpointError, match="vocabulary of 128, got 97"):
            check_vocabulary(tmp_path, 97, target, 128)
