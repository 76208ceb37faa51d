"""A round of EESD as launches alone: chains, whose lengths a controller decides on the device.

Level 0 is the root, level l the l-th drafted token; a row has its node's place in the target's
cache and in the exit's, both of which hold the same tokens. An accepted path is the beginning of a
chain, whose rows lie where they belong: nothing is committed. So that the exit never lags, every
node of a chain leaves its keys and values there, the root's too where nothing is drafted.

The controller's word on the token behind level l comes between the level's layers, which are run
where its token is there, and its exit, which is run where another one is wanted:

    level l     first N layers, the exit's keys and values | decide | the exit's rest, head, ranking

B sequences, L levels below the root, N layers of the target, V tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from specrt import ops
from specrt.cache import CacheBatch
from specrt.device import Device
from specrt.draft.base import BatchTables
from specrt.draft.coupling import draft_tiles, expand_scratch
from specrt.draft.eesd.checkpoint import NUM_MODES
from specrt.draft.eesd.model import ExitModel
from specrt.draft.length.device_control import DeviceControlRound
from specrt.models.launched_run import LaunchedRun
from specrt.types import Proposal

_NUM_BEST = 2  # the runner-up tells how sure a coupled draft is


class ChainKey(NamedTuple):
    """What a round's buffers are made for, and where the exit's cache lies."""

    batch: int
    num_levels: int
    """L"""
    is_coupled: bool
    is_controlled: bool
    """Whether a controller decides on lengths; else all are L."""
    version: int
    """Of the device's steps."""
    table_address: int
    table_width: int

    @property
    def num_nodes(self) -> int:
        """Of a chain, its root included."""
        return 1 + self.num_levels


class _Best(NamedTuple):
    """The best tokens behind the last level, as ``ops.tree_expand`` writes a frontier: ``[B, 2]``.

    A chain's frontier is one node, whose score is 0: a token's score is its own.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    candidates: torch.Tensor
    source: torch.Tensor
    ancestors: torch.Tensor

    @classmethod
    def make(cls, batch: int, width: int, device: Device) -> _Best:
        """Of nothing."""
        ints = device.zeros(3, batch, width, dtype=torch.int32)
        ints[1].fill_(-1)
        bits = device.zeros(batch, width, 1, dtype=torch.int64)
        return cls(ints[0], device.zeros(batch, width), ints[1], ints[2], bits)


class ChainRound:
    """The buffers of rounds of one :class:`ChainKey`, and the launches over them.

    Args:
        key: sizes.
        exit_model: the exit, which has reserved its own buffers for this.
        drafts: pages of its cache; lengths there are not looked at.
        control: what decides on lengths, of the key's batch; None if nobody does.
    """

    def __init__(
        self,
        key: ChainKey,
        exit_model: ExitModel,
        drafts: CacheBatch,
        control: DeviceControlRound | None,
    ) -> None:
        self.key, self.control = key, control
        self.is_warm = False
        """Whether such a round has been: the first one waits for the host between its launches."""
        self._exit, self._cache, self._table = exit_model, drafts.cache, drafts.block_table
        device, batch, target = exit_model.target.device, key.batch, exit_model.target
        sizes = batch, target.config.hidden_size
        self._hidden = device.empty(*sizes, dtype=target.activation_dtype)
        self._logits = device.empty(batch, target.config.vocab_size)
        self._evidence = device.zeros(batch, NUM_MODES)
        self._tiles = draft_tiles(batch, target.config.vocab_size, device)
        self._above, self._best = (_Best.make(batch, width, device) for width in (1, _NUM_BEST))
        pool = batch, _NUM_BEST + key.num_levels * _NUM_BEST**2
        tokens, parents = device.zeros(2, *pool, dtype=torch.int32)
        self._pool = tokens, parents, device.zeros(*pool)
        self._scratch = expand_scratch(batch, 1, target.config.vocab_size, _NUM_BEST, device)
        self._all = device.zeros(batch, dtype=torch.int32).fill_(key.num_nodes)

    def launch(self, tables: BatchTables) -> Proposal:
        """Run and draft level after level; nothing but launches.

        Raises:
            ValueError: the tables lend no layers of the exit's target.
        """
        run, control = self._lent(tables), self.control
        for level in range(self.key.num_nodes):
            has_token = None if control is None or level == 0 else control.is_open
            here = run.launch(self._best.tokens[:, 0] if level else None, has_token)
            rows = replace(here.rows, block_table=self._table)
            self._exit.launch_kv(here.hidden, rows, self._cache, is_open=has_token)
            if control is not None:
                said = (self._best.scores[:, 0], self._evidence) if level else ()
                control.decide(level, *said, position=tables.history_len)
            if level == self.key.num_levels:
                break
            is_open = None if control is None else control.is_open
            maxima = self._maxima(level, tables)
            self._exit.launch_exit_rest(
                here.hidden,
                rows,
                self._cache,
                self._hidden,
                self._logits,
                self._evidence,
                maxima=maxima,
                is_open=is_open,
            )
            self._rank(level, tables, maxima, is_open)
        return run.proposal(self._all if control is None else control.num_nodes)

    def learn(self, accept_length: torch.Tensor) -> None:
        """What came of it, ``[B]`` int32; nothing but launches."""
        if self.control is not None:
            self.control.launch_update(accept_length)

    def _lent(self, tables: BatchTables) -> LaunchedRun:
        run, model = tables.lower, self._exit.target
        if run is None or run.model is not model:
            raise ValueError(
                "drafter: expected an engine of the very target that this EESD drafter was loaded "
                f"for, got {'none' if run is None else 'another'}"
            )
        return run

    def _maxima(self, level: int, tables: BatchTables) -> ops.DraftMaxima | None:
        """What the head leaves of a level's logits, if anything."""
        if not self._exit.target.has_maxima:
            return None
        return ops.DraftMaxima(*self._tiles, *self._coupling(tables), level)

    def _coupling(self, tables: BatchTables) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The noise that logits are ranked with, and where."""
        if not self.key.is_coupled:
            return None, None
        return tables.sampling.rows, tables.history_len

    def _rank(
        self,
        level: int,
        tables: BatchTables,
        maxima: ops.DraftMaxima | None,
        is_open: torch.Tensor | None,
    ) -> None:
        """The best tokens behind a level."""
        above, best = self._above, self._best
        ops.tree_expand(
            self._logits[:, None],
            above.scores,
            above.candidates,
            above.ancestors,
            None,
            *self._coupling(tables),
            level,
            self._scratch,
            *self._pool,
            best.tokens,
            best.scores,
            best.candidates,
            best.source,
            best.ancestors,
            is_open=is_open,
            maxima=maxima,
        )
