"""Heads of a size that no kernel takes, run as larger ones.

What is put in is zero: rows of q, k and v, columns of o. So dot products, sums over values and
outputs stay what they are, and softmax is scaled by the true size. Rotary embedding pairs element i
with i + d / 2, hence each half is padded by itself.
"""

from __future__ import annotations

import torch

_ROWS = tuple(f"self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias"))
_COLUMNS = ("self_attn.o_proj.weight",)
_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def pad_heads(key: str, tensor: torch.Tensor, head_dim: int, padded: int) -> torch.Tensor:
    """A tensor of an attention layer for heads of ``padded``; any other tensor as it is.

    A norm of q or k takes its mean over ``padded`` elements then: its weight makes up for it, and
    its epsilon must be :func:`norm_eps`.

    Args:
        key: Hugging Face's name.
        tensor: as stored.
        head_dim: d.
        padded: P, even, at least d.
    """
    if padded == head_dim:
        return tensor
    if key.endswith(_ROWS):
        return _padded(tensor, 0, head_dim // 2, padded // 2)
    if key.endswith(_COLUMNS):
        return _padded(tensor, 1, head_dim // 2, padded // 2)
    if key.endswith(_NORMS):
        scaled = tensor.float() * (head_dim / padded) ** 0.5
        return _padded(scaled, 0, head_dim // 2, padded // 2)
    return tensor


def norm_eps(eps: float, head_dim: int, padded: int) -> float:
    """What a norm over P elements, d of which may differ from 0, adds to their mean square."""
    return eps * (head_dim / padded)


def _padded(tensor: torch.Tensor, dim: int, half: int, padded_half: int) -> torch.Tensor:
    halves: torch.Tensor = tensor.unflatten(dim, (-1, half))
    shape = list(halves.shape)
    shape[dim + 1] = padded_half
    wide = halves.new_zeros(shape)
    wide.narrow(dim + 1, 0, half).copy_(halves)
    return wide.flatten(dim, dim + 1)
