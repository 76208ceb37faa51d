"""Where a model runs: which devices there are, what a GPU's kernels ask, how weights get there."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from specrt.config import ModelConfig
from specrt.device import CPU, Device
from specrt.models.gate_up import interleaved
from specrt.models.layouts import layer_shapes
from specrt.models.loader import LayerWeights, Weights
from specrt.ops import Matrix
from specrt.ops.build import build_info

CUDA_DTYPES = (torch.bfloat16, torch.float16)
"""What the tensor cores of ``tree_attention`` take."""
CUDA_HEAD_DIMS = (64, 80, 96, 128)
"""Head sizes that ``tree_attention`` has CUDA kernels for."""
CPU_HEAD_DIMS = range(16, 256 + 1, 16)
"""Head sizes that it runs on the CPU."""

_LEAST_CAPABILITY = (8, 0)  # the first with bfloat16 tensor cores; older ones have no kernels
_MOST_LOGITS = 1 << 31  # of a sequence's nodes: kernels count them in 32 bits
_COLUMNS = 8  # of 16 bits, that are loaded at once


def parse_device(device: str | torch.device) -> torch.device:
    """A device as users name it, checked to be there and usable.

    Args:
        device: ``"cpu"`` (or ``"auto"``, the same today), ``"cuda"``, ``"cuda:N"`` or a
            ``torch.device`` of these.

    Returns:
        ``cpu``, or ``cuda`` with an index.

    Raises:
        ValueError: another kind of device, no usable GPU, or a build without CUDA kernels.
    """
    try:
        place = CPU if device == "auto" else torch.device(device)
    except (RuntimeError, TypeError):
        raise _unknown(device) from None
    if place.type == "cpu":
        return CPU
    if place.type != "cuda":
        raise _unknown(device)
    return _checked_gpu(place)


def _unknown(device: str | torch.device) -> ValueError:
    return ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {str(device)!r}")


def _checked_gpu(device: torch.device) -> torch.device:
    build = build_info()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if build.cuda is None:
        raise ValueError(
            f"device: expected 'cpu', got {str(device)!r}: this build of specrt has no CUDA "
            "kernels; installing it again where nvcc is, with SPECRT_CUDA=ON, builds them"
            + ("" if count else " (and torch sees no CUDA GPU here)")
        )
    if count == 0:
        raise ValueError(
            f"device: expected 'cpu', got {str(device)!r}: torch sees no CUDA GPU"
            f"{_why_no_gpu()} (these kernels need {build.least_driver})"
        )
    driver = driver_version()
    if driver is not None and driver[0] < int(build.cuda.split(".")[0]):
        raise ValueError(
            f"device: expected 'cpu', got {str(device)!r}: the driver is of CUDA {driver[0]}."
            f"{driver[1]}, the kernels were built by {build.cuda} and need {build.least_driver}"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        known = "only cuda:0 is" if count == 1 else f"cuda:0 .. cuda:{count - 1} are"
        raise ValueError(f"device: {known} there, got {str(device)!r}")
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        least, has = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, capability))
        raise ValueError(
            f"device: expected a GPU of compute capability {least} or above, cuda:{index} has {has}"
        )
    return torch.device("cuda", index)


def driver_version() -> tuple[int, int] | None:
    """The CUDA that the NVIDIA driver is of, as torch reports it; None: it does not."""
    version: int = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return (version // 1000, version % 1000 // 10) if version > 0 else None


def _why_no_gpu() -> str:
    """What torch says when it is made to look."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a driver too old or none; a torch without
        return f": {str(error).partition('. ')[0]}"
    return ""


def choose_dtype(
    config: ModelConfig, asked: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """The dtype a model's weights and cache get on ``device``; on a GPU its activations too.

    Args:
        config: the model's.
        asked: None takes the checkpoint's; on a GPU bfloat16 where that is float32.
        device: as :func:`parse_device` gives it.

    Raises:
        ValueError: on a GPU, a dtype its kernels do not take.
    """
    if device.type == "cpu":
        return asked or config.dtype
    dtype = asked or (config.dtype if config.dtype in CUDA_DTYPES else torch.bfloat16)
    if dtype not in CUDA_DTYPES:
        raise ValueError(
            "dtype: expected bfloat16 or float16 on CUDA, which the tensor cores of "
            f"tree_attention take, got {str(dtype).removeprefix('torch.')}"
        )
    return dtype


def choose_head_dim(config: ModelConfig, device: torch.device) -> int:
    """The head size a model runs with on ``device``: its own, or the next that kernels take.

    Args:
        config: the model's.
        device: as :func:`parse_device` gives it.

    Raises:
        ValueError: its heads are larger than any that kernels take.
    """
    is_on_cpu = device.type == "cpu"
    sizes = CPU_HEAD_DIMS if is_on_cpu else CUDA_HEAD_DIMS
    for size in sizes:
        if size >= config.head_dim:
            return size
    raise ValueError(
        f"head_dim: tree_attention on {'the CPU' if is_on_cpu else 'CUDA'} takes at most "
        f"{sizes[-1]}, the model has {config.head_dim}"
        + ("; device='cpu' runs it" if config.head_dim <= CPU_HEAD_DIMS[-1] else "")
    )


def check_sizes(config: ModelConfig, max_nodes: int, device: torch.device) -> None:
    """Refuse a model of sizes that a GPU's kernels do not take, before anything of it is read.

    Args:
        config: the model's, heads as they run.
        max_nodes: the largest tree.
        device: as :func:`parse_device` gives it; a CPU takes any.

    Raises:
        ValueError: its logits cannot be counted in 31 bits, or rows of a matrix do not begin at
            multiples of 16 bytes. (Columns of ``down`` in eights are rows of gate and up in eights,
            which are interleaved so.)
    """
    if device.type == "cpu":
        return
    if config.vocab_size > _MOST_LOGITS // max_nodes:
        raise ValueError(
            f"vocab_size: expected at most 2^31 / max_nodes = {_MOST_LOGITS // max_nodes} on CUDA, "
            f"the model has {config.vocab_size}; a smaller max_nodes, or device='cpu', runs it"
        )
    for name, shape in layer_shapes(config).items():
        if len(shape) == 2 and shape[1] % _COLUMNS:
            raise ValueError(
                f"model.layers.0.{name}: expected columns in eights on CUDA (rows begin at "
                f"multiples of 16 bytes), got {list(shape)}; device='cpu' runs it"
            )


def check_placed(weights: Weights, device: Device) -> None:
    """Whether weights lie as a device's kernels take them.

    Raises:
        ValueError: they are to go through :func:`place_weights`.
    """
    if weights.is_interleaved != (device.is_gpu and weights.may_interleave):
        raise ValueError(
            f"weights: gate and up are {'' if weights.is_interleaved else 'not '}interleaved, "
            f"expected the layout of {device}, which place_weights gives"
        )


def place_weights(weights: Weights, device: Device) -> Weights:
    """``weights`` as ``device`` runs them: one copy of the arena, matrices where they were in it.

    On a GPU gate and up are interleaved, each matrix by itself and in its place, where its gated
    product is for them (:attr:`~specrt.models.loader.Weights.may_interleave`).

    Args:
        weights: with an embedding and a head of their own, or with tables that are there; in rows
            where they are moved.
        device: where to; the weights themselves are returned if they are there, and lie as they
            should.

    Raises:
        MemoryError: the device has no room for them.
        ValueError: gate and up cannot be interleaved, or are to lie on the CPU and are.
    """
    source = weights.arena
    is_interleaved = device.is_gpu and weights.may_interleave
    if device.holds(source) and weights.is_interleaved == is_interleaved:
        return weights
    if weights.is_interleaved:
        raise ValueError(f"weights: expected as loaded, got a GPU's to be placed on {device}")
    try:
        arena = source.clone() if device.holds(source) else device.moved(source)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"no memory for {source.nbytes / 2**20:.0f} MiB of weights on {device}"
        ) from error

    def matrix(tensor: Matrix) -> torch.Tensor:
        assert isinstance(tensor, torch.Tensor), "rows are what is moved"
        start = tensor.data_ptr() - source.data_ptr()
        if not 0 <= start <= source.nbytes - tensor.nbytes:
            assert device.holds(tensor), "a view of the arena, or a table of another model there"
            return tensor
        return arena[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def vector(tensor: torch.Tensor) -> torch.Tensor:
        return device.moved(tensor)

    def layer(there: LayerWeights) -> LayerWeights:
        tensors = {field.name: getattr(there, field.name) for field in fields(there)}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        placed = {n: matrix(t) if len(t.shape) == 2 else vector(t) for n, t in given.items()}
        if is_interleaved:
            placed["gate_up"].copy_(interleaved(placed["gate_up"]))
            if "gate_up_bias" in placed:
                placed["gate_up_bias"] = interleaved(placed["gate_up_bias"])
        return replace(there, **placed)

    lm_head = matrix(weights.lm_head)
    names = "final_norm", "final_norm_bias", "head_bias", "positions"
    there = {name: getattr(weights, name) for name in names}
    outer: dict[str, Any] = {name: vector(t) for name, t in there.items() if t is not None}
    return replace(
        weights,
        arena=arena,
        embed=lm_head if weights.embed is weights.lm_head else matrix(weights.embed),
        layers=tuple(map(layer, weights.layers)),
        lm_head=lm_head,
        is_interleaved=is_interleaved,
        **outer,
    )
