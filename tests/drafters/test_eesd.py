"""EESD: one cache, first layers run once, and bits that must not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specrt.cache import CacheBatch, CachedSequence, KVCache
from specrt.device import Device
from specrt.draft.base import Budget, DraftParams
from specrt.draft.eesd.costs import CostMeter
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.round import Chain, EesdProposal
from specrt.draft.length.control import CONTROLLERS, ControlOptions, ControlRound
from specrt.draft.length.costs import RoundCost
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.models.step import StepRows
from specrt.sampling import SamplingParams
from specrt.tree import MAX_NODES
from specrt.types import SequenceState
from tests.checkpoints import FAMILIES, make_checkpoint, make_exit_checkpoint
from tests.engine.exits import COSTS, make_drafter
from tests.engine.support import make_engine, make_model, prompts, sampled, texts

VOCAB, LAYERS = 97, 4
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
PENALISED = sampled(3, repetition_penalty=1.3, presence_penalty=0.4, top_k=20, min_p=0.02)
SETTINGS = {"greedy": GREEDY, "seed": sampled(1), "penalties": PENALISED}
CHAIN, TREES = None, [DraftParams(top_k=2), DraftParams(depth=4, top_k=5, total_tokens=17)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and exits of it that are right now and then."""
    folder = tmp_path_factory.mktemp("eesd")
    make_checkpoint("llama", folder / "target", num_hidden_layers=LAYERS)
    for number in range(1, LAYERS):
        make_exit_checkpoint(folder / "target", folder / f"exit-{number}", number, noise=0.1)
    make_exit_checkpoint(folder / "target", folder / "perfect", LAYERS - 1)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, folder: Path) -> LlamaModel:
    return make_model(folder / "target", request.param)


@pytest.fixture(scope="module")
def float_model(folder: Path) -> LlamaModel:
    return make_model(folder / "target")


def tau(engine: Engine, asked: list[list[int]], params: SamplingParams = GREEDY) -> float:
    stats = [result.stats for result in engine.generate(asked, params)]
    return 1 + sum(s.num_accepted_tokens for s in stats) / sum(s.num_rounds for s in stats)


# --- output ---------------------------------------------------------------------------------------


# In 16 bits one setting is enough of a quick run.
MORE = [
    pytest.param(torch.bfloat16, name, marks=pytest.mark.slow)
    for name in SETTINGS
    if name != "seed"
]


@pytest.mark.parametrize(
    ("model", "setting"),
    [*((torch.float32, name) for name in SETTINGS), (torch.bfloat16, "seed"), *MORE],
    indirect=["model"],
    ids=str,
)
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_output_is_plain_decoding(model: LlamaModel, folder: Path, kind: str, setting: str) -> None:
    asked, params = prompts(6, VOCAB), SETTINGS[setting]
    expected = texts(make_engine(model).generate(asked, params))
    num_drafted = num_accepted = 0
    for number, max_batch in zip(range(1, LAYERS), (4, 1, 4), strict=True):
        drafter = make_drafter(model, folder / f"exit-{number}", kind)
        results = make_engine(model, drafter, max_batch=max_batch).generate(asked, params)
        assert texts(results) == expected
        num_drafted += sum(result.stats.num_draft_tokens for result in results)
        num_accepted += sum(result.stats.num_accepted_tokens for result in results)
    assert num_drafted > num_accepted > 0


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", TREES, ids=str)
def test_trees(model: LlamaModel, folder: Path, shape: DraftParams, setting: str) -> None:
    asked, params = prompts(6, VOCAB), SETTINGS[setting]
    expected = texts(make_engine(model).generate(asked, params))
    for number in range(1, LAYERS):
        drafter = make_drafter(model, folder / f"exit-{number}")
        engine = make_engine(model, drafter, max_batch=3)
        results = engine.generate(asked, params, shape)
        assert texts(results) == expected
        assert sum(result.stats.num_accepted_tokens for result in results) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    """Biases, norms of queries and keys, tied heads, scaled rotary positions."""
    make_checkpoint(family, tmp_path / "target")
    make_exit_checkpoint(tmp_path / "target", tmp_path / "exit", 2)
    model = make_model(tmp_path / "target")
    asked = prompts(4, VOCAB)
    expected = texts(make_engine(model).generate(asked, GREEDY))
    drafter = make_drafter(model, tmp_path / "exit", "fixed")
    engine = make_engine(model, drafter, max_batch=2)
    assert texts(engine.generate(asked, GREEDY)) == expected
    # This exit is the target's own last layer: only the end of a text cuts a draft short.
    assert tau(engine, asked) > 4.5


def test_sequences_that_need_more_positions_than_those_before(folder: Path) -> None:
    """Of a one-token prompt the drafter's steps are the first to run at all."""
    model = make_model(folder / "target")
    plain = make_engine(make_model(folder / "target"))
    engine = make_engine(model, make_drafter(model, folder / "perfect", "fixed"))
    for wanted in (10, 500):  # a context of 512: rotary tables of 512, then of all 640 rows
        params = SamplingParams(max_new_tokens=wanted, ignore_eos=True)
        result = engine.generate([5], params)
        assert result.token_ids == plain.generate([5], params).token_ids
        assert result.stats.num_accepted_tokens > 0.7 * wanted  # nothing it says is wrong
    assert model._cos_sin["main"] is engine.drafter.exit_model._layer._cos_sin["main"]


def test_a_tree_finds_more_than_a_chain(float_model: LlamaModel, folder: Path) -> None:
    drafter = make_drafter(float_model, folder / "exit-1")
    engine, asked = make_engine(float_model, drafter), prompts(6, VOCAB)

    def accepted(shape: DraftParams) -> int:
        results = engine.generate(asked, GREEDY, shape)
        return sum(result.stats.num_accepted_tokens for result in results)

    chains = accepted(DraftParams(depth=4))
    assert 0 < chains < 0.9 * accepted(DraftParams(depth=4, top_k=6))


def test_perfect_drafts_with_the_targets_noise(float_model: LlamaModel, folder: Path) -> None:
    """Coupled drafts of a perfect exit are what the target draws: all of them are accepted."""
    drafter = make_drafter(float_model, folder / "perfect", "fixed")
    engine, asked = make_engine(float_model, drafter), prompts(4, VOCAB)
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    assert tau(engine, asked, params) == pytest.approx(5.0)
    uncoupled = EesdDrafter(
        drafter.exit_model, ControlOptions(kind="fixed"), is_coupled=False, costs=COSTS
    )
    assert tau(make_engine(float_model, uncoupled), asked, params) < 3.0


# --- one cache ------------------------------------------------------------------------------------


class CountedRows(LlamaModel):
    """Counts the rows that each layer runs; its steps are never captured."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.rows: Counter[int] = Counter()

    def launch_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        rows: StepRows,
        cache: KVCache,
        out: torch.Tensor,
    ) -> None:
        self.rows[index] += hidden.shape[0]
        super().launch_layer(index, hidden, rows, cache, out)


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("shape", [CHAIN, *TREES], ids=str)
def test_first_layers_run_once_for_each_token(
    float_model: LlamaModel, folder: Path, exit_layer: int, shape: DraftParams | None
) -> None:
    counted = CountedRows(float_model.config, float_model.weights, Device(is_eager=True))
    drafter = make_drafter(counted, folder / f"exit-{exit_layer}", "fixed")
    prompt = prompts(6, VOCAB)[-1]
    result = make_engine(counted, drafter).generate(prompt, GREEDY, shape)
    nodes = result.stats.num_draft_tokens + result.stats.num_rounds
    assert result.stats.num_draft_tokens > result.stats.num_rounds
    # Every prompt token but the last, and every tree node, once; drafting nothing twice. Of the
    # prompt the last layer has only keys and values.
    expected = Counter(dict.fromkeys(range(LAYERS), len(prompt) - 1 + nodes))
    expected[LAYERS - 1] = nodes
    assert counted.rows == expected


def recomputed(
    drafter: EesdDrafter, model: LlamaModel, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of both caches ``[L, 2, n, heads, d]`` for tokens run from scratch."""
    target, drafts = model.new_cache(), drafter.exit_model.new_cache()
    batch = CacheBatch(target, [target.open(len(tokens) + MAX_NODES)])
    exits = CacheBatch(drafts, [drafts.open(len(tokens) + MAX_NODES)])
    for _, taps in model.extend(tokens, batch, taps=drafter.taps):
        drafter.exit_model.absorb(taps[drafter.taps[0]][0], exits)
    return rows_of(target, batch.sequences[0]), rows_of(drafts, exits.sequences[0])


def rows_of(cache: KVCache, sequence: CachedSequence) -> torch.Tensor:
    pages = cache.kv[:, :, sequence.pages].flatten(2, 3)
    return pages[:, :, : sequence.length].clone()


@pytest.mark.parametrize("has_trees", [False, True], ids=["chains", "trees"])
def test_both_caches_after_200_random_rounds(
    float_model: LlamaModel, folder: Path, has_trees: bool
) -> None:
    """Drafted, plain and branching rounds at random; then everything is run again from scratch."""
    drafter = make_drafter(float_model, folder / "exit-2", "beta-ts")
    engine = make_engine(float_model, drafter)
    generator = torch.Generator().manual_seed(11)
    shapes = iter_shapes(generator, has_trees)
    propose = drafter.propose
    num_rounds = 0
    found: dict[str, torch.Tensor] = {}

    def random_rounds(states: list[SequenceState], budget: Budget) -> object:
        nonlocal num_rounds
        num_rounds += 1
        if num_rounds == 201:
            (state,) = states
            drafter._catch_up(states)
            assert budget.lower is not None
            found["target"] = rows_of(engine.cache, budget.lower._batch.sequences[0])
            found["exit"] = rows_of(drafter._cache, drafter._drafts[state].cached)
        params = next(shapes)
        return propose(states, Budget(64, RoundCost(), params, budget.lower))

    drafter.propose = random_rounds  # type: ignore[method-assign, assignment]
    params = SamplingParams(max_new_tokens=500, ignore_eos=True, temperature=0.9, seed=2)
    result = engine.generate([5, 6, 7], params)
    assert num_rounds > 201
    tokens = (result.prompt_token_ids + result.token_ids)[: found["target"].shape[2]]
    target, exit_rows = recomputed(drafter, float_model, tokens)
    assert target.equal(found["target"])
    assert exit_rows.equal(found["exit"])


def iter_shapes(generator: torch.Generator, has_trees: bool) -> Iterator[DraftParams]:
    """Now and then the root alone, several times over."""
    while True:
        kind = int(torch.randint(0, 4, (1,), generator=generator))
        depth = int(torch.randint(0, 4, (1,), generator=generator))
        if kind == 0:
            yield DraftParams(total_tokens=1)
        elif kind == 1:
            yield DraftParams()
        else:
            yield DraftParams(depth=depth, top_k=kind if has_trees else 1)


def test_prompts_of_any_length(float_model: LlamaModel, folder: Path) -> None:
    """Prefill comes in pieces of at most 128 tokens, or not at all."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (300,), generator=generator).tolist()
    drafter = make_drafter(float_model, folder / "perfect", "fixed")
    for length in (1, 2, 128, 129, 257, 300):
        result = make_engine(float_model, drafter).generate(ids[:length], GREEDY)
        expected = make_engine(float_model).generate(ids[:length], GREEDY)
        assert result.token_ids == expected.token_ids
        assert result.stats.tau == pytest.approx(5.0)


# --- how long to draft ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in CONTROLLERS if kind != "cost-aware"])
def test_decisions_do_not_depend_on_the_batch(
    float_model: LlamaModel, folder: Path, kind: str
) -> None:
    asked = prompts(6, VOCAB)
    drafter = make_drafter(float_model, folder / "exit-2", kind)
    alone = make_engine(float_model, drafter, max_batch=1).generate(asked, sampled(7))
    together = make_engine(float_model, drafter, max_batch=6).generate(asked, sampled(7))
    for one, two in zip(alone, together, strict=True):
        assert one.stats.accept_lengths == two.stats.accept_lengths
        assert one.stats.num_draft_tokens == two.stats.num_draft_tokens


def test_drafting_that_does_not_pay_stops(float_model: LlamaModel, folder: Path) -> None:
    """A useless exit: the cost-aware rule leaves plain rounds, and the text is the same."""
    useless = folder / "useless"
    make_exit_checkpoint(folder / "target", useless, 1, noise=30.0)
    drafter = make_drafter(float_model, useless, "cost-aware")
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)
    result = make_engine(float_model, drafter).generate([5, 6], params)
    assert result.token_ids == make_engine(float_model).generate([5, 6], params).token_ids
    assert result.stats.num_draft_tokens < 0.15 * result.stats.num_rounds


def test_fixed_lengths_and_caps(float_model: LlamaModel, folder: Path) -> None:
    drafter = make_drafter(float_model, folder / "perfect", "fixed", draft_len=8)
    for shape, expected in (
        (None, 9),
        (DraftParams(depth=3), 4),
        (DraftParams(depth=1), 2),
        (DraftParams(depth=0), 1),
        (DraftParams(depth=5, total_tokens=4), 4),
        (DraftParams(total_tokens=3), 3),
        (DraftParams(total_tokens=1), 1),
    ):
        result = make_engine(float_model, drafter).generate([9, 8, 7], GREEDY, shape)
        assert max(result.stats.accept_lengths) + 1 == expected
    engine = make_engine(float_model, drafter, max_nodes=5)
    assert max(engine.generate([9, 8, 7], GREEDY).stats.accept_lengths) == 4


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (DraftParams(depth=21, top_k=3), "at most 62 drafted nodes, got 21 levels of 3"),
        (DraftParams(top_k=98), "top_k: expected at most the vocabulary 97, got 98"),
        (DraftParams(top_k=63), "at most 62 drafted nodes, got 1 levels of 63"),
    ],
)
def test_shapes_that_do_not_fit(
    float_model: LlamaModel, folder: Path, shape: DraftParams, message: str
) -> None:
    engine = make_engine(float_model, make_drafter(float_model, folder / "exit-1"))
    with pytest.raises(ValueError, match=message):
        engine.stream([1, 2, 3], GREEDY, shape)  # and not when it is asked for a round
    assert engine.generate([1, 2, 3], GREEDY).finish_reason == "length"


def test_more_branches_than_nodes(float_model: LlamaModel, folder: Path) -> None:
    """The first level is cut to what may be verified; it is not left out."""
    drafter = make_drafter(float_model, folder / "perfect", "fixed")
    small = make_engine(float_model, drafter, max_nodes=4)
    large = make_engine(float_model, drafter)
    for engine, shape in (
        (small, DraftParams(top_k=6)),
        (large, DraftParams(top_k=6, total_tokens=4)),
        (large, DraftParams(depth=3, top_k=6, total_tokens=4)),
    ):
        stats = engine.generate([9, 8, 7], GREEDY, shape).stats
        assert stats.accept_lengths[:3] == [1, 1, 1]
        assert stats.num_draft_tokens == 3 * stats.num_rounds


def test_the_context_ends_inside_a_draft(float_model: LlamaModel, folder: Path) -> None:
    prompt = prompts(6, VOCAB)[-1]
    prompt = (prompt * 512)[:490]
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    drafter = make_drafter(float_model, folder / "perfect", "fixed", draft_len=8)
    result = make_engine(float_model, drafter).generate(prompt, params)
    assert result.finish_reason == "context"
    assert result.token_ids == make_engine(float_model).generate(prompt, params).token_ids


def test_everything_is_given_back(float_model: LlamaModel, folder: Path) -> None:
    drafter = make_drafter(float_model, folder / "exit-2")
    engine = make_engine(float_model, drafter, max_batch=2)
    engine.generate(prompts(5, VOCAB), GREEDY)
    stream = engine.stream(prompts(5, VOCAB), GREEDY)
    next(stream)
    stream.close()
    assert drafter._cache.num_free_pages == drafter._cache.num_pages
    assert engine.cache.num_free_pages == engine.cache.num_pages
    assert drafter._drafts == {}


def test_a_proposal_says_what_its_chain_was(float_model: LlamaModel, folder: Path) -> None:
    drafter = make_drafter(float_model, folder / "perfect", "fixed", draft_len=5)
    engine, propose = make_engine(float_model, drafter), drafter.propose
    said: list[Chain | None] = []

    def listen(states: list[SequenceState], budget: Budget) -> EesdProposal:
        proposal = propose(states, budget)
        said.append(proposal.chain)
        return proposal

    drafter.propose = listen  # type: ignore[method-assign, assignment]
    ids = engine.generate([4, 5, 6], SamplingParams(max_new_tokens=7, ignore_eos=True)).token_ids
    first, last = said
    assert first is not None
    assert last is None  # one token was left, the target's own
    assert first.tokens.tolist() == [ids[:5]]
    assert first.scores.shape == (1, 5)
    assert (first.scores < 0).all()
    assert first.evidence.shape == (1, 5, 2)
    engine.generate([4, 5, 6], GREEDY, DraftParams(depth=2, top_k=3))
    assert said[2:] == [None] * len(said[2:])


def test_measured_costs(float_model: LlamaModel, folder: Path) -> None:
    """Without given costs they are measured, and add up to something like a round."""
    drafter = make_drafter(float_model, folder / "exit-2", "fixed")
    drafter._given_costs = None
    assumed = drafter.costs()
    assert assumed.plain_ms() == pytest.approx(1.0)
    assert 0 < assumed.lower < assumed.step < 1
    make_engine(float_model, drafter).generate(prompts(4, VOCAB), GREEDY)
    measured = drafter.costs()
    assert min(vars(measured).values()) >= 0  # a line through times may be level
    assert min(measured.step, measured.lower, measured.verify) > 0
    assert measured.lower < 3 * measured.step
    two = drafter.costs(2)
    assert two.step == pytest.approx(measured.step / 2)
    assert two.verify < measured.verify


def test_plain_rounds_are_looked_at_now_and_then(float_model: LlamaModel, folder: Path) -> None:
    """A run of them at first, and ever rarer ones; the first of a run does not count."""
    meter = CostMeter(make_drafter(float_model, folder / "exit-2").exit_model)
    due = []
    for number in range(500):
        due.append(meter.is_plain_due())
        if due[-1]:
            meter.observe_plain(2.0 if number and due[-2] else 50.0)
        else:
            meter.observe_draft(0.5, 0.2, 0.3)
            meter.observe_verify(3, 1, 3.0)
    runs = [number for number in range(1, 500) if due[number] and not due[number - 1]]
    assert due[:3] == [True] * 3
    assert runs == [35, 102, 233, 492]  # behind 32, 64, 128 and 256 drafted rounds
    assert sum(due) == 3 * (1 + len(runs))
    assert meter.costs(1).plain_ms() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("plain_ms", [1.0, 4.0])
def test_costs_add_up_to_what_was_measured(
    float_model: LlamaModel, folder: Path, plain_ms: float
) -> None:
    """A drafted round's time is that of its parts, wherever plain rounds are on its line."""
    meter = CostMeter(make_drafter(float_model, folder / "exit-2").exit_model)
    for number in range(400):
        if meter.is_plain_due():
            meter.observe_plain(plain_ms)
        else:
            rows = 2 + number % 4
            meter.observe_draft(0.5, 0.2, 0.3)
            meter.observe_verify(rows, 1, 2.0 + 0.25 * (rows - 1))
    costs = meter.costs(1)
    assert costs.plain_ms() == pytest.approx(plain_ms, rel=0.05)
    if plain_ms < 2.0:  # else drafted rounds would seem faster than their parts
        assert costs.round_ms(3, 3) == pytest.approx(0.2 + 3 * 0.5 + 0.3 + 2.75, rel=0.05)


def test_asking_in_vain_brings_a_rest(float_model: LlamaModel, folder: Path) -> None:
    """Where drafting does not pay, most rounds are plain without a question."""
    useless = folder / "useless-2"
    make_exit_checkpoint(folder / "target", useless, 1, noise=30.0)
    drafter = make_drafter(float_model, useless, "cost-aware")
    drafter._given_costs, drafter._weighs_time = None, True
    asked = 0
    ask = drafter._ask

    def counted(*args: object) -> ControlRound:
        nonlocal asked
        asked += 1
        return ask(*args)  # type: ignore[arg-type]

    drafter._ask = counted  # type: ignore[method-assign, assignment]
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)
    result = make_engine(float_model, drafter).generate([5, 6], params)
    assert result.token_ids == make_engine(float_model).generate([5, 6], params).token_ids
    assert asked < 0.4 * result.stats.num_rounds
