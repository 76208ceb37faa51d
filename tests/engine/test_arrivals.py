"""Requests that come, fail, give way and are aborted at random: each says what it says alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from specrt.cache import KVCache
from specrt.draft.base import Drafter, DraftParams, EmptyDrafter
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult, StreamChunk
from specrt.models.model import LlamaModel
from specrt.pages import PagePool
from specrt.sampling import SamplingParams
from specrt.types import QueueFullError, RequestHandle
from tests.checkpoints import make_draft_checkpoint
from tests.drafters.fspad_rig import make_drafter as make_fspad
from tests.engine.exits import make_drafter as make_eesd
from tests.engine.exits import make_exit_pair
from tests.engine.support import RandomTreeDrafter, make_engine, make_model
from tests.interrupts import interrupt
from tests.test_prefix_pages import check_pools

VOCAB = 97
NUM_CASES = 24
NO_MEMORY = "KV cache: no memory (planted)"
SHAPES = (None, None, DraftParams(depth=3), DraftParams(depth=5, top_k=3, total_tokens=12))


@dataclass(frozen=True)
class Case:
    """A request, and what it says alone."""

    prompt: tuple[int, ...]
    params: SamplingParams
    expected: GenerationResult


def random_params(rng: random.Random) -> SamplingParams:
    options: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 8, 24, 60, 90])}
    if rng.random() < 0.6:
        options |= {"temperature": rng.choice([0.6, 1.0]), "top_p": rng.choice([0.9, 1.0])}
    if rng.random() < 0.3:
        options |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    if rng.random() < 0.3:
        options["stop"] = [chr(32 + rng.randrange(VOCAB - 2)) for _ in range(3)]
    is_long = rng.random() < 0.5
    return SamplingParams(
        seed=rng.randrange(1000), logprobs=rng.random() < 0.3, ignore_eos=is_long, **options
    )


def random_prompt(rng: random.Random) -> tuple[int, ...]:
    """Unequal ones, some of which repeat themselves."""
    piece = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 23, 70]))]
    return tuple(piece * rng.choice([1, 1, 2]))


def make_cases(model: LlamaModel, count: int = NUM_CASES) -> tuple[Case, ...]:
    """Requests that differ in all there is."""
    cases: dict[tuple[int, ...], Case] = {}
    rng = random.Random(12)
    while len(cases) < count:
        prompt, params = random_prompt(rng), random_params(rng)
        alone = make_engine(model, max_batch=1).generate(prompt, params)
        cases[prompt] = Case(prompt, params, alone)
    return tuple(cases.values())


@dataclass(frozen=True)
class Rig:
    """A target, who drafts for it, and what is asked."""

    model: LlamaModel
    drafters: Mapping[str, Drafter]
    cases: tuple[Case, ...]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder = tmp_path_factory.mktemp("arrivals")
    target, exit_path = make_exit_pair(folder)
    make_draft_checkpoint(target, folder / "fspad")
    model = make_model(target)
    cases = make_cases(model)
    answers = {case.prompt: case.expected.token_ids for case in cases}
    drafters: dict[str, Drafter] = {
        "plain": EmptyDrafter(),
        "random trees": RandomTreeDrafter(answers, VOCAB, 16, hit_rate=0.8),
        "prompt lookup": PromptLookupDrafter(num_continuations=2),
        "fspad": make_fspad(model, folder / "fspad"),
        "eesd": make_eesd(model, exit_path),
    }
    return Rig(model, drafters, cases)


# --- what goes wrong --------------------------------------------------------------------------


FLAKY = "start", "num_known", "begin_at", "prefill", "propose", "observe", "finish"


class Flaky:
    """A drafter that raises now and then, in any of its methods, before or after its work."""

    def __init__(self, drafter: Drafter, rng: random.Random, happened: Counter[str]) -> None:
        self._drafter, self._rng, self._happened = drafter, rng, happened

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._drafter, name)
        if name not in FLAKY:
            return value

        def call(*arguments: Any) -> Any:
            fails, does_its_work = self._rng.random() < 0.01, self._rng.random() < 0.5
            # One that raises in `finish` without having done it would keep what it held.
            given = value(*arguments) if does_its_work or not fails or name == "finish" else None
            if fails:
                self._happened["drafter failed"] += 1
                raise RuntimeError("broken drafter (planted)")
            return given

        return call


class Weather:
    """Plants failures in an engine and counts those that have come.

    Args:
        engine: whose caches, target and scheduler are tampered with.
        rng: when.
        monkeypatch: takes it all back.
    """

    def __init__(self, engine: Engine, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self.happened = Counter[str]()
        self._engine, self._rng = engine, rng
        self._is_out_of_memory = False
        self._wrap(monkeypatch, engine.target, "forward", self._forward)
        self._wrap(monkeypatch, engine._core, "step", self._step)
        self._wrap(monkeypatch, engine._core.scheduler, "preempt", self._preempt)
        for owner, name in ((KVCache, "reserve"), (PagePool, "_grow")):
            method = getattr(owner, name)

            def fail(pages: KVCache | PagePool, *arguments: Any, method: Any = method) -> None:
                if arguments[-1] > 0:
                    self._refuse(pages)
                method(pages, *arguments)

            monkeypatch.setattr(owner, name, fail)

    def _wrap(self, monkeypatch: Any, owner: object, name: str, by: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: by(original, *a, **k), raising=True)

    def _forward(self, forward: Callable[..., Any], tree: Any, batch: Any, **options: Any) -> Any:
        output = forward(tree, batch, **options)
        if batch.cache is self._engine.cache and output.logits.numel() and self._is_hit(0.02):
            row = self._rng.randrange(len(output.logits))
            output.logits[row] = float("nan")
            self.happened["NaN"] += 1
        return output

    def _step(self, step: Callable[[], None]) -> None:
        if not self._is_hit(0.08):
            step()
            return
        # Of a step of a few thousand, so some end before it comes.
        with interrupt(after=round(10 ** self._rng.uniform(0.0, 3.4))):
            step()

    def _preempt(self, preempt: Callable[[Any], None], request: Any) -> None:
        self.happened["preempted"] += 1
        preempt(request)

    def _refuse(self, pages: KVCache | PagePool) -> None:
        if self._is_hit(0.004):
            cache = self._engine.cache
            whose = "target" if pages in (cache, *cache.pools) else "drafter"
            self.happened[f"no memory ({whose})"] += 1
            raise MemoryError(NO_MEMORY)

    def _is_hit(self, chance: float) -> bool:
        return self._rng.random() < chance


# --- a run ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Told:
    """What was heard of a request."""

    case: Case
    tokens: list[int]
    text: str = ""
    result: GenerationResult | None = None
    is_aborted: bool = False


class Run:
    """An engine of few pages, and those who ask it."""

    def __init__(self, rig: Rig, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rng = random.Random(seed)
        self.rig = rig
        happened = Counter[str]()
        self.drafter = list(rig.drafters.values())[seed % len(rig.drafters)]
        flaky: Any = Flaky(self.drafter, random.Random(seed), happened)
        self.engine = make_engine(
            rig.model,
            flaky,
            max_batch=self.rng.choice([2, 4, 6]),
            max_nodes=self.rng.choice([12, 16, 33]),
            max_cached_tokens=64 * self.rng.choice([4, 5, 8]),
            max_waiting=4,
            prefill_chunk=self.rng.choice([1, 7, 48, 512]),
        )
        self.weather = Weather(self.engine, self.rng, monkeypatch)
        self.happened = self.weather.happened
        self.told: dict[RequestHandle, Told] = {}
        self._drafter_happened = happened

    def go(self, num_requests: int) -> None:
        """Until all have ended."""
        most = 400 * num_requests
        while len(self.told) < num_requests or not self.engine.is_idle:
            most -= 1
            assert most > 0, "requests do not come to an end"
            if len(self.told) < num_requests and self.rng.random() < 0.5:
                self._arrive()
            if self.told and self.rng.random() < 0.03:
                self._abort()
            self._step()
        self.happened.update(self._drafter_happened)

    def _arrive(self) -> None:
        case = self.rng.choice(self.rig.cases)
        shape = self.rng.choice(SHAPES)
        try:
            handle = self.engine.add(list(case.prompt), case.params, shape)
        except QueueFullError:
            self.happened["queue full"] += 1
        else:
            self.told[handle] = Told(case, [])

    def _abort(self) -> None:
        handle = self.rng.choice(list(self.told))
        has_ended = self.told[handle].result is not None
        is_aborted = self.engine.abort(handle)
        # One that has ended may still have chunks to be handed over.
        assert not (is_aborted and has_ended)
        self.told[handle].is_aborted |= is_aborted
        self.happened["aborted"] += is_aborted

    def _step(self) -> None:
        try:
            chunks = self.engine.step()
        except KeyboardInterrupt:
            self.happened["interrupted"] += 1
            return
        for chunk in chunks:
            self._hear(chunk)

    def _hear(self, chunk: StreamChunk) -> None:
        told = self.told[chunk.handle]
        assert told.result is None, "something came behind a result"
        told.tokens += chunk.token_ids
        told.text += chunk.text
        told.result = chunk.result

    def check(self) -> None:
        """Everyone was told what it would be told alone, and nothing is left."""
        for told in self.told.values():
            check_result(told)
        assert self.engine.cache.num_held_pages == 0
        check_pools(self.engine.cache, [])
        for name in ("_cache", "cache"):
            cache = getattr(self.drafter, name, None)
            assert cache is None or cache.num_held_pages == 0, "the drafter keeps pages"
            if cache is not None:
                check_pools(cache, [])
        self.happened["found"] += self.engine.stats.prefix_hits


def check_result(told: Told) -> None:
    result, expected = told.result, told.case.expected
    assert result is not None
    assert told.tokens == result.token_ids and told.text == result.text
    count = len(result.token_ids)
    assert result.token_ids == expected.token_ids[:count]
    if expected.logprobs is not None:
        assert result.logprobs == expected.logprobs[:count]
    if result.finish_reason == "error":
        assert result.error is not None and ("NaN" in result.error or NO_MEMORY in result.error)
    elif result.finish_reason == "abort":
        assert told.is_aborted
    else:
        assert result.text == expected.text and count == len(expected.token_ids)
        assert result.finish_reason == expected.finish_reason
        assert result.stop_reason == expected.stop_reason


def run_all(
    rig: Rig, seeds: range, num_requests: int, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    happened = Counter[str]()
    for seed in seeds:
        with monkeypatch.context() as patches:
            run = Run(rig, seed, patches)
            run.go(num_requests)
        run.check()
        happened.update(run.happened)
        ends = [told.result.finish_reason for told in run.told.values() if told.result]
        happened.update(f"ended: {reason}" for reason in ends)
    return happened


PLANTED = (
    "found",
    "preempted",
    "aborted",
    "interrupted",
    "drafter failed",
    "NaN",
    "no memory (target)",
    "queue full",
    "ended: length",
    "ended: stop",
    "ended: error",
    "ended: abort",
)


def test_each_says_what_it_says_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = run_all(rig, range(10), 12, monkeypatch)
    assert not [name for name in PLANTED if happened[name] == 0], happened


@pytest.mark.slow
def test_each_says_what_it_says_alone_a_thousand_times(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = run_all(rig, range(1000, 1400), 25, monkeypatch)
    for name in ("preempted", "aborted", "interrupted"):
        assert happened[name] >= 1000, happened
    assert not [name for name in (*PLANTED, "no memory (drafter)") if happened[name] == 0], happened
