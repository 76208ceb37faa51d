"""FSPAD, EAGLE-2 and those between them, as the loop trains them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specrt.draft.fspad.checkpoint import TOKEN_IDS, DraftConfig
from specrt.train.batches import Batch, collate
from specrt.train.device import TrainDevice
from specrt.train.evaluate import chain_acceptance
from specrt.train.features.source import FeatureSource
from specrt.train.fspad.module import DraftModel
from specrt.train.head import TargetTables
from specrt.train.loop.options import FspadOptions
from specrt.train.loop.summary import write_drafter
from specrt.train.losses import FrozenHead, draft_losses
from specrt.train.task import StepLosses, TrainData

INITIAL = "initial"
"""What an identity calls the weights that a run began with."""


class FspadTask:
    """A one-layer drafter over the target's features; a :class:`specrt.train.task.TrainTask`.

    Args:
        config: its architecture.
        load_tables: gives the target's embedding and head.
        options: the recipe.
        token_ids: ``[R]``, increasing: the only tokens it proposes; None: all.
        initial: the weights to begin with, by their official names; None: :class:`DraftModel`'s;
            text: what :meth:`identity` has said of them, where a state takes their place.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        config: DraftConfig,
        load_tables: Callable[[], TargetTables],
        options: FspadOptions,
        token_ids: torch.Tensor | None = None,
        initial: Mapping[str, torch.Tensor] | str | None = None,
    ) -> None:
        self._config, self._options = config, options
        self._load_tables = load_tables
        self._token_ids = token_ids
        self._initial = None if isinstance(initial, str) else initial
        self._initial_hash = initial if isinstance(initial, str) else None
        if self._initial is not None:
            self._initial_hash = _hash(self._initial.values())

    def identity(self) -> dict[str, Any]:
        """As :class:`TrainTask` says."""
        return {
            "arch": self._config.arch,
            "target": self._config.target_fingerprint,
            "intermediate_size": self._config.layer.intermediate_size,
            "token_ids": None if self._token_ids is None else _hash([self._token_ids]),
            INITIAL: self._initial_hash,
        }

    def start(self, device: TrainDevice, dtype: torch.dtype) -> nn.Module:
        """As :class:`TrainTask` says."""
        self._device = device.memory
        self._full_tables = replace(self._load_tables(), token_ids=self._token_ids)
        tables = self._full_tables.to(self._device, dtype)
        self._embed, self._head = tables.embed, FrozenHead(tables.draft_head, device)
        model = DraftModel(self._config, self._options.seed)
        if self._initial is not None:
            model.load_state_dict({key: value.float() for key, value in self._initial.items()})
        self._pair_flop = model.flop()
        return model

    def collate(self, source: FeatureSource, indices: Sequence[int], epoch: int) -> Batch:
        """As :class:`TrainTask` says."""
        return collate(
            source,
            indices,
            noise=self._options.noise,
            seed=self._options.seed,
            epoch=epoch,
            device=self._device,
        )

    def losses(self, module: Any, batch: Batch, *, has_hits: bool) -> StepLosses:
        """As :class:`TrainTask` says."""
        predicted, regressed = module(batch.inputs, self._embed[batch.next_tokens])
        parts = predicted, regressed, batch.targets
        rows = [part.flatten(0, 1)[batch.counted] for part in parts]
        losses = draft_losses(rows[0], rows[1], rows[2], self._head, has_hits=has_hits)
        total = self._options.regression_weight * losses.regression
        total = total + self._options.classification_weight * losses.classification
        pair = torch.stack([losses.regression.detach(), losses.classification.detach()])
        return StepLosses(total, torch.cat([pair, losses.hits]))

    def num_flop(self, batch: Batch) -> int:
        """As :class:`TrainTask` says; the head gives two laws and a gradient."""
        pairs = batch.next_tokens.numel() * self._pair_flop
        return pairs + 6 * batch.num_counted * self._head.weight.numel()

    def clip_groups(self, module: Any) -> list[list[nn.Parameter]]:
        """As :class:`TrainTask` says."""
        return [list(module.parameters())]

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """As :class:`TrainTask` says."""
        regression, classification, *hits = means
        loss = self._options.regression_weight * regression
        loss += self._options.classification_weight * classification
        tops = {f"top{k}": hit for k, hit in enumerate(hits, 1)}
        return {
            "loss": loss,
            "regression": regression,
            "classification": classification,
            **tops,
        }

    def finish(
        self, out: Path, weights: dict[str, torch.Tensor], data: TrainData, run: dict[str, Any]
    ) -> dict[str, Any]:
        """As :class:`TrainTask` says."""
        dtype = getattr(torch, self._options.save_dtype)
        stored = {key: tensor.to(dtype) for key, tensor in weights.items()}
        model = DraftModel(self._config).requires_grad_(False)
        model.load_state_dict(stored)
        acceptance = chain_acceptance(
            model.to(self._device.place),
            self._full_tables.to(self._device, torch.float32),
            data.source,
            data.held_out,
            self._options.depth,
        )
        summary = {
            "arch": self._config.arch,
            "num_parameters": sum(tensor.numel() for tensor in stored.values()),
            "held_out": acceptance.as_dict(),
            **run,
        }
        if self._token_ids is not None:
            stored[TOKEN_IDS] = self._token_ids.to(torch.int32)
        write_drafter(out, self._config, stored, summary)
        return summary


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
