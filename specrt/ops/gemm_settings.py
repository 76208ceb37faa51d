"""What cuBLAS' choice of an algorithm rests on beside shapes and addresses: settings of torch's.

A row's bits follow the algorithm. Settings under which a clock makes the choice, or another library
than the one the GPU tests look at, are refused; the others must stay what they are.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class GemmSettings(NamedTuple):
    """Of one process, at one time: under equal settings equal calls give equal bits."""

    dtype: torch.dtype
    """Of the operands."""
    may_narrow: bool
    """May an algorithm keep partial sums in that dtype; with float32 results, as ours are, none
    has been seen to, but cuBLAS is told."""
    sm_carveout: int | None
    """Multiprocessors that products leave to others."""
    workspace: int | str
    """Bytes of cuBLAS' workspace where torch tells them (since 2.12), else what the environment
    asks for; ``"default"`` is 32 MiB on compute capability 9.0 and about 8 MiB on 8.x."""

    @classmethod
    def current(cls, dtype: torch.dtype) -> GemmSettings:
        """Those of this process, if rows are independent of one another under them.

        Args:
            dtype: of the operands.

        Raises:
            ValueError: TunableOp is on, another library than cuBLAS is preferred, float16 sums are
                kept in float16, or K must not be split; says how to turn that back.
        """
        _refuse_other_choosers()
        _refuse_what_torch_would(dtype)
        return cls(
            dtype,
            may_narrow=_matmul(_narrowing(dtype), True),
            sm_carveout=getattr(torch._C, "_get_sm_carveout_experimental", lambda: None)(),
            workspace=_workspace(),
        )

    def require_unchanged(self) -> None:
        """Check that they still hold; some microseconds.

        Raises:
            ValueError: one has changed, or as for :meth:`current`.
        """
        now = GemmSettings.current(self.dtype)
        if now != self:
            raise ValueError(
                f"torch's settings of matrix products were {self} when the model was made and are "
                f"{now}: rows would get other bits. Set them before loading, and leave them"
            )


def gemm_facts() -> dict[str, bool | int | str]:
    """What belongs beside figures of matrix products; nothing is refused."""
    return {"library": _library(), "tunable_op": _has_tunable_op(), "workspace": _workspace()}


def _refuse_other_choosers() -> None:
    if _has_tunable_op():
        raise ValueError(
            "TunableOp: expected off, it is on (PYTORCH_TUNABLEOP_ENABLED=1 or "
            "torch.cuda.tunable.enable()): it picks matrix products by measured time, so a row's "
            "bits would change from run to run; torch.cuda.tunable.enable(False) turns it off"
        )
    library = _library()
    if library not in ("Default", "Cublas"):
        raise ValueError(
            f"preferred BLAS library: expected cuBLAS, got {library} (TORCH_BLAS_PREFER_CUBLASLT=1 "
            "or torch.backends.cuda.preferred_blas_library()): linear is tested with cuBLAS; "
            "torch.backends.cuda.preferred_blas_library('cublas') goes back to it"
        )


def _refuse_what_torch_would(dtype: torch.dtype) -> None:
    """Before a forward pass, and in words that say what to do."""
    if dtype == torch.float16 and _matmul("allow_fp16_accumulation", False):
        raise ValueError(
            "torch.backends.cuda.matmul.allow_fp16_accumulation: expected False, got True: "
            "linear's sums are float32"
        )
    name = _narrowing(dtype)
    if not _matmul(f"{name}_split_k", True):
        raise ValueError(
            f"torch.backends.cuda.matmul.{name}: expected allow_splitk=True, got False, which only "
            "cuBLASLt can do; linear is cuBLAS"
        )


def _library() -> str:
    return str(torch.backends.cuda.preferred_blas_library()).rpartition(".")[2]


def _has_tunable_op() -> bool:
    try:
        return torch.cuda.tunable.is_enabled()
    except AttributeError:  # a torch without CUDA has none
        return False


def _matmul(name: str, otherwise: bool) -> bool:
    """A setting of torch's matrix products; what versions and dtypes do that lack it."""
    return bool(getattr(torch.backends.cuda.matmul, name, otherwise))


def _narrowing(dtype: torch.dtype) -> str:
    return f"allow_{_SHORT.get(dtype, 'fp32')}_reduced_precision_reduction"


def _workspace() -> int | str:
    size = getattr(torch._C, "_cuda_getCublasWorkspaceSize", None)
    return int(size()) if size else os.environ.get(WORKSPACE_VARIABLE, "default")
