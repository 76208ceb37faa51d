"""Rows times a factor, capped where asked, onto a residual."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "scale_add(Tensor x, float factor, Tensor? residual, float? cap, Tensor(a!) out) -> ()",
    _C.scale_add,
)


def scale_add(
    x: torch.Tensor,
    factor: float,
    residual: torch.Tensor | None = None,
    cap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + cap * tanh(factor * x / cap)``, in float32, rounded once at the end.

    Args:
        x: ``[M, H]`` float32, bfloat16 or float16; rows may be strided.
        factor: of ``x``.
        residual: like ``x``; None: nothing is added.
        cap: positive, what the product stays within; None: it is taken as it is.
        out: like ``x``; made if not given. May be ``x`` or ``residual`` itself (not under
            ``torch.compile``).

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or the cap is not positive; the
            argument is named.
    """
    if out is None:
        out = torch.empty_like(x)
    if torch.compiler.is_compiling():
        torch.ops.specrt.scale_add(x, factor, residual, cap, out)
    else:
        _C.scale_add(x, factor, residual, cap, out)
    return out
