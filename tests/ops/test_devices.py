"""Every launch is on its tensors' own device: two GPUs of the shim, the other one current."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from specrt import ops
from tests.ops.conftest import Backend, OnAnotherGpu, use_simt
from tests.ops.garbage_calls import KERNELS, Arguments

ROOT = Path(__file__).resolve().parents[2]
SIMT = Backend("simt", torch.device("cpu"))
VARIANT = 1

Call = Callable[[Arguments], object]


def norm_arguments() -> Arguments:
    x, weight = torch.randn(3, 64), torch.randn(64)
    return {"x": x, "weight": weight, "eps": 1e-5, "residual": x.clone(), "out": x.clone()}


def linear_arguments() -> Arguments:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(72, 64).bfloat16()
    residual = torch.randn(3, 72).bfloat16()
    workspace = torch.zeros(ops.linear_workspace(72, 64, 3))
    return {
        "x": x, "weight": weight, "bias": torch.randn(72), "residual": residual,
        "out": residual.clone(), "workspace": workspace,
    }  # fmt: skip


def activation_arguments() -> Arguments:
    return {"x": torch.randn(3, 64), "out": torch.zeros(3, 32)}


def layer_norm_arguments() -> Arguments:
    x, weight = torch.randn(3, 64), torch.randn(64)
    return {"x": x, "weight": weight, "bias": weight.clone(), "eps": 1e-5, "out": x.clone()}


def scale_arguments() -> Arguments:
    x = torch.randn(3, 64)
    return {"x": x, "factor": 0.5, "residual": x.clone(), "cap": 2.0, "out": x.clone()}


READ_NOTHING: dict[str, tuple[Callable[[], Arguments], Call]] = {
    "linear": (linear_arguments, lambda a: ops.linear(**a)),
    "rms_norm": (norm_arguments, lambda a: ops.rms_norm(**a)),
    "layer_norm": (layer_norm_arguments, lambda a: ops.layer_norm(**a)),
    "activate": (activation_arguments, lambda a: ops.activate(**a)),
    "scale_add": (scale_arguments, lambda a: ops.scale_add(**a)),
}
"""Kernels that read no contents, and so are not among ``KERNELS``."""
CALLS = [*READ_NOTHING, *(name for name, kernel in KERNELS.items() if kernel.has_cuda_source)]


@pytest.fixture
def simt(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = use_simt(1, monkeypatch.setattr)
    module.set_current_device(0)
    yield module
    module.set_device()
    module.set_current_device(0)


def call_of(name: str) -> tuple[Arguments, Call]:
    torch.manual_seed(0)
    if name in READ_NOTHING:
        make, call = READ_NOTHING[name]
        return make(), call
    return KERNELS[name].make(VARIANT, SIMT), KERNELS[name].call


def tensors_of(arguments: Arguments) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def on_another(arguments: Arguments) -> Arguments:
    there = {name: OnAnotherGpu(tensor) for name, tensor in tensors_of(arguments).items()}
    return arguments | there


def test_every_kernel_with_a_cuda_source_is_called_here() -> None:
    sources = {path.stem for path in (ROOT / "csrc").glob("*/*.cu")}
    kernels = sources & {path.stem for path in (ROOT / "csrc/bindings").glob("*.cpp")}
    ops_of = {
        "draft_control": ("draft_control", "draft_control_update"),
        "graph": (),
        "time_stamp": (),  # no two give the same: test_time_stamp.py
        "token_recycle": ("recycle_propose", "recycle_learn"),
        "tree_build": ("tree_expand", "tree_rerank"),
    }
    assert {op for kernel in kernels for op in ops_of.get(kernel, (kernel,))} <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_is_on_its_tensors_device(simt: ModuleType, name: str) -> None:
    arguments, call = call_of(name)
    expected, _ = call_of(name)
    call(expected)
    assert simt.last_device() == simt.current_device() == 0
    before = simt.num_launches()
    call(on_another(arguments))
    assert simt.num_launches() > before
    assert simt.last_device() == 1 and simt.current_device() == 0
    for argument, tensor in tensors_of(arguments).items():
        assert torch.equal(tensor.nan_to_num(7), expected[argument].nan_to_num(7)), argument
    simt.set_current_device(1)  # and the other way round
    call(call_of(name)[0])
    assert simt.last_device() == 0 and simt.current_device() == 1


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_that_throws_gives_the_device_back(simt: ModuleType, name: str) -> None:
    arguments, call = call_of(name)
    simt.break_device(0, "an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="kernel .*: an illegal memory access was encountered"):
        call(on_another(arguments))
    assert simt.last_device() == 1 and simt.current_device() == 0


@pytest.mark.parametrize("name", CALLS)
def test_each_tensor_on_another_device_is_named(simt: ModuleType, name: str) -> None:
    arguments, call = call_of(name)
    before, (first, *others) = simt.num_launches(), tensors_of(arguments)
    for other in others:
        mixed: Any = arguments | {other: OnAnotherGpu(arguments[other])}
        with pytest.raises(
            ValueError, match=r"^\w+: expected a tensor on cuda:[01] as \w+ is, got"
        ):
            call(mixed)
    assert simt.num_launches() == before, first


def test_a_stream_of_another_device_is_refused(simt: ModuleType) -> None:
    """By the shim, as by CUDA; so all that was launched above was on a stream of its own device."""
    out = torch.zeros(1)
    for current, stream in ((0, 0), (1, 1), (0, 1), (1, 0)):
        simt.set_current_device(current)
        if current == stream:
            simt.run_probe("on_stream_of", {"out": out}, [stream], block=[1])
            continue
        words = f"count_launch: launched on another device's stream while {current} is current"
        with pytest.raises(RuntimeError, match=words):
            simt.run_probe("on_stream_of", {"out": out}, [stream], block=[1])
    assert out.item() == 2


def test_there_are_two_gpus(simt: ModuleType) -> None:
    with pytest.raises(ValueError, match="device: expected 0 or 1, got 2"):
        simt.set_current_device(2)
    third: Any = OnAnotherGpu(torch.zeros(2, 4))
    third.device = torch.device("cuda", 2)
    with pytest.raises(ValueError, match="x: the shim has two GPUs, got a tensor on cuda:2"):
        ops.activate(third, torch.zeros(2, 2))
