"""This process's place among those that train together."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from specrt.train.loop.options import TrainOptions

_HOURS = 24  # the others wait while the main process caches features
_LET_GO = 1.0  # seconds


def make_accelerator(options: TrainOptions) -> Accelerator:
    """An accelerator for this process, as ``accelerate launch`` or plain Python started it.

    Raises:
        ValueError: the launcher started several processes that know nothing of one another; each
            would train the whole and write over the others' files.
    """
    # All accelerators of a process share it, and an earlier one may have had another precision.
    AcceleratorState._reset_state()
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=_HOURS))]
    is_told = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
    if options.precision == "auto" and is_told:
        accelerator = Accelerator(kwargs_handlers=handlers)
    else:
        is_bf16 = options.precision == "bf16" or (options.precision == "auto" and _has_fast_bf16())
        precision = "bf16" if is_bf16 else "no"
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE: the launcher started {launched} processes, but accelerate sees "
            f"{accelerator.num_processes}; on CPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def leave(accelerator: Accelerator) -> None:
    """End the processes' group; training is done, and the interpreter may be torn down after this.

    DDP keeps gloo's threads beyond their group. One of them may still be dropping a tensor of the
    last exchange, which needs the interpreter, and would abort the process if there is none.
    """
    accelerator.end_training()
    if accelerator.num_processes > 1:
        time.sleep(_LET_GO)


def _has_fast_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())
