"""The one-layer drafters: reference vectors, trees, and bits that must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specrt.builtin import drafter_paths, target_path
from specrt.draft.base import DraftParams
from specrt.draft.fspad.checkpoint import (
    ARCHS,
    read_checkpoint,
    reduce_vocabulary,
    write_checkpoint,
)
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.weights import folding_pays
from specrt.models.model import LlamaModel
from specrt.ops import gumbel_noise
from specrt.sampling import SamplingParams
from specrt.tree import MAX_NODES
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import VOCAB, Rig, budget, make_drafter
from tests.engine.support import make_engine, make_model, prompts, sampled, texts
from tests.golden.check import check, token_paths
from tests.trees import settled

GOLDEN = [
    Path(__file__).parents[1] / "golden" / f"{name}.safetensors" for name in ("eagle2", "fspad")
]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
PENALISED = sampled(3, repetition_penalty=1.3, presence_penalty=0.4, top_k=20, min_p=0.02)
SETTINGS = {"greedy": GREEDY, "seed": sampled(1), "penalties": PENALISED}
SHAPES = [
    None,
    DraftParams(depth=1, top_k=1, total_tokens=2),
    DraftParams(depth=4, top_k=2, total_tokens=8),
    DraftParams(depth=6, top_k=10, total_tokens=60),
    DraftParams(depth=7, top_k=20, total_tokens=128),
]


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reference_vectors(path: Path, is_folded: bool) -> None:
    report = check(path, is_folded=is_folded)
    assert report.is_good, report
    assert report.arch == path.stem
    assert all(size == 26 for _, size in report.trees.values())


@pytest.fixture(scope="module")
def drafters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafters")
    for arch in ARCHS:
        make_draft_checkpoint(checkpoint, folder / arch, arch)
    return {arch: folder / arch for arch in ARCHS}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, checkpoint: Path) -> LlamaModel:
    return make_model(checkpoint, request.param)


CASES = [("fspad", setting) for setting in SETTINGS]
CASES += [(arch, "seed") for arch in ARCHS if arch != "fspad"]
IN_16_BITS = ("fspad", "seed")
"""The one of them whose weights are so in the quick tests too."""


def _cases() -> Iterator[object]:
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES:
            is_slow = dtype == torch.bfloat16 and case != IN_16_BITS
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(dtype, *case, marks=marks, id=f"{dtype}-{'-'.join(case)}")


@pytest.mark.parametrize(("model", "arch", "setting"), list(_cases()), indirect=["model"])
def test_bits_do_not_change(
    model: LlamaModel, drafters: dict[str, Path], arch: str, setting: str
) -> None:
    params = SETTINGS[setting]
    expected = texts(make_engine(model, max_batch=1).generate(prompts(6, VOCAB), params))
    drafter = make_drafter(model, drafters[arch])
    for max_batch, shapes in ((4, SHAPES), (1, SHAPES[-1:])):
        engine = make_engine(model, drafter, max_batch=max_batch, max_nodes=MAX_NODES)
        for shape in shapes:
            results = engine.generate(prompts(6, VOCAB), params, shape)
            assert texts(results) == expected, (max_batch, shape)
            stats = [result.stats for result in results]
            assert shape is None or sum(s.num_draft_tokens for s in stats) > 0
            if shape is not None and (shape.total_tokens or 0) >= 60:
                # Random drafters are right now and then, or this would test nothing.
                assert sum(s.num_accepted_tokens for s in stats) > 0
    assert drafter._cache.num_free_pages == drafter._cache.num_pages


def test_trees_have_the_shape_that_was_asked_for(
    checkpoint: Path, drafters: dict[str, Path]
) -> None:
    model = make_model(checkpoint)
    rig = Rig(model, make_drafter(model, drafters["fspad"]), [(3 * i) % VOCAB for i in range(50)])
    for depth, top_k, total in [(1, 4, 5), (3, 3, 10), (6, 10, 60), (13, 10, 64), (7, 20, 128)]:
        shape = budget(depth=depth, top_k=top_k, total_tokens=total)
        tree = rig.fresh(40, shape)
        assert tree.num_nodes.tolist() == [min(total, 1 + top_k + (depth - 1) * top_k**2)]
        assert tree.draft_tokens.shape == (1, total)
        assert int(settled(tree).depth.max()) <= depth
        parents = tree.parents[0].tolist()
        assert all(parent < node for node, parent in enumerate(parents))
        children = [parents.count(node) for node in range(total)]
        assert max(children) <= top_k


def test_wider_and_deeper_than_fits_is_refused(checkpoint: Path, drafters: dict[str, Path]) -> None:
    model = make_model(checkpoint)
    engine = make_engine(model, make_drafter(model, drafters["fspad"]))
    for shape, message in [
        (DraftParams(depth=14, top_k=10), "depth, top_k: expected depth <= 16 and at most 128"),
        (DraftParams(depth=17, top_k=1), "expanded below the root, got 17 and 1"),
        (DraftParams(depth=1, top_k=98), "top_k: expected at most the draft vocabulary 97, got 98"),
        (DraftParams(total_tokens=65), "total_tokens: expected at most the engine's max_nodes, 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.stream([1, 2, 3], GREEDY, shape)  # and not when it is asked for a round
        assert engine.cache.num_free_pages == engine.cache.num_pages
    with pytest.raises(ValueError, match="depth: expected None or an int in 0..127, got -1"):
        DraftParams(depth=-1)
    with pytest.raises(ValueError, match="depth: expected None or an int in 0..127, got True"):
        DraftParams(depth=True)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_coupled_trees_hold_what_the_target_would_draw_from_the_draft_law(
    checkpoint: Path, drafters: dict[str, Path], options: dict[str, float]
) -> None:
    """The first child is the draft law's own draw with the target's noise at that position."""
    model = make_model(checkpoint)
    drafter = make_drafter(model, drafters["fspad"])
    rig = Rig(model, drafter, [(11 * i) % VOCAB for i in range(60)])
    shape = budget(depth=1, top_k=1, total_tokens=2)
    drawn = set()
    for seed in range(40):
        tree = rig.fresh(50, shape, seed=seed, temperature=0.9, **options)
        law = draft_logits(drafter) / 0.9
        if "top_k" in options:
            law[law < law.topk(7).values[-1]] = -torch.inf
        elif "top_p" in options:
            order = law.argsort(descending=True)
            before = law.softmax(-1)[order].cumsum(-1) - law.softmax(-1)[order]
            law[order[before >= 0.6]] = -torch.inf
        elif "min_p" in options:
            law[law.softmax(-1) < 0.2 * law.softmax(-1).max()] = -torch.inf
        wanted = int((law + gumbel_noise(seed, 50, VOCAB)).argmax())
        assert tree.draft_tokens[0, 1] == wanted
        drawn.add(wanted)
    assert len(drawn) > 2


def draft_logits(drafter: FspadDrafter) -> torch.Tensor:
    """Logits behind the last pair, as the last round left them."""
    buffers = list(drafter._rounds._values.values())[-1]
    return buffers._work.logits[0].clone()


def test_coupling_changes_trees_not_text(model: LlamaModel, drafters: dict[str, Path]) -> None:
    params = sampled(5, ignore_eos=True)
    shape = DraftParams(depth=5, top_k=6, total_tokens=48)
    outcomes = [
        make_engine(model, make_drafter(model, drafters["fspad"], is_coupled=flag)).generate(
            prompts(6, VOCAB), params, shape
        )
        for flag in (False, True)
    ]
    assert texts(outcomes[0]) == texts(outcomes[1])
    taus = [[result.stats.tau for result in results] for results in outcomes]
    assert taus[0] != taus[1]


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_drafts_the_same(checkpoint: Path, drafters: dict[str, Path], arch: str) -> None:
    model = make_model(checkpoint)
    ids = [(13 * i * i) % VOCAB for i in range(100)]
    shape = budget(depth=4, top_k=4, total_tokens=24)
    plain, folded = (make_drafter(model, drafters[arch], fold=flag) for flag in (False, True))
    for length in (2, 30, 90):
        trees = [token_paths(Rig(model, d, ids).fresh(length, shape)) for d in (plain, folded)]
        assert trees[0] == trees[1]
    weights = folded.layer.weights
    assert plain.layer.weights.table_bytes == 0
    wide = 112 if weights.sample_up is not None else 0
    assert weights.table_bytes == VOCAB * (64 + wide) * 4
    assert weights.step_bytes < plain.layer.weights.step_bytes


def test_graphs_change_no_tree(checkpoint: Path, drafters: dict[str, Path]) -> None:
    ids = [(13 * i * i) % VOCAB for i in range(100)]
    shape = budget(depth=4, top_k=4, total_tokens=24)
    rigs = []
    for has_graphs in (True, False):
        model = make_model(checkpoint, has_graphs=has_graphs)
        rigs.append(Rig(model, make_drafter(model, drafters["fspad"]), ids))
    for length in (2, 30, 31, 32, 90):
        first, second = (rig.fresh(length, shape) for rig in rigs)
        assert torch.equal(first.draft_tokens, second.draft_tokens)
        assert torch.equal(first.parents, second.parents)


def test_rounds_of_more_kinds_than_are_kept(
    checkpoint: Path, drafters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers come and go one by one; no graph is dropped, and none runs on another's buffers."""
    monkeypatch.setattr("specrt.draft.fspad.drafter._MAX_ROUNDS", 2)
    model, ids = make_model(checkpoint), [(13 * i * i) % VOCAB for i in range(100)]
    few = make_drafter(model, drafters["fspad"])
    monkeypatch.undo()
    few_rig, rig = (Rig(model, d, ids) for d in (few, make_drafter(model, drafters["fspad"])))
    for one in (few_rig, rig):  # caches and the rotary table have grown
        one.fresh(90, budget(depth=4, top_k=2, total_tokens=9))
    version = model.device.version
    for top_k in (2, 3, 2, 4, 2, 3, 4):
        shape = budget(depth=3, top_k=top_k, total_tokens=9)
        first, second = (one.fresh(30, shape) for one in (few_rig, rig))
        assert torch.equal(first.draft_tokens, second.draft_tokens)
        assert torch.equal(first.parents, second.parents)
        assert len(few._rounds) <= 2
    assert model.device.version == version


def test_near_the_context_limit(model: LlamaModel, drafters: dict[str, Path]) -> None:
    """Trees may not reach past the last token that can still come."""
    limit = model.config.max_positions
    prompt = [(3 * i) % VOCAB for i in range(limit - 9)]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    plain = make_engine(model).generate(prompt, params)
    engine = make_engine(model, make_drafter(model, drafters["fspad"]))
    result = engine.generate(prompt, params, DraftParams(depth=6, top_k=10, total_tokens=60))
    assert result.token_ids == plain.token_ids
    assert result.finish_reason == "context"
    assert len(result.stats.proposed_by_depth) <= 8


def test_a_drafter_that_says_nan_changes_nothing(
    checkpoint: Path, drafters: dict[str, Path]
) -> None:
    """A drafter's own NaN costs speed, nothing else."""
    model = make_model(checkpoint)
    drafter = make_drafter(model, drafters["fspad"])
    drafter.layer.weights.down_predict.fill_(float("nan"))
    expected = texts(make_engine(model).generate(prompts(3, VOCAB), GREEDY))
    for shape in SHAPES:
        results = make_engine(model, drafter, max_nodes=128).generate(
            prompts(3, VOCAB), GREEDY, shape
        )
        assert texts(results) == expected


def test_folding_by_itself_where_it_spares_enough(tmp_path: Path) -> None:
    """The bundled drafter spares 9 % of a step's bytes; with a smaller head the share is larger."""
    target = make_model(target_path())
    config, tensors = read_checkpoint(drafter_paths()["fspad"], target.config)
    counts = torch.arange(target.config.vocab_size)
    write_checkpoint(tmp_path, *reduce_vocabulary(config, tensors, counts, 256))
    for path, is_folded in [(drafter_paths()["fspad"], False), (tmp_path, True)]:
        weights = make_drafter(target, path).layer.weights
        assert (weights.table_bytes > 0) == is_folded
    small = target.weights.arena.nbytes // 100
    assert not folding_pays(make_drafter(target, tmp_path, fold=False).layer.weights, small)
