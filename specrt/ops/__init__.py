"""One typed wrapper per kernel; the only modules that import ``specrt._C``.

Every op writes into preallocated tensors, so that a recorded graph can replay it, and keeps a fixed
reduction order per row: a row's bits never depend on the other rows.
"""

from specrt.ops.linear import linear
from specrt.ops.rms_norm import rms_norm

__all__ = [
    "linear",
    "rms_norm",
]
