"""Torch's settings that cuBLAS' choice follows; none of it needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specrt.ops import GemmSettings, gemm_settings, linear

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def matmul(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of ``torch.backends.cuda.matmul``; without an attribute, as older versions are."""
    settings = SimpleNamespace()
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    return settings


def prefer(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    found = f"_BlasBackend.{library}"
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: found)


def tunable_op_is(monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: is_on)


def test_a_usual_process() -> None:
    settings = GemmSettings.current(BF16)
    assert (settings.dtype, settings.may_narrow, settings.sm_carveout) == (BF16, True, None)
    settings.require_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_tunable_op_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tunable_op_is(monkeypatch, False)
    settings = GemmSettings.current(dtype)
    tunable_op_is(monkeypatch, True)
    for ask in (lambda: GemmSettings.current(dtype), settings.require_unchanged):
        with pytest.raises(ValueError, match=r"TunableOp: .*PYTORCH_TUNABLEOP_ENABLED.*enable\(F"):
            ask()


@pytest.mark.parametrize("library", ["Cublaslt", "Ck"])
def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    for usual in ("Default", "Cublas"):
        prefer(monkeypatch, usual)
        settings = GemmSettings.current(BF16)
    prefer(monkeypatch, library)
    for ask in (lambda: GemmSettings.current(BF16), settings.require_unchanged):
        with pytest.raises(ValueError, match=f"expected cuBLAS, got {library} .*'cublas'"):
            ask()


def test_torch_names_the_libraries_so() -> None:
    names = {str(library) for library in torch._C._BlasBackend.__members__.values()}
    assert {f"_BlasBackend.{name}" for name in ("Default", "Cublas", "Cublaslt")} <= names
    assert str(torch.backends.cuda.preferred_blas_library()) in names


@pytest.mark.parametrize(
    ("dtype", "name", "value", "words"),
    [
        (FP16, "allow_fp16_accumulation", True, "allow_fp16_accumulation: expected False"),
        (
            BF16,
            "allow_bf16_reduced_precision_reduction_split_k",
            False,
            "allow_bf16_reduced_precision_reduction: expected allow_splitk=True",
        ),
        (
            FP16,
            "allow_fp16_reduced_precision_reduction_split_k",
            False,
            "allow_fp16_reduced_precision_reduction: expected allow_splitk=True",
        ),
    ],
)
def test_what_torch_cannot_do_with_float32_sums(
    matmul: SimpleNamespace, dtype: torch.dtype, name: str, value: bool, words: str
) -> None:
    GemmSettings.current(dtype)
    setattr(matmul, name, value)
    with pytest.raises(ValueError, match=f"torch.backends.cuda.matmul.{words}"):
        GemmSettings.current(dtype)
    GemmSettings.current(BF16 if dtype == FP16 else FP16)  # no business of the other type's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"may_narrow": False}, "may_narrow=True.*may_narrow=False"),
        ({"sm_carveout": 8}, "sm_carveout=None.*sm_carveout=8"),
        ({"workspace": ":16:8"}, "workspace=':4096:8'.*workspace=':16:8'"),
        ({"workspace": 1 << 20}, "workspace=':4096:8'.*workspace=1048576"),
    ],
)
def test_a_change_is_refused(
    monkeypatch: pytest.MonkeyPatch, matmul: SimpleNamespace, change: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv(gemm_settings.WORKSPACE_VARIABLE, ":4096:8")
    monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: None, raising=False)
    settings = GemmSettings.current(BF16)
    settings.require_unchanged()
    for name, value in change.items():
        if name == "may_narrow":
            matmul.allow_bf16_reduced_precision_reduction = value
        elif name == "sm_carveout":
            monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda v=value: v)
        elif isinstance(value, str):
            monkeypatch.setenv(gemm_settings.WORKSPACE_VARIABLE, value)
        else:  # as torch tells it since 2.12
            name = "_cuda_getCublasWorkspaceSize"
            monkeypatch.setattr(torch._C, name, lambda v=value: v, raising=False)
    with pytest.raises(ValueError, match=f"{words}.*before loading"):
        settings.require_unchanged()


class OnAGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_a_lone_call_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is handed a workspace leaves it to who made that."""
    x, weight = torch.randn(2, 8).as_subclass(OnAGpu), torch.randn(3, 8)
    linear(x, weight)
    tunable_op_is(monkeypatch, True)
    with pytest.raises(ValueError, match="TunableOp"):
        linear(x, weight)
    workspace = torch.empty(1 << 16, dtype=torch.uint8)
    linear(x, weight, workspace=workspace)
