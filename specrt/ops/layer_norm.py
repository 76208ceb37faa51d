"""Layer norm with an optional fused residual add."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!)? residual,"
    " Tensor(b!) out) -> ()",
    _C.layer_norm,
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row: ``(x - mean) / sqrt(var + eps) * weight + bias``, computed in float32.

    The variance is the mean square of what differs from the mean, which is taken first.

    Args:
        x: ``[M, H]``, or ``[M, S, H]`` for S heads a row, float32, bfloat16 or float16; rows may
            be strided.
        weight: ``[H]`` float32.
        bias: ``[H]`` float32, or None.
        eps: added to the variance.
        out: like ``x``; made if not given. May be ``x`` itself (not under ``torch.compile``).
        residual: like ``x``; if given, ``residual += x`` in place, and the sum is normalised as
            its dtype keeps it.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    if out is None:
        out = torch.empty_like(x)
    if torch.compiler.is_compiling():
        torch.ops.specrt.layer_norm(x, weight, bias, eps, residual, out)
    else:
        _C.layer_norm(x, weight, bias, eps, residual, out)
    return out
