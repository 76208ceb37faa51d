"""Where arguments lie: slices of wider tensors, and memory past what 32 bits can number."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import pytest
import torch

from tests.ops.conftest import Backend
from tests.ops.garbage_calls import KERNELS
from tests.ops.garbage_kernel import NUM_VARIANTS, Arguments, Kernel

Tensor = torch.Tensor
ON_GPUS = [name for name, kernel in KERNELS.items() if kernel.has_cuda_source]
TAKEN = {
    "kv_commit": {"block_table", "path"},
    "rope_append": {"block_table", "depth", "q", "k", "v"},
    "tree_attention": {"block_table", "ancestors", "q", "out"},
    "tree_attention_append": {"block_table", "ancestors", "depth", "q", "k", "v", "out"},
    "tree_accept": {"logits", "draft_probs", "history"},
    "tree_expand": {"logits"},
    "tree_settle": {
        "draft_tokens", "parents", "settled_tokens", "settled_parents", "depth", "ancestors",
    },
    "recycle_propose": {"draft_tokens"},
    "recycle_learn": {"logits", "draft_tokens", "path"},
    "history_append": {
        "depth", "path", "tokens", "logprobs", "stop_ids", "history", "report",
    },
    "history_tail": {"history", "tokens"},
    "draft_pairs": {"taps", "path", "history", "features", "tokens", "bits"},
    "prompt_lookup": {"history", "draft_tokens", "parents"},
    "draft_control": {"evidence"},
    "draft_control_update": set(),
    "embed": {"table", "out"},
    "embed_positions": {"table", "out", "positions", "depth"},
    "linear_maxima": {"x", "logits"},
    "feature_sample": {"features", "embed", "out"},
    "linear_operands": {"x", "second", "gate", "residual", "out"},
}  # fmt: skip
"""Which of a kernel's arguments may be slices; all others are refused by name."""
CPU = Backend("cpu", torch.device("cpu"))
PAGES = {"kv": 2, "k_cache": 0, "v_cache": 0}
"""Which dimension of a cache counts its pages."""
MANY = 2**32
"""Elements: more than 32 bits can number, signed or not."""
MAP_NORESERVE = 0x4000  # Linux's; mmap names it from Python 3.13 on


def made(kernel: Kernel, variant: int, backend: Backend) -> Arguments:
    """Valid arguments, where the backend has them."""
    return {
        name: a.to(backend.device) if isinstance(a, Tensor) else a
        for name, a in kernel.make(variant, backend).items()
    }


def matrices(kernel: Kernel, variant: int, backend: Backend) -> Iterator[tuple[str, Arguments]]:
    """The name of each argument that has several dimensions, and a call's arguments."""
    for name, a in made(kernel, variant, backend).items():
        if isinstance(a, Tensor) and a.ndim > 1:
            yield name, made(kernel, variant, backend)


def is_taken(kernel: Kernel, arguments: Arguments, name: str) -> bool:
    """Whether a call takes an argument; if not, it has to say which one it refuses."""
    try:
        kernel.call(arguments)
    except ValueError as error:
        if not str(error).startswith(f"{name}:"):
            raise
        return False
    return True


def results_of(kernel: Kernel, arguments: Arguments) -> list[Tensor]:
    """What the kernel has written, as bytes."""
    names = [name for name in (*kernel.results, *kernel.pages) if arguments[name] is not None]
    return [arguments[name].contiguous().view(torch.uint8) for name in names]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def called(kernel: Kernel, variant: int, backend: Backend) -> list[Tensor]:
    arguments = made(kernel, variant, backend)
    kernel.call(arguments)
    return results_of(kernel, arguments)


# --- slices


def in_wider(tensor: Tensor, dim: int) -> Tensor:
    """A tensor with eight more on either side, of which ``[8:-8]`` along ``dim`` is the given one;
    so its rows stay at multiples of 16 bytes."""
    shape = list(tensor.shape)
    shape[dim] += 16
    poison = math.nan if tensor.is_floating_point() else 1
    wider = torch.full(shape, poison, dtype=tensor.dtype, device=tensor.device)
    inner(wider, dim).copy_(tensor)
    return wider


def inner(wider: Tensor, dim: int) -> Tensor:
    return wider.narrow(dim, 8, wider.shape[dim] - 16)


def check_slices(kernel: Kernel, variant: int, backend: Backend) -> set[str]:
    """Slices are taken for what they are, or refused by name; those that are taken."""
    expected, taken = called(kernel, variant, backend), set()
    for name, arguments in matrices(kernel, variant, backend):
        for dim in range(1, arguments[name].ndim):
            given = made(kernel, variant, backend)
            wider = in_wider(arguments[name], dim)
            given[name] = inner(wider, dim)
            if not is_taken(kernel, given, name):
                continue
            assert same(results_of(kernel, given), expected), (name, dim)
            around = in_wider(inner(wider, dim), dim)
            assert same([around.view(torch.uint8)], [wider.view(torch.uint8)]), (name, dim)
            taken.add(name)
    return taken


@pytest.mark.parametrize("name", ON_GPUS)
def test_slices_of_wider_tensors(backend: Backend, name: str) -> None:
    if name.startswith("linear_") and not backend.runs_cuda_source:
        pytest.skip("of a GPU alone")
    # A workspace of one part is contiguous wherever it lies.
    taken = check_slices(KERNELS[name], 1, backend) - {"workspace"}
    assert taken == TAKEN.get(name, set())


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ON_GPUS])
def test_slices_of_wider_tensors_on_the_cpu(name: str) -> None:
    taken = (check_slices(KERNELS[name], variant, CPU) for variant in range(NUM_VARIANTS))
    assert set().union(*taken) - {"workspace"} == TAKEN.get(name, set())


# --- far apart


def untouched(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, any number of them: what nobody touches takes no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags), dtype=dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_far_apart(name: str) -> None:
    """``MANY`` elements lie between the first and the last one of the first dimension."""
    kernel = KERNELS[name]
    expected = called(kernel, 1, CPU)
    for argument, arguments in matrices(kernel, 1, CPU):
        tensor = arguments[argument]
        step = MANY // max(len(tensor) - 1, 1) + tensor[0].numel()
        room = untouched(len(tensor) * step, tensor.dtype)
        strides = step, *tensor[0].stride()
        arguments[argument] = room.as_strided(tensor.shape, strides).copy_(tensor)
        if is_taken(kernel, arguments, argument):
            assert same(results_of(kernel, arguments), expected), argument


def at_the_end(cache: Tensor, dim: int) -> Tensor:
    """A cache of ``MANY`` elements whose last pages are the given ones."""
    shape = list(cache.shape)
    shape[dim] += MANY * cache.shape[dim] // cache.numel()
    if cache.device.type == "cpu":
        large = untouched(math.prod(shape), cache.dtype).view(shape)
    else:
        large = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
    last(large, cache, dim).copy_(cache)
    return large


def last(large: Tensor, cache: Tensor, dim: int) -> Tensor:
    count = cache.shape[dim]
    return large.narrow(dim, large.shape[dim] - count, count)


@pytest.mark.parametrize("name", [name for name in ON_GPUS if "block_table" in KERNELS[name].own])
def test_pages_at_the_end_of_a_large_cache(name: str, device: torch.device) -> None:
    """8 GiB a cache, keys and values each. Not under the shim, which copies whole tensors."""
    kernel, backend = KERNELS[name], Backend(device.type, device)
    near, far = (made(kernel, 1, backend) for _ in range(2))
    caches = {n: dim for n, dim in PAGES.items() if n in near}
    for n, dim in caches.items():
        far[n] = at_the_end(near[n], dim)
        far["block_table"] = near["block_table"] + far[n].shape[dim] - near[n].shape[dim]
    for arguments in (near, far):
        kernel.call(arguments)
    written = [n for n in kernel.results if n not in caches]
    assert all(same([near[n].view(torch.uint8)], [far[n].view(torch.uint8)]) for n in written)
    for n, dim in caches.items():
        assert torch.equal(last(far[n], near[n], dim), near[n])
        assert not far[n].narrow(dim, 0, near[n].shape[dim]).any()
