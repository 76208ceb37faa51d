"""Drafters for whole rounds on a GPU: of the target's shape, and right by chance alone.

What a round takes, part by part, depends on shapes, not on what is accepted. FSPAD's layer has
random weights; EESD's exit is the target's next layer, where it lies. Each says what its drafting
reads at the least, and what is left for verification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from bench.random_target import DEVIATION, step_bytes
from specrt.draft.base import Drafter, DraftParams
from specrt.draft.eesd.checkpoint import ExitConfig, ExitWeights
from specrt.draft.eesd.drafter import EesdDrafter
from specrt.draft.eesd.launched import LaunchedEesdDrafter
from specrt.draft.eesd.model import ExitModel
from specrt.draft.fspad.checkpoint import TOKEN_IDS, DraftConfig, tensor_shapes
from specrt.draft.fspad.drafter import FspadDrafter
from specrt.draft.fspad.layer import DraftLayer
from specrt.draft.fspad.on_device import DeviceFspadDrafter
from specrt.draft.fspad.weights import (
    DraftWeights,
    fold,
    folding_pays,
    narrow,
    pack_weights,
    packed,
)
from specrt.draft.prompt_lookup.drafter import PromptLookupDrafter
from specrt.draft.recycle.drafter import RecycleDrafter
from specrt.draft.recycle.on_device import DeviceRecycleDrafter
from specrt.models.model import LlamaModel

FSPAD, EESD, LOOKUP, RECYCLE = "FSPAD", "EESD", "prompt lookup", "token recycling"
_DEPTH, _TOP_K, NODES = 6, 10, 60  # EAGLE-2's
CHAIN = 4


@dataclass(frozen=True)
class WholeRound:
    """A drafter, the shape of its trees, and the weights that a round reads."""

    drafter: Drafter
    params: DraftParams | None
    draft_bytes: int
    verify_bytes: int

    @property
    def num_nodes(self) -> int:
        """Of its trees."""
        assert self.params is not None
        assert self.params.total_tokens is not None
        return self.params.total_tokens


@dataclass(frozen=True)
class LayerKind:
    """How a one-layer drafter is made."""

    arch: str = "fspad"
    head_rows: int | None = None
    """Of a reduced draft vocabulary; None: all."""
    is_folded: bool | None = None
    """None: where serving would."""
    is_narrow: bool = False
    """Whether matrices have a byte a weight."""


Layer = tuple[DraftConfig, DraftWeights]


def whole_round(name: str, target: LlamaModel) -> WholeRound:
    """One of :data:`MAKERS`, new."""
    return MAKERS[name](target)


def random_layer(target: LlamaModel, kind: LayerKind) -> Layer:
    """A drafter's layer of the target's shape, with random weights."""
    config = DraftConfig.for_target(target.config, kind.arch, name="random")
    weights, device = target.weights, target.device
    is_packed = weights.packed_inputs > 0
    dtype = torch.bfloat16 if is_packed else weights.dtype
    generator = torch.Generator(device.place).manual_seed(1)
    tensors = {
        key: _random(shape, dtype, generator) for key, shape in tensor_shapes(config).items()
    }
    if kind.head_rows is not None:
        config = replace(config, draft_vocab_size=kind.head_rows)
        tensors[TOKEN_IDS] = torch.arange(kind.head_rows, dtype=torch.int32)
    tables = weights.embed, weights.lm_head
    made = pack_weights(config, tensors, *tables, dtype, device)
    is_folded = kind.is_folded
    if is_folded is None:
        is_folded = folding_pays(made, weights.arena.nbytes)
    if is_folded:
        made = fold(made, device)
    return config, narrow(made, device) if kind.is_narrow else packed(made, weights.packing)


def layer_round(target: LlamaModel, layer: Layer) -> WholeRound:
    """A new drafter with that layer, and EAGLE-2's trees."""
    config, weights = layer
    device = target.device
    kind = DeviceFspadDrafter if device.is_gpu else FspadDrafter
    drafter = kind(DraftLayer(config, weights, device, target.ropes))
    params = DraftParams(depth=_DEPTH, top_k=_TOP_K, total_tokens=NODES)
    return WholeRound(drafter, params, _DEPTH * weights.step_bytes, step_bytes(target.weights))


def _fspad(target: LlamaModel) -> WholeRound:
    return layer_round(target, random_layer(target, LayerKind()))


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A matrix; a vector is a norm's or a bias and small enough to be ones."""
    made = torch.ones(shape, dtype=dtype, device=generator.device)
    return made if len(shape) == 1 else made.normal_(0.0, DEVIATION, generator=generator)


def _eesd(target: LlamaModel) -> WholeRound:
    """Behind an eighth of the layers. Of a chain's last node the exit needs no more than its keys
    and values, so it is one step fewer than there are passes of the first layers."""
    weights, device = target.weights, target.device
    number = max(1, target.config.num_layers // 8)
    size = weights.arena.nbytes - weights.embed.nbytes - weights.lm_head.nbytes
    layer_bytes, head_bytes = size // target.config.num_layers, weights.lm_head.nbytes
    layer = replace(
        weights,
        arena=weights.arena[:layer_bytes],  # of an exit's size, which its costs go by
        layers=weights.layers[number : number + 1],
    )
    hidden = target.config.hidden_size
    calibration = ExitWeights(
        layer,
        device.zeros(2, hidden, dtype=device.activation_dtype(weights.dtype)),
        device.zeros(2),
        device.zeros(2).fill_(1.0),
    )
    config = ExitConfig.for_target(target.config, number, name="random")
    exit_model = ExitModel(config, calibration, target)
    kind = LaunchedEesdDrafter if device.is_gpu else EesdDrafter
    return WholeRound(
        kind(exit_model),
        DraftParams(depth=CHAIN, top_k=1, total_tokens=1 + CHAIN),
        (1 + CHAIN) * number * layer_bytes + CHAIN * (layer_bytes + head_bytes),
        step_bytes(weights) - number * layer_bytes,
    )


def _lookup(target: LlamaModel) -> WholeRound:
    return WholeRound(PromptLookupDrafter(), None, 0, step_bytes(target.weights))


def _recycle(target: LlamaModel) -> WholeRound:
    vocab_size, device = target.config.vocab_size, target.device
    drafter: Drafter = RecycleDrafter(vocab_size)
    if device.is_gpu:
        drafter = DeviceRecycleDrafter(vocab_size, device)
    params = DraftParams(depth=_DEPTH, top_k=_TOP_K, total_tokens=NODES)
    return WholeRound(drafter, params, 0, step_bytes(target.weights))


MAKERS: Mapping[str, Callable[[LlamaModel], WholeRound]] = {
    FSPAD: _fspad,
    EESD: _eesd,
    LOOKUP: _lookup,
    RECYCLE: _recycle,
}
SIZES: Mapping[str, int] = {FSPAD: NODES, EESD: 1 + CHAIN, RECYCLE: NODES}
"""Nodes of a tree, where they are fixed."""
