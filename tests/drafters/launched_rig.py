"""Rounds of a batch as an engine launches them, in small: the host a round behind, or not.

What a drafter launches may be nothing but ops and views, since a graph is to hold it; what it gets
is told a round late.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specrt import ops
from specrt.accept import Accepting, Read
from specrt.cache import CacheBatch
from specrt.device import Device
from specrt.draft.base import (
    BatchTables,
    Budget,
    Drafter,
    DraftParams,
    LaunchedDrafter,
    RootsAlone,
    RoundPlan,
    StageTimes,
)
from specrt.draft.length.costs import RoundCost
from specrt.models.launched_run import LaunchedRun
from specrt.models.layer_run import LowerLayers
from specrt.models.model import LlamaModel
from specrt.ops.history_append import report_size
from specrt.sampling import SamplingParams, SamplingRows, sampling_row
from specrt.tree import Settler
from specrt.types import AcceptResult, DraftTree, Proposal, SequenceState

_ROOM = 256  # of a history


class _OnlyViews(TorchDispatchMode):
    """Fails at whatever a graph would not hold: torch's own work, allocations among it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_stand_in = getattr(self._device, "is_moving", False)  # a simulated GPU's, for a kernel
        schema = func._schema.arguments
        is_view = any(a.alias_info and not a.alias_info.is_write for a in schema)
        assert is_view or is_stand_in, f"{func} in a launched round"
        return func(*args, **(kwargs or {}))


@contextmanager
def only_launches(device: Device) -> Iterator[None]:
    """Of what is done meanwhile nothing is torch's but views."""
    with _OnlyViews(device):
        yield


class Rounds:
    """B sequences that decode, none of which ends.

    Args:
        model: the target, on a GPU.
        drafter: theirs.
        prompts: of the sequences.
        params: how each is sampled.
        draft: the shape of trees.
        max_nodes: of a tree.
    """

    def __init__(
        self,
        model: LlamaModel,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        draft: DraftParams | None = None,
        max_nodes: int = 16,
    ) -> None:
        self._model, self.drafter = model, drafter
        device, vocab_size = model.device, model.config.vocab_size
        self._budget = Budget(max_nodes, RoundCost(slope=0.0), draft)
        self._settler = Settler(vocab_size, device)
        self._accepting = Accepting(vocab_size, device)
        self.states = [
            SequenceState(
                list(p), len(p), _ROOM, s.seed or 0, s.temperature, sampling_row(s, len(p))
            )
            for p, s in zip(prompts, params, strict=True)
        ]
        cache = model.new_cache()
        self._cached = CacheBatch(cache, [cache.open(_ROOM) for _ in prompts])
        for state, one in zip(self.states, self._cached.sequences, strict=True):
            drafter.start(state)
            for start, taps in model.extend(
                state.token_ids[:-1], CacheBatch(cache, [one]), taps=drafter.taps
            ):
                drafter.prefill(state, start, taps)
        self._cached.update(self._cached.sequences)
        history = torch.zeros(len(prompts), _ROOM, dtype=torch.int32)
        for row, state in enumerate(self.states):
            history[row, : len(state.token_ids)] = torch.tensor(state.token_ids)
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int32)
        ends = [p[-1] for p in prompts]
        rows = SamplingRows(len(prompts), vocab_size, device)
        for row, (state, one) in enumerate(zip(self.states, params, strict=True)):
            rows.write(row, one, state.prompt_len)
        self.tables = BatchTables(
            device.there(history),
            device.there(lengths),
            device.there(torch.full_like(lengths, _ROOM)),
            device.there(torch.tensor(ends, dtype=torch.int32)),
            device.there(torch.full_like(lengths, max_nodes)),
            device.zeros(len(prompts), dtype=torch.int32),
            device.there(torch.full_like(lengths, -1)[:, None]),
            self._cached,
            rows.table(len(prompts)),
        )
        self._runs: dict[RoundPlan, LaunchedRun] = {}
        self._waiting: tuple[RoundPlan, torch.Tensor, int] | None = None  # launched, and not read
        self.trees: list[Proposal] = []
        """What was proposed, round by round, on the host."""

    def shape(self, draft: DraftParams) -> None:
        """Ask for trees of another shape from now on."""
        self._budget = Budget(self._budget.max_nodes, self._budget.cost, draft)

    def launched(self, count: int) -> None:
        """Run so many rounds, each launched before the one before it was read."""
        for _ in range(count):
            self.launch()
        self.catch_up()

    def launch(self) -> None:
        """Launch a round, and read the one before."""
        drafter = self.drafter
        assert isinstance(drafter, LaunchedDrafter)
        plan = drafter.plan(self.states, self._budget)
        assert plan is not None
        proposal = self._launched(drafter, plan)
        tree, result, taps, report = self._verify(proposal)
        with only_launches(self._model.device):
            drafter.launch_observe(plan, self.tables, tree, result, taps)
        self.catch_up()
        self._waiting = plan, report, tree.draft_tokens.shape[1]

    def catch_up(self) -> None:
        """Read the round that is under way, if there is one."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._tell(*waiting)

    def told_at_once(self, count: int) -> None:
        """Run so many rounds by ``propose`` and ``observe``."""
        for _ in range(count):
            self._budget.lower = LowerLayers(self._model, self._cached, self.tables.roots)
            proposal = self.drafter.propose(self.states, self._budget)
            tree, result, taps, report = self._verify(proposal)
            read = Read(self._model.device.read(report).numpy(), tree.draft_tokens.shape[1])
            result = replace(result, report=read.for_drafters())
            self.drafter.observe(self.states, proposal, result, taps)
            self._append(read)

    def undrafted(self, count: int) -> None:
        """Run so many rounds of roots alone; the drafter hears nothing of them."""
        drafter, self.drafter = self.drafter, RootsAlone()
        self.launched(count)
        self.drafter = drafter

    def finish(self) -> None:
        for state in self.states:
            self.drafter.finish(state)

    def _launched(self, drafter: LaunchedDrafter, plan: RoundPlan) -> Proposal:
        """What it launches; if it runs layers of the target, what stands where they write it."""
        if plan.num_layers == 0:
            with only_launches(self._model.device):
                return drafter.launch_propose(plan, self.tables)
        if plan not in self._runs:
            sizes = plan.num_layers, plan.num_nodes - 1
            self._runs[plan] = LaunchedRun(self._model, self._cached, self.tables.roots, *sizes)
        run = self._runs[plan]
        with only_launches(self._model.device), run.lent():
            proposal = drafter.launch_propose(plan, replace(self.tables, lower=run))
        chains = run.taken(proposal)
        assert chains is not None, "another proposal than the run's"
        return chains

    def _verify(
        self, proposal: Proposal
    ) -> tuple[DraftTree, AcceptResult, dict[str, torch.Tensor], torch.Tensor]:
        device, tables = self._model.device, self.tables
        tree = self._settler.settle(proposal, tables.roots, tables.room, self._budget.max_nodes)
        fields = tree.draft_tokens, tree.parents, tree.num_nodes
        self.trees.append(Proposal(*map(device.read, fields)))
        output = self._model.forward(tree, self._cached, taps=self.drafter.taps)
        result = self._accepting.accept(
            tree, output.logits, tables.sampling, tables.history, tables.history_len
        )
        size = result.tokens.shape
        report = device.empty(size[0], report_size(size[1], False), dtype=torch.int32)
        ops.history_append(
            tree.num_nodes,
            tree.depth,
            result.path,
            result.accept_length,
            result.tokens,
            None,
            tables.stop_ids,
            tables.max_len,
            tables.history,
            tables.history_len,
            tables.roots,
            tables.num_path,
            report,
        )
        self._cached.move(result.path, tables.num_path)
        return tree, result, dict(output.taps), report

    def _tell(self, plan: Any, report: torch.Tensor, size: int) -> None:
        read = Read(self._model.device.read(report).numpy(), size)
        assert isinstance(self.drafter, LaunchedDrafter)
        self.drafter.told(self.states, plan, read.for_drafters(), StageTimes(0.0, 1.0, 0.0))
        self._append(read)

    def _append(self, read: Read) -> None:
        for state, outcome, tokens in zip(self.states, read.outcomes, read.tokens, strict=True):
            state.token_ids.extend(tokens[: outcome.num_taken])
