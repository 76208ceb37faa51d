"""Activation of the MLP, gated or not."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register(
    "activate(Tensor x, Tensor(a!) out, str activation, bool is_gated) -> ()",
    _C.activate,
)


def activate(
    x: torch.Tensor,
    out: torch.Tensor | None = None,
    activation: str = "silu",
    is_gated: bool = True,
) -> torch.Tensor:
    """``f(gate) * up``, or ``f(x)``, element by element, computed in float32.

    Args:
        x: float32, bfloat16 or float16; rows may be strided. ``[M, 2 I]``, gate then up in each
            row, or ``[M, I]`` if not gated.
        out: ``[M, I]`` of the same dtype; made if not given. May be the gate half of ``x`` itself,
            or ``x`` if not gated (not under ``torch.compile``).
        activation: ``"silu"``; ``"gelu"``, by the error function; ``"gelu_tanh"``, what is near it;
            ``"relu"``; ``"relu2"``, its square.
        is_gated: whether rows hold gate and up.

    Returns:
        ``out``.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or the activation is none of
            these; the argument is named.
    """
    if out is None:
        *rows, width = x.shape or (0,)
        out = x.new_empty(*rows, width // 2 if is_gated else width)
    if torch.compiler.is_compiling():
        torch.ops.specrt.activate(x, out, activation, is_gated)
    else:
        _C.activate(x, out, activation, is_gated)
    return out
