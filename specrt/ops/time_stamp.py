"""The moment at which a device comes to a point of its work."""

from __future__ import annotations

import torch

from specrt import _C
from specrt.ops.registry import register

register("time_stamp(Tensor(a!) out) -> ()", _C.time_stamp)


def time_stamp(out: torch.Tensor) -> None:
    """Write when everything that was launched before has ended.

    Args:
        out: ``[1]`` int64, written: nanoseconds of the device's own clock, which only differences
            tell anything of.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    op = torch.ops.specrt.time_stamp if torch.compiler.is_compiling() else _C.time_stamp
    op(out)
