"""The exits of EESD as torch modules to train: a decoder layer, a norm, a calibration head each.

They follow the target's first N layers in place of the rest (arXiv 2406.03853). The layer begins as
a copy of the target's last one, the norm as a copy of its final norm; the LM head is the target's.
Parameters carry the checkpoint's names, so an exit's state dict is a checkpoint.

Shapes: B sequences, m positions each, T exits, H hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from specrt.config import ModelConfig
from specrt.draft.eesd.checkpoint import NUM_MODES, ExitConfig
from specrt.models.filling import block_values
from specrt.models.layouts import expected_shapes, layer_norms, use_standard_names
from specrt.models.opening import open_checkpoint
from specrt.ops import MatrixKind
from specrt.train.layers import Attention, Mlp, Norm, Rope, product_flop

_EXITS = "exits."


class ExitOutput(NamedTuple):
    """What one exit makes of every position."""

    normed: torch.Tensor
    """``[B, m, H]``: zn; LMhead(zn_t) are the exit's logits of token t + 1."""
    evidence: torch.Tensor
    """``[B, m, 2]`` float32: weight . zn + bias of the calibration head, zn held fixed."""
    slope: torch.Tensor
    """``[2]`` float32"""


class _Layer(nn.Module):
    """A decoder layer of the target's form, of its last layer's kind."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.form = form = config.form

        def norm(name: str) -> Norm | None:
            may_have_bias = layer_norms(config).get(name)
            if may_have_bias is None:
                return None
            has_bias = form.has_norm_bias and may_have_bias
            return Norm(config.hidden_size, config.rms_norm_eps, form, has_bias=has_bias)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config)
        self.attended_layernorm = norm("attended_layernorm")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = Mlp(config)
        self.mlp_layernorm = norm("mlp_layernorm")

    def forward(self, hidden: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        scale = self.form.residual_scale
        normed = _normed(self.input_layernorm, hidden)
        attended = _normed(self.attended_layernorm, self.self_attn(normed, rope))
        after = torch.add(hidden, attended, alpha=scale)
        if self.form.has_mlp_norm:
            before = hidden if self.form.is_parallel else after
            normed = _normed(self.post_attention_layernorm, before)
        return torch.add(after, _normed(self.mlp_layernorm, self.mlp(normed)), alpha=scale)


def _normed(norm: Norm | None, rows: torch.Tensor) -> torch.Tensor:
    """What is not normed there stays as it is."""
    if norm is None:
        return rows
    normed: torch.Tensor = norm(rows)
    return normed


class _OneLayer(nn.Module):
    """A model of one layer, without embedding and head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        form = config.form
        self.layers = nn.ModuleList([_Layer(config)])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, form, has_bias=form.has_norm_bias)
        self.rope = Rope(config, form.layer(0).rope)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # The layer is called as a module, so that FSDP can wrap it.
        out: torch.Tensor = self.norm(self.layers[0](hidden, self.rope.rows(hidden.shape[1])))
        return out


class _Calibration(nn.Module):
    """Begins as nothing: the confidence is then the exit's own probability."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_MODES, hidden_size))
        self.bias = nn.Parameter(torch.zeros(NUM_MODES))
        self.slope = nn.Parameter(torch.ones(NUM_MODES))

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., 2]``; what it learns does not reach the exit."""
        with torch.autocast(normed.device.type, enabled=False):
            return functional.linear(normed.detach().float(), self.weight.float(), self.bias)


class ExitModule(nn.Module):
    """One exit in training; embedding and LM head are the target's and not part of it.

    Args:
        config: its architecture.
    """

    def __init__(self, config: ExitConfig) -> None:
        super().__init__()
        self.model = _OneLayer(config.layer)
        self.calibration = _Calibration(config.layer.hidden_size)

    def forward(self, hidden: torch.Tensor) -> ExitOutput:
        """Run whole sequences; padding belongs at the end.

        Args:
            hidden: ``[B, m, H]``: g_0 … g_{m-1}, the outputs of the target's first N layers.
        """
        normed = self.model(hidden)
        return ExitOutput(normed, self.calibration(normed), self.calibration.slope)


class ExitModules(nn.Module):
    """Exits after several N, which share nothing: each learns as if it were alone.

    Args:
        configs: of the exits.
        start: the weights every exit begins with, as :func:`read_last_layer` gives them.
    """

    def __init__(self, configs: Sequence[ExitConfig], start: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.exits = nn.ModuleDict({str(c.exit_layer): ExitModule(c) for c in configs})
        for model in self.exits.values():
            assert isinstance(model, ExitModule)
            model.model.load_state_dict(start)

    def flop(self) -> int:
        """Of a position's matrix products, forward and back; attention's and the calibration heads'
        left out."""
        return product_flop(self)

    def forward(self, states: torch.Tensor) -> list[ExitOutput]:
        """Run every exit on the output of its own layer: ``[B, m, T, H]``, in their order."""
        columns = states.unbind(2)
        return [model(hidden) for model, hidden in zip(self.exits.values(), columns, strict=True)]


def exit_weights(weights: Mapping[str, torch.Tensor], exit_layer: int) -> dict[str, torch.Tensor]:
    """One exit's part of the state dict of :class:`ExitModules`, under the checkpoint's names."""
    prefix = f"{_EXITS}{exit_layer}."
    return {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}


def parameter_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """Each exit's layer and each calibration head by itself, however the module is wrapped."""
    groups: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        _, _, inside = name.partition(_EXITS)
        groups.setdefault(tuple(inside.split(".")[:2]), []).append(parameter)
    return list(groups.values())


def read_last_layer(
    path: str | os.PathLike[str],
    target: ModelConfig,
    adapter: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The target's last layer and final norm in float32, named as in a model of that layer alone.

    Args:
        path: the target's directory or GGUF file, whose tensors have been checked against its
            configuration.
        target: that configuration.
        adapter: a directory with a LoRA adapter that is merged into it.

    Raises:
        CheckpointError: a file is missing or corrupt.
    """
    checkpoint = use_standard_names(open_checkpoint(path, adapter), target)

    def read(key: str) -> torch.Tensor:
        info = checkpoint.infos[key]
        if isinstance(info.dtype, MatrixKind):
            return block_values(checkpoint.tensor(key), info.dtype, info)
        tensor = checkpoint.tensor(key).float()
        if info.dtype != torch.float8_e4m3fn:
            return tensor.clone()
        scale = checkpoint.tensor(f"{key}{target.float8_scale_suffix}").float()
        return tensor * scale.reshape(-1, 1)

    last, first = f"layers.{target.num_layers - 1}.", "layers.0."
    names = expected_shapes(replace(target, num_layers=1), has_tables=False)
    tensors = {name.removeprefix("model."): read(name.replace(first, last)) for name in names}
    checkpoint.release()
    return tensors
