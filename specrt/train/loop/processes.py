"""This process's place among those that train together."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from specrt.device import CPU
from specrt.train.device import has_fast_bf16, parse_place
from specrt.train.loop.options import TrainOptions

_USE_CPU = "ACCELERATE_USE_CPU"
_HOURS = 24  # the others wait while the main process caches features
_LET_GO = 1.0  # seconds


def make_accelerator(options: TrainOptions) -> Accelerator:
    """An accelerator for this process, as ``accelerate launch`` or plain Python started it.

    Raises:
        ValueError: no such device; or the launcher started several processes that know nothing of
            one another: each would train the whole and write over the others' files.
    """
    place = _chosen_place(options.device)
    is_cpu = place is not None and place.type == "cpu"
    # All accelerators of a process share these, and an earlier one may have had another precision,
    # or place.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=_HOURS))]
    is_told = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
    if options.precision == "auto" and is_told:
        accelerator = Accelerator(cpu=is_cpu, kwargs_handlers=handlers)
    else:
        is_gpu = not is_cpu and torch.cuda.is_available()
        is_fast = options.precision == "auto" and has_fast_bf16(is_gpu=is_gpu)
        precision = "bf16" if is_fast or options.precision == "bf16" else "no"
        accelerator = Accelerator(cpu=is_cpu, mixed_precision=precision, kwargs_handlers=handlers)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE: the launcher started {launched} processes, but accelerate sees "
            f"{accelerator.num_processes}; on CPUs say --device cpu"
        )
    return accelerator


def _chosen_place(name: str) -> torch.device | None:
    """As :func:`parse_place`; a GPU's number is made the current one, which accelerate takes.

    Raises:
        ValueError: as it does; or it names one GPU for several processes, or one where the launcher
            wants the CPU.
    """
    is_cpu = os.environ.get(_USE_CPU, "").lower() in ("1", "true", "yes")
    place = parse_place(name)
    if place is None:
        return CPU if is_cpu else None
    if place.type == "cuda" and is_cpu:
        raise ValueError(f"device: expected 'cpu' where {_USE_CPU} is set, got {name!r}")
    if place.index is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"device: expected 'cuda' for several processes, got {name!r}")
        torch.cuda.set_device(place)
    return place


def leave(accelerator: Accelerator) -> None:
    """End the processes' group; training is done, and the interpreter may be torn down after this.

    DDP keeps gloo's threads beyond their group. One of them may still be dropping a tensor of the
    last exchange, which needs the interpreter, and would abort the process if there is none.
    """
    accelerator.end_training()
    if accelerator.num_processes > 1:
        time.sleep(_LET_GO)
