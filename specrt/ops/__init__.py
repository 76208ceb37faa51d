"""One typed wrapper per kernel; the only modules that import ``specrt._C``.

Every op writes into preallocated tensors, so that a recorded graph can replay it, and keeps a fixed
reduction order per row: a row's bits never depend on the other rows.
"""

from specrt.ops.linear import linear
from specrt.ops.rms_norm import rms_norm
from specrt.ops.tree_accept import Purpose, gumbel_noise, tree_accept

__all__ = [
    "Purpose",
    "gumbel_noise",
    "linear",
    "rms_norm",
    "tree_accept",
]
