"""Checkpoints in the formats that people quantise models in, packed by hand, and what they stand
for: sums of plain Python and torch, written from the formats' descriptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import edit_config, edit_tensors

GROUP = 32
Tensors = dict[str, torch.Tensor]
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # outputs of a word, from the lowest four bits on


def packed(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """``[R, C]`` small integers in ``[R, C * bits / 32]`` words of int32, the first lowest."""
    per_word = 32 // bits
    words = codes.long().unflatten(1, (-1, per_word))[..., order or list(range(per_word))]
    total = (words << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(total < 1 << 31, total, total - (1 << 32)).to(torch.int32)


def _codes(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of four bits ``[N, K]``; scales and zero points ``[N, G]``."""
    generator = torch.Generator().manual_seed(seed)
    groups = weight.unflatten(1, (-1, GROUP))
    scales = ((groups.amax(-1) - groups.amin(-1)) / 15).half()
    zeros = torch.randint(1, 15, scales.shape, generator=generator)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.flatten(1).long(), scales, zeros


def _values(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_of: torch.Tensor
) -> torch.Tensor:
    """In float64, which is exact, rounded to the scales' dtype."""
    exact = (codes - zeros[:, group_of]).double() * scales.double()[:, group_of]
    return exact.to(scales.dtype)


def _awq(weight: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = _codes(weight, seed)
    parts = {
        "qweight": packed(codes.T, 4, _AWQ_ORDER),
        "qzeros": packed(zeros.T, 4, _AWQ_ORDER),
        "scales": scales.T,
    }
    return parts, _values(codes, scales, zeros, torch.arange(weight.shape[1]) // GROUP)


def _gptq(weight: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = _codes(weight, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(weight.shape[1], generator=generator)
    group_of = (torch.arange(weight.shape[1]) // GROUP)[order]
    parts = {
        "qweight": packed(codes, 4).T,
        "qzeros": packed(zeros.T - 1, 4),
        "scales": scales.T,
        "g_idx": group_of.to(torch.int32),
    }
    return parts, _values(codes, scales, zeros, group_of)


def _w4a16(weight: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = _codes(weight, seed)
    parts = {
        "weight_packed": packed(codes, 4),
        "weight_scale": scales,
        "weight_zero_point": packed(zeros.T, 4).T,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, _values(codes, scales, zeros, torch.arange(weight.shape[1]) // GROUP)


def _w8a8(weight: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    del seed
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    parts = {"weight": codes, "weight_scale": scale}
    return parts, (codes.double() * scale.double()).to(scale.dtype)


def _float8(weight: torch.Tensor, seed: int) -> tuple[Tensors, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-weight.shape[0] // GROUP), -(-weight.shape[1] // GROUP)
    scale = 0.01 + 0.01 * torch.rand(rows, columns, generator=generator)
    factors = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    factors = factors[: weight.shape[0], : weight.shape[1]]
    codes = (weight / factors).to(torch.float8_e4m3fn)
    exact = (codes.double() * factors.double()).float()
    return {
        "weight": codes,
        "weight_scale_inv": scale,
        "activation_scale": scale[0, 0].clone(),
    }, exact


def _groups(weights: Mapping[str, Any], form: str, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_FOUR_BITS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_PACKERS: Mapping[
    str,
    tuple[Callable[[torch.Tensor, int], tuple[Tensors, torch.Tensor]], dict[str, Any]],
] = {
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "w4a16": (_w4a16, _groups({**_FOUR_BITS, "symmetric": False}, "pack-quantized")),
    "w8a8": (
        _w8a8,
        _groups(
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "int-quantized",
            input_activations={"num_bits": 8, "dynamic": True},
        ),
    ),
    "fp8": (_float8, {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}),
}
FORMATS = tuple(_PACKERS)


def store_quantized(path: Path, name: str) -> Tensors:
    """Quantise the layers' matrices of a checkpoint; return all weights it then stands for."""
    pack, config = _PACKERS[name]
    exact: Tensors = {}

    def quantise(tensors: Tensors) -> None:
        for seed, (key, tensor) in enumerate(sorted(tensors.items())):
            exact[key] = tensor
            if not key.endswith("_proj.weight"):
                continue
            parts, exact[key] = pack(tensor.float(), seed)
            del tensors[key]
            module = key.removesuffix("weight")
            tensors |= {module + end: part.contiguous() for end, part in parts.items()}

    edit_tensors(path, quantise)
    edit_config(path, quantization_config=config)
    return exact
