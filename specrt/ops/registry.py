"""Registration of kernels with ``torch.library``, so that ``torch.compile`` sees through them.

Eager calls go straight to the extension: the dispatcher would cost more than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specrt import _C
from specrt.ops.threads import respect_quota


def _current_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


respect_quota()
_C.set_thread_source(torch.get_num_threads)
_C.set_stream_source(_current_stream)

_LIBRARY = torch.library.Library("specrt", "DEF")


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether kernels take a tensor for a GPU's. (The tests' simulated GPU takes the CPU's.)"""
    return tensor.is_cuda


def register(schema: str, kernel: Callable[..., None]) -> None:
    """Register a kernel under ``torch.ops.specrt``.

    Args:
        schema: the op's schema. It returns nothing: outputs are arguments marked as mutated.
        kernel: the extension's function, with the same arguments.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for backend in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, backend)

    def fake(*args: Any) -> None:
        """Outputs are arguments, so there is no shape to infer."""

    torch.library.register_fake(f"specrt::{name}", fake, lib=_LIBRARY)
