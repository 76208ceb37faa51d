"""Every kind of drafter keeps to the contract.

Another package's: ``pytest tests/drafters/test_contract.py --drafter package.module:factory``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch

from specrt import builtin
from specrt.draft import kinds
from specrt.draft.base import Budget, Drafter, DraftParams
from specrt.draft.kind import DrafterOptions, DrafterRequest, Kind
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.engine import head_by_need
from specrt.models.model import LlamaModel
from specrt.types import AcceptResult, Proposal, SequenceState
from tests.checkpoints import make_checkpoint, make_draft_checkpoint, make_exit_checkpoint
from tests.drafters import contract
from tests.engine.support import make_model


def _small_model(target: Path, path: Path) -> None:
    make_checkpoint("llama", path, num_hidden_layers=1)


def _exit(target: Path, path: Path) -> None:
    make_exit_checkpoint(target, path, 2, noise=0.3)


def _eagle2(target: Path, path: Path) -> None:
    make_draft_checkpoint(target, path, "eagle2")


OURS: Mapping[str, tuple[str, Callable[[Path, Path], object] | None]] = {
    "prompt-lookup": ("prompt-lookup", None),
    "recycle": ("recycle", None),
    "eesd": ("eesd", _exit),
    "fspad": ("fspad", make_draft_checkpoint),
    "eagle2": ("fspad", _eagle2),
    "small-model": ("small-model", _small_model),
    "fspad+prompt-lookup": ("fspad", make_draft_checkpoint),
}
"""A kind, and what writes a checkpoint of it for a target, for kinds that have any."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        given = metafunc.config.getoption("--drafter", default=None)
        metafunc.parametrize("subject", [given] if given else OURS, indirect=True)


@pytest.fixture(scope="module")
def subject(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> contract.Subject:
    name: str = request.param
    if request.config.getoption("--drafter", default=None):
        return _given(name, checkpoint, request.config.getoption("--drafter-target"))
    own, has_lookup = kinds.without_lookup(name)
    path, write = tmp_path_factory.mktemp("drafter") / own, OURS[name][1]
    if write is not None:
        write(checkpoint, path)
    asked = own if write is None else path
    return _named(f"{asked}{kinds.WITH_LOOKUP}" if has_lookup else asked, checkpoint)


def _given(name: str, checkpoint: Path, target: str | None) -> contract.Subject:
    """What the command line names."""
    if target == "builtin" or (target is None and name in builtin.drafter_paths()):
        target = str(builtin.target_path())
    path = checkpoint if target is None else Path(target)
    module, _, attribute = name.partition(":")
    if not attribute:
        return _named(name, path)
    factory = getattr(import_module(module), attribute)
    load = factory.load if isinstance(factory, Kind) else factory
    model = make_model(path)
    asked = DrafterRequest(None, model, None, DrafterOptions(), path)
    return contract.Subject(name, model, lambda: load(asked))


def _named(name: str | Path, target: Path) -> contract.Subject:
    model = make_model(target)

    def make() -> Drafter:
        return kinds.load_drafter(name, model, None, DrafterOptions(), target)

    return contract.Subject(str(name), model, make)


def test_every_kind_is_held_against_it() -> None:
    assert {kind for kind, _ in OURS.values()} == set(kinds.REGISTRY)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_contract(subject: contract.Subject, check: Callable[[contract.Subject], None]) -> None:
    check(subject)


@pytest.mark.parametrize("check", [contract.greedy, contract.seeded], ids=["greedy", "seeded"])
def test_contract_where_logits_come_by_need(
    subject: contract.Subject,
    check: Callable[[contract.Subject], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_LEAST_BYTES", "_LEAST_NODES"):
        monkeypatch.setattr(head_by_need, name, 0)
    monkeypatch.setattr(head_by_need, "_ROWS_A_PASS", 2)
    check(subject)


# --- the contract notices -------------------------------------------------------------------------


class Greedy(PromptLookupDrafter):
    """Takes more nodes than it may, and its own shape."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        return super().propose(states, Budget(64, budget.cost, DraftParams(total_tokens=9)))


class Leaking(PromptLookupDrafter):
    """Opens pages and keeps them."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self._cache = model.new_cache()

    def start(self, state: SequenceState) -> None:
        super().start(state)
        self._cache.reserve(self._cache.open(), 10)


class Unsteady(PromptLookupDrafter):
    """Proposes what it feels like."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(torch.seed())

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        drawn = torch.randint(90, (len(states), 7), generator=self._generator, dtype=torch.int32)
        parents = torch.zeros_like(drawn)
        return Proposal(drawn, parents, torch.full((len(states),), 2, dtype=torch.int32))


class Forgetful(PromptLookupDrafter):
    """Has one proposal in mind, the last."""

    def propose(self, states: Sequence[SequenceState], budget: Budget) -> Proposal:
        self._last = super().propose(states, budget)
        return self._last

    def observe(
        self,
        states: Sequence[SequenceState],
        proposal: Proposal,
        result: AcceptResult,
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        assert proposal is self._last
        super().observe(states, proposal, result, taps)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda model: Greedy(), contract.budgets),
        (lambda model: Greedy(), contract.shapes),
        (lambda model: Leaking(model), contract.greedy),
        (lambda model: Unsteady(), contract.repeated),
        (lambda model: Forgetful(), contract.groups),
    ],
)
def test_it_notices(
    make: Callable[[LlamaModel], Drafter],
    check: Callable[[contract.Subject], None],
    checkpoint: Path,
) -> None:
    model = make_model(checkpoint)
    with pytest.raises(AssertionError):
        check(contract.Subject("broken", model, lambda: make(model)))
