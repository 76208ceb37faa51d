"""Drafters over one target in memory: what bench_drafters takes its figures from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import Request
from specrt import SamplingParams, load
from specrt.config import ModelConfig
from specrt.device import Device
from specrt.draft.base import Drafter, DraftParams, EmptyDrafter
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.fspad.pairs import MAX_LEVELS
from specrt.draft.kind import DrafterOptions
from specrt.draft.kinds import drafter_directory, load_drafter
from specrt.engine.engine import Engine
from specrt.models.model import LlamaModel
from specrt.tree import MAX_NODES
from specrt.types import RoundStats

PLAIN = "plain"
FOLDS: Mapping[str, bool | None] = {"auto": None, "on": True, "off": False}
_MAX_GRAPHS = 8192  # tree sizes x lengths of block tables x drafters; a run must not capture anew
_SHAPES = {60: (6, 10), 32: (6, 8), 16: (5, 5), 8: (4, 3), 1: (3, 2)}


@dataclass(frozen=True)
class Tree:
    """The shape of drafted trees; the default leaves it to the drafter."""

    total_tokens: int | None = None
    depth: int | None = None
    top_k: int | None = None

    @classmethod
    def of_size(cls, total_tokens: int, depth: int | None = None, top_k: int | None = None) -> Tree:
        """A tree whose depth and top_k, where not given, suit its size."""
        usual = next(shape for size, shape in _SHAPES.items() if total_tokens >= size)
        chosen = (a if a is not None else b for a, b in zip((depth, top_k), usual, strict=True))
        return cls(total_tokens, *chosen)

    @property
    def fits(self) -> bool:
        """Whether a drafter can draft it."""
        depth, top_k = self.depth or 0, self.top_k or 0
        return depth <= MAX_LEVELS and (depth - 1) * top_k <= MAX_NODES

    @property
    def params(self) -> DraftParams:
        """As the engine takes it."""
        return DraftParams(self.depth, self.top_k, self.total_tokens)

    def __str__(self) -> str:
        if self.total_tokens is None:
            return "auto"
        return f"{self.total_tokens} ({self.depth}, {self.top_k})"


@dataclass(frozen=True)
class Variant:
    """A line of the table: one drafter, over all its training seeds, in one setting."""

    drafter: str
    tree: Tree | None = None
    """None: left to the drafter."""
    is_coupled: bool = False


@dataclass(frozen=True)
class Run:
    """What came of a request."""

    token_ids: list[int]
    seconds: float
    """Of decoding alone."""
    stats: RoundStats


@dataclass(frozen=True, eq=False)
class Contender:
    """One checkpoint in one setting."""

    variant: Variant
    engine: Engine

    def run(self, request: Request) -> Run:
        """Generate until an end-of-sequence token or ``max_new_tokens``.

        Raises:
            RuntimeError: the sequence failed.
        """
        sampling = SamplingParams(
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        tree = self.variant.tree
        started = time.perf_counter()
        result = self.engine.generate(request.prompt_ids, sampling, tree and tree.params)
        seconds = time.perf_counter() - started
        if result.error is not None:
            raise RuntimeError(result.error)
        return Run(result.token_ids, seconds - result.stats.prefill_ms / 1e3, result.stats)


class SharedTarget:
    """One target, one KV cache and one set of captured steps for any number of contenders.

    Args:
        target: as for :func:`specrt.load`.
        dtype: of the target, as for :func:`specrt.load`.
        max_nodes: of the largest tree.
    """

    def __init__(self, target: str, dtype: str, max_nodes: int) -> None:
        loaded = load(target, dtype=dtype, progress=False)
        weights, device = loaded.target.weights, Device(max_steps=_MAX_GRAPHS)
        self.model = LlamaModel(loaded.target.config, weights, device)
        self.encode = loaded.encode
        self._tokenizer = loaded.tokenizer
        self._max_nodes = max_nodes
        self._dtype = None if dtype == "auto" else self.model.dtype
        self._layers: dict[tuple[str, str], DraftLayer | None] = {}

    def layer(self, path: str, fold: str) -> DraftLayer | None:
        """A trained drafter's layer, in memory once; None where there is no such thing.

        Args:
            path: as ``drafter`` of :func:`specrt.load`.
            fold: a key of :data:`FOLDS`.

        Raises:
            CheckpointError: the checkpoint is missing or does not fit the target.
        """
        key = (path, fold)
        if key not in self._layers:
            drafter = self._load(path, fold)
            self._layers[key] = drafter.layer if isinstance(drafter, FspadDrafter) else None
        return self._layers[key]

    def plain(self) -> Contender:
        """Plain decoding."""
        return self._contender(Variant(PLAIN), EmptyDrafter())

    def contenders(
        self, name: str, path: str, fold: str, trees: Sequence[Tree], couplings: Sequence[bool]
    ) -> list[Contender]:
        """A checkpoint in every setting; an untrained drafter has but its own.

        Args:
            name: the variants' ``drafter``.
            path, fold: as for :meth:`layer`.
            trees: shapes to draft.
            couplings: whether candidates are ranked with the target's noise.
        """
        layer = self.layer(path, fold)
        if layer is None:
            return [self._contender(Variant(name), self._load(path, fold))]
        made = []
        for tree in trees:
            for is_coupled in couplings:
                drafter = FspadDrafter(layer, is_coupled=is_coupled)
                made.append(self._contender(Variant(name, tree, is_coupled), drafter))
        return made

    def _load(self, path: str, fold: str) -> Drafter:
        options = DrafterOptions(FOLDS[fold])
        return load_drafter(path, self.model, self._dtype, options)

    def _contender(self, variant: Variant, drafter: Drafter) -> Contender:
        limits = {"max_nodes": self._max_nodes, "max_shared_tokens": 0}
        engine = Engine(self.model, drafter, self._tokenizer, **limits)
        return Contender(variant, engine)


def describe(path: str, layer: DraftLayer, target: ModelConfig) -> dict[str, Any]:
    """How a checkpoint was trained, where it says so, and what its steps read."""
    about: dict[str, Any] = {"checkpoint": Path(path).name}
    directory = drafter_directory(path, target)
    training = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("training")
    if (directory / "training.json").is_file():
        training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    for key in ("arch", "num_parameters", "num_steps", "num_tokens"):
        if training and key in training:
            about[key] = training[key]
    if training and "seed" in training.get("options", {}):
        about["seed"] = training["options"]["seed"]
    weights = layer.weights
    return about | {
        "head_rows": weights.head.shape[0],
        "table_MB": weights.table_bytes / 1e6,
        "step_MB": weights.step_bytes / 1e6,
    }
