"""Root-mean-square norm with an optional fused residual add."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual, Tensor(b!) out) -> ()",
    _C.rms_norm,
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise each row: ``x / sqrt(mean(x**2) + eps) * weight``, computed in float32.

    Args:
        x: ``[M, H]``, or ``[M, S, H]`` for S heads a row (qk-norm), float32, bfloat16 or float16;
            rows may be strided.
        weight: ``[H]`` float32.
        eps: added to the mean square.
        residual: like ``x``; if given, ``residual += x`` in place, and the sum is normalised as
            its dtype keeps it.
        out: like ``x``; made if not given. May be ``x`` itself (not under ``torch.compile``).

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit; the argument is named.
    """
    if out is None:
        out = torch.empty_like(x)
    if torch.compiler.is_compiling():
        torch.ops.specrt.rms_norm(x, weight, eps, residual, out)
    else:
        _C.rms_norm(x, weight, eps, residual, out)
    return out
