"""Edited logits: what is said is what plain Python, token by token, says under the same edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from specrt.accept import accept, logprobs_of
from specrt.cache import CacheBatch
from specrt.draft.base import Budget, Drafter, DraftParams, EmptyDrafter
from specrt.draft.length.costs import RoundCost
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.small_model.drafter import SmallModelDrafter
from specrt.engine import head_by_need
from specrt.engine.editor import BadWords, Editor, Row
from specrt.engine.editors import Editors
from specrt.engine.request import Request
from specrt.engine.results import GenerationResult
from specrt.engine.walks import AllLogits, Edits, History, walk
from specrt.models.model import LlamaModel
from specrt.ops.tree_accept import gumbel_noise
from specrt.sampling import SamplingParams, SamplingTable
from specrt.tree import chain_tree
from specrt.types import DraftTree, Proposal, RequestHandle, SequenceState
from tests.engine.support import LetterTokenizer, RandomTreeDrafter, make_engine, prompts, texts

VOCAB = 97
ASKED = prompts(4, VOCAB)
LENGTH = 20
SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=LENGTH),
    "seeded": SamplingParams(max_new_tokens=LENGTH, temperature=0.9, seed=5),
}
Edit = Callable[[list[int], list[int], torch.Tensor], torch.Tensor]
"""Of a prompt, an output and a row."""


# --- the oracle -----------------------------------------------------------------------------------


def next_logits(model: LlamaModel, ids: Sequence[int]) -> torch.Tensor:
    """``[V]`` behind a text, in a cache of its own."""
    cache = model.new_cache()
    batch = CacheBatch(cache, [cache.open(len(ids) + 1)])
    for _ in model.extend(ids[:-1], batch):
        pass
    root = torch.tensor([ids[-1:]], dtype=torch.int32)
    return model.forward(chain_tree(root), batch).logits[0, 0].clone()


def decoded(
    model: LlamaModel, prompt: list[int], params: SamplingParams, edit: Edit, stops: set[int]
) -> list[int]:
    """Token by token, as the law says."""
    output: list[int] = []
    while len(output) < params.max_new_tokens and not stops.intersection(output):
        row = edit(prompt, output, next_logits(model, prompt + output))
        if params.temperature:
            position = len(prompt) + len(output)
            row = row / params.temperature + gumbel_noise(params.seed or 0, position, VOCAB)
        output.append(int(row.argmax()))
    return output


def spelled(word: str) -> list[int]:
    return LetterTokenizer().encode(word)


def edit_of(params: SamplingParams, stops: set[int]) -> Edit:
    """The edits of a request, each written down as its option says."""
    words = [spelled(text) for word in params.bad_words or () for text in (word, " " + word)]

    def edit(prompt: list[int], output: list[int], row: torch.Tensor) -> torch.Tensor:
        if params.logits_processor is not None:
            row = params.logits_processor(prompt + output, row)
        for token in range(VOCAB):
            is_bad = any([*output, token][-len(word) :] == word for word in words)
            is_early = len(output) < params.min_new_tokens and token in stops
            allowed = params.allowed_token_ids
            if is_bad or is_early or (allowed is not None and token not in allowed):
                row[token] = -math.inf
        return row

    return edit


# --- what is asked --------------------------------------------------------------------------------


def shift(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    """Depends on all tokens, and writes to what it is given."""
    row += 2.0 * torch.roll(row, sum(ids) % 7 + 1)
    ids.clear()
    return row


def cases(plain: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
    """Options that bite, by what is said without them."""
    words = ["".join(chr(32 + t) for t in ids[i : i + 2]) for ids in plain for i in (1, 4, 9)]
    stops = sorted({ids[3] for ids in plain})
    least = {"min_new_tokens": 9, "stop_token_ids": stops}
    allowed = {"allowed_token_ids": sorted({t for ids in plain for t in ids if t % 3} | {2})}
    return {
        "least": least,
        "words": {"bad_words": [word.strip() or "zz" for word in words]},
        "allowed": allowed,
        "processor": {"logits_processor": shift},
        "all": {**least, **allowed, "bad_words": ["ab"], "logits_processor": shift},
    }


CASES = ["least", "words", "allowed", "processor", "all"]


class Plain:
    """What is said without a drafter, alone: unedited, and edited by the oracle."""

    def __init__(self, model: LlamaModel) -> None:
        self.said = {
            name: make_engine(model, max_batch=1).generate(ASKED, params)
            for name, params in SAMPLINGS.items()
        }
        self._model = model
        self._edited: dict[tuple[str, str], list[list[int]]] = {}

    def params(self, sampling: str, case: str) -> SamplingParams:
        return replace(SAMPLINGS[sampling], **cases(texts(self.said[sampling]))[case])

    def edited(self, sampling: str, case: str) -> list[list[int]]:
        if (sampling, case) not in self._edited:
            params = self.params(sampling, case)
            stops = {2, *(params.stop_token_ids or ())}
            edit = edit_of(params, stops)
            self._edited[sampling, case] = [
                decoded(self._model, prompt, params, edit, stops) for prompt in ASKED
            ]
        return self._edited[sampling, case]


@pytest.fixture(scope="module")
def plain(model: LlamaModel) -> Plain:
    return Plain(model)


class EagerLookup(PromptLookupDrafter):
    """Drafts whatever it costs."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        return super().propose(states, Budget(budget.max_nodes, RoundCost(slope=0.0)))


def trees(answers: Sequence[list[int]], size: int, hit_rate: float = 0.8) -> RandomTreeDrafter:
    known = {tuple(p): answer for p, answer in zip(ASKED, answers, strict=True)}
    return RandomTreeDrafter(known, VOCAB, size, hit_rate)


# --- equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("case", CASES)
def test_edited_texts_are_the_oracles(
    model: LlamaModel,
    plain: Plain,
    monkeypatch: pytest.MonkeyPatch,
    sampling: str,
    case: str,
) -> None:
    """With right trees, with garbage, by need, beside neighbours whose text stays."""
    params, expected = plain.params(sampling, case), plain.edited(sampling, case)
    unedited = texts(plain.said[sampling])
    assert expected != unedited, "a case that bites"
    assert texts(make_engine(model, max_batch=2).generate(ASKED, params)) == expected
    for size, drafter in ((24, trees(expected, 24)), (6, trees(unedited, 6, 0.5))):
        for least_bytes in (head_by_need._LEAST_BYTES, 0):
            monkeypatch.setattr(head_by_need, "_LEAST_BYTES", least_bytes)
            engine = make_engine(model, drafter, max_batch=3, max_nodes=size)
            results = engine.generate(ASKED, [params, SAMPLINGS[sampling]] * 2)
            wanted = [expected[0], unedited[1], expected[2], unedited[3]]
            assert texts(results) == wanted, (size, least_bytes)
            if size == 24:
                assert sum(result.stats.num_accepted_tokens for result in results[::2]) > 4
    assert texts(make_engine(model, EagerLookup()).generate(ASKED, params)) == expected


def test_a_sequence_that_gives_way_goes_on_as_before(model: LlamaModel, plain: Plain) -> None:
    params, expected = plain.params("seeded", "all"), plain.edited("seeded", "all")
    preempted: list[Request] = []
    engine = make_engine(model, trees(expected, 12), max_batch=4, max_cached_tokens=256)
    scheduler = engine._core.scheduler
    inner = scheduler.preempt
    scheduler.preempt = lambda request: (preempted.append(request), inner(request))[1]  # type: ignore[method-assign]
    handles = [engine.add(prompt, params) for prompt in ASKED]
    found: dict[RequestHandle, GenerationResult] = {}
    while not engine.is_idle:
        found |= {c.handle: c.result for c in engine.step() if c.result is not None}
        if not preempted:  # one whose text has begun
            running = [r for r in scheduler.admitted if 3 < len(r.output_ids) < LENGTH - 3]
            for request in running[-1:]:
                engine._core._places.preempt(request)
    assert preempted
    assert [found[handle].token_ids for handle in handles] == expected


def test_log_probabilities_are_the_raw_laws(model: LlamaModel, plain: Plain) -> None:
    """Edits that change no token change no bit; others give the raw law's bits at their tokens."""
    for sampling, said in plain.said.items():
        asked = replace(SAMPLINGS[sampling], logprobs=True)
        expected = make_engine(model).generate(ASKED, asked)
        allowed = sorted({token for ids in texts(said) for token in ids} | {2})
        drafter = trees(texts(said), 12)
        for max_nodes in (1, 12):
            engine = make_engine(model, drafter, max_nodes=max_nodes)
            for edit in ({"allowed_token_ids": allowed}, {"min_new_tokens": 1}):
                results = engine.generate(ASKED, replace(asked, **edit))
                assert [r.logprobs for r in results] == [r.logprobs for r in expected]
    options = {"logprobs": True, "allowed_token_ids": [7], "max_new_tokens": 5}
    forced = make_engine(model).generate(ASKED[2], **options)
    assert forced.token_ids == [7] * 5 and forced.logprobs is not None
    raw = next_logits(model, ASKED[2])
    assert forced.logprobs[0] == float(logprobs_of(raw[None], [7]))
    assert forced.logprobs[0] == pytest.approx(float(raw.log_softmax(0)[7]), abs=1e-5)


def test_a_log_probability_of_what_cannot_be_is_minus_infinity() -> None:
    row = torch.tensor([0.0, -math.inf, 1.0])
    assert logprobs_of(row.expand(2, 3).contiguous(), [1, 2]).tolist() == [
        -math.inf,
        pytest.approx(-math.log1p(math.exp(-1.0))),
    ]


# --- ends -----------------------------------------------------------------------------------------


def test_stop_strings_count_once_there_are_so_many_tokens(model: LlamaModel, plain: Plain) -> None:
    said = texts(plain.said["greedy"])[2]
    letter = chr(32 + said[6])
    first = said.index(said[6]) + 1
    again = [i + 1 for i, token in enumerate(said) if token == said[6] and i + 1 >= first + 1]
    for drafter in (EmptyDrafter(), trees(texts(plain.said["greedy"]), 12)):
        engine = make_engine(model, drafter)
        params = replace(SAMPLINGS["greedy"], stop=letter)
        for least, count in ((0, first), (first, first), (first + 1, (again or [LENGTH])[0])):
            result = engine.generate(ASKED[2], params, min_new_tokens=least)
            assert len(result.token_ids) == count, least


def test_words_are_looked_for_in_the_output_alone(model: LlamaModel) -> None:
    """And over the border of two rounds."""
    (free,) = make_engine(model).generate([ASKED[3]], max_new_tokens=8)
    pair = "".join(chr(32 + token) for token in (ASKED[3][-1], free.token_ids[0]))
    if pair.strip() == pair:
        result = make_engine(model).generate(ASKED[3], max_new_tokens=8, bad_words=[pair])
        assert result.token_ids[0] == free.token_ids[0]
    mask, row = BadWords([[5, 6], [6, 7, 8]]), np.zeros(9, dtype=np.float32)
    mask.forbid([7, 5], row)
    assert np.flatnonzero(np.isinf(row)).tolist() == [6]
    row[:] = 0.0
    mask.forbid([7], row)
    mask.forbid([], row)
    assert np.isfinite(row).all()


def test_words_of_one_token_need_no_host() -> None:
    editors = Editors(LetterTokenizer(), VOCAB, (2,))  # type: ignore[arg-type]
    params = editors.checked(SamplingParams(bad_words=["a"], logit_bias={3: 1.0}))
    assert params.logit_bias == {3: 1.0, 65: -math.inf}
    assert editors.editor(params, [1], 99) is None
    longer = editors.checked(SamplingParams(bad_words=["ab", "b"]))
    assert longer.logit_bias == {66: -math.inf}, "a word that ends with another cannot come anyway"
    assert editors.editor(longer, [1], 99) is None
    assert editors.editor(editors.checked(SamplingParams(bad_words=["ab"])), [1], 99) is not None
    assert editors.editor(SamplingParams(min_new_tokens=5, ignore_eos=True), [1], 99) is None


# --- what goes wrong ------------------------------------------------------------------------------


def raising(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    if len(ids) >= len(ASKED[2]) + 5:
        raise KeyError("mine")
    return row


FAULTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "raises": ({"logits_processor": raising}, 5, "^logits_processor: KeyError: 'mine' at position"),
    "a shape": (
        {"logits_processor": lambda ids, row: row[:-1]},
        0,
        r"^logits_processor: expected \[97\] float32 on the host, got \[96\]",
    ),
    "a dtype": ({"logits_processor": lambda ids, row: row.double()}, 0, "got .97. float64"),
    "no tensor": ({"logits_processor": lambda ids, row: None}, 0, "expected a tensor, got NoneTy"),
    "NaN": ({"logits_processor": lambda ids, row: row * math.nan}, 0, "got NaN or .inf"),
    "infinity": ({"logits_processor": lambda ids, row: row + math.inf}, 0, "got NaN or .inf"),
    "nothing left": (
        {"allowed_token_ids": [2], "min_new_tokens": 3},
        0,
        "^allowed_token_ids, min_new_tokens: no token is left at position",
    ),
    "all banned": (
        {"logits_processor": lambda ids, row: row - math.inf},
        0,
        "^logits_processor: no token is left",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_its_request_alone(model: LlamaModel, plain: Plain, fault: str) -> None:
    """With the tokens before it, drafted or not."""
    options, count, named = FAULTS[fault]
    unedited = texts(plain.said["greedy"])
    for drafter in (EmptyDrafter(), trees(unedited, 24)):
        engine = make_engine(model, drafter, max_batch=4, max_nodes=24)
        params = [SAMPLINGS["greedy"]] * 4
        params[2] = replace(params[2], **options)
        results = engine.generate(ASKED, params)
        assert results[2].finish_reason == "error" and results[2].token_ids == unedited[2][:count]
        with pytest.raises(ValueError, match=named):
            raise ValueError(results[2].error)
        assert texts(results[:2] + results[3:]) == unedited[:2] + unedited[3:]
        assert engine.cache.num_held_pages == 0


def test_what_cannot_be_asked_is_refused_before_anything_runs(model: LlamaModel) -> None:
    engine = make_engine(model)
    for options, named in (
        ({"allowed_token_ids": [5, 97]}, "^allowed_token_ids: expected token ids < 97, got 97"),
        ({"bad_words": ["\u20ac"]}, "^bad_words: expected words of tokens, got '\u20ac'"),
        ({"structured": {"regex": "a"}, "ignore_eos": True}, "^structured: expected a token that"),
        ({"structured": {"regex": "a"}}, "^structured: llguidance cannot read a NoneType"),
    ):
        with pytest.raises(ValueError, match=named):
            engine.add([1], **options)  # type: ignore[arg-type]
    assert engine.is_idle


# --- the law --------------------------------------------------------------------------------------

SMALL = 6


class Parity:
    """Forbids a token by the sum of those before it."""

    name = "parity"

    def forbid(self, output: Sequence[int], row: Row) -> None:
        row[sum(output) % SMALL] = -math.inf


def drawn(batch: int, seed: int) -> tuple[DraftTree, torch.Tensor]:
    """Trees of two draws from a law at the root and one from another below each; logits, the same
    for all sequences by the node's tokens."""
    generator = torch.Generator().manual_seed(seed)
    laws = torch.rand(1 + SMALL, SMALL, generator=generator)
    laws /= laws.sum(1, keepdim=True)
    first = laws[0].multinomial(2 * batch, replacement=True, generator=generator).view(batch, 2)
    below = laws[1 + first.flatten()].multinomial(1, generator=generator)
    tokens = torch.cat([torch.zeros(batch, 1), first, below.view(batch, 2)], dim=1).int()
    parents = torch.tensor([[-1, 0, 0, 1, 2]]).expand(batch, 5).int().contiguous()
    rows = torch.randn(1 + SMALL + SMALL * SMALL, SMALL, generator=generator)
    # Nodes of the second level have a row for both tokens.
    place = torch.zeros(batch, 5, dtype=torch.long)
    place[:, 1:3] = 1 + first
    place[:, 3:] = 1 + SMALL + first * SMALL + tokens[:, 3:].long()
    probs = laws[torch.where(place > SMALL, 0, place)]
    depth = torch.tensor([[0, 1, 1, 2, 2]]).expand(batch, 5).int()
    counts = torch.full((batch,), 5, dtype=torch.int32)
    tree = DraftTree(tokens, parents, depth, depth[..., None].long(), counts, probs)
    return tree, rows[place]


def requests(batch: int) -> list[Request]:
    """Of no engine."""

    class Told:
        def __init__(self) -> None:
            self.editor = Editor([0], None, [Parity()], (), 99)
            self.output_ids: list[int] = []

    return [Told() for _ in range(batch)]  # type: ignore[misc]


def sequences(params: SamplingParams, batch: int) -> History:
    made = [replace(params, seed=seed, logprobs=True) for seed in range(batch)]
    tokens = torch.zeros(batch, 1, dtype=torch.int32)
    return History(
        SamplingTable.build(made, [1] * batch, SMALL), tokens, torch.ones(batch, dtype=torch.int32)
    )


def edited_row(edits: Edits, b: int, node: int, raw: torch.Tensor) -> torch.Tensor:
    row = edits.edited(b, node, raw.numpy())
    assert row is not None
    return torch.from_numpy(row)


@pytest.mark.parametrize("has_laws", [True, False])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_rows_edited_by_need_are_as_good_as_all(has_laws: bool, top_p: float) -> None:
    """Acceptance, whose law is proved elsewhere, of rows that were all edited before."""
    tree, logits = drawn(300, seed=int(has_laws))
    tree = tree if has_laws else replace(tree, draft_probs=None)
    history = sequences(SamplingParams(temperature=1.2, top_p=top_p), 300)
    edits, raw = Edits(requests(300), tree), logits.clone()
    edited = torch.stack(
        [torch.stack([edited_row(edits, b, n, raw[b, n]) for n in range(5)]) for b in range(300)]
    )
    expected = accept(
        tree, edited, history.sampling, history.tokens, history.lengths, want_logprobs=True
    )
    result, _ = walk(tree, AllLogits(logits), history, edits)
    for name in ("path", "tokens", "accept_length"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert torch.equal(logits, raw), "what stood there stands there"
    assert result.logprobs is not None and set(expected.accept_length.tolist()) == {0, 1, 2}
    for b in range(0, 300, 7):
        path = [node for node in result.path[b].tolist() if node >= 0]
        told = logprobs_of(raw[b, path], result.tokens[b, : len(path)].tolist())
        assert torch.equal(result.logprobs[b, : len(path)], told)


def test_two_tokens_have_the_edited_law() -> None:
    """By frequency; a right rule fails once in 10^5 (chi-squared, 25 cells, 4.9 sigma)."""
    batch = 2000
    tree, logits = drawn(batch, seed=3)
    root = logits[0, 0].clone()
    by_token = {int(t): row.clone() for t, row in zip(tree.draft_tokens[:, 1], logits[:, 1])}  # noqa: B905
    history = sequences(SamplingParams(temperature=1.0), batch)
    result, _ = walk(tree, AllLogits(logits), history, Edits(requests(batch), tree))

    def law(row: torch.Tensor, output: list[int]) -> torch.Tensor:
        row = row.clone()
        Parity().forbid(output, row.numpy())
        return row.double().softmax(0)

    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(SMALL, SMALL, dtype=torch.double)
    for tokens in result.tokens.tolist():
        first, second = tokens[:2]
        if second < 0:  # what a round leaves open, plain decoding completes
            second = int(law(by_token[first], [first]).multinomial(1, generator=generator))
        counts[first, second] += 1
    assert set(by_token) == set(range(SMALL))
    expected = torch.stack([law(root, [])[t] * law(by_token[t], [t]) for t in range(SMALL)])
    assert counts[expected == 0].sum() == 0
    cells = expected > 0
    chi = float(((counts - batch * expected) ** 2 / (batch * expected))[cells].sum())
    free = int(cells.sum()) - 1
    assert chi < free + 4.9 * math.sqrt(2 * free) + 8


def test_a_drafter_that_gives_laws_changes_no_greedy_text(model: LlamaModel, plain: Plain) -> None:
    drafter: Drafter = SmallModelDrafter(LlamaModel(model.config, model.weights), depth=3, width=2)
    for case in ("least", "words"):
        params, expected = plain.params("greedy", case), plain.edited("greedy", case)
        results = make_engine(model, drafter).generate(ASKED, params, DraftParams(depth=3))
        assert texts(results) == expected
        assert sum(result.stats.num_accepted_tokens for result in results) > 0
