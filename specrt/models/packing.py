"""How a model's matrices are kept: row by row or, on the CPU, as its kernels stream them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from specrt.ops import Matrix, MatrixKind, PackedMatrix
from specrt.ops.build import build_info

ACTIVATIONS: Mapping[str, MatrixKind | None] = {
    "split": MatrixKind.BF16_SPLIT,
    "bfloat16": MatrixKind.BF16_ROUNDED,
    "float32": None,
}
"""What rows are made of before bfloat16 weights multiply them; of float32 these lie in rows."""
QUANTIZED: Mapping[str, MatrixKind | None] = {"int8": MatrixKind.INT8, "none": None}
"""What weights can be rounded to as they are loaded; None: to nothing, a file's blocks included."""

Form = torch.dtype | MatrixKind
"""Of a matrix: rows of a dtype, or packed."""


@dataclass(frozen=True)
class Packing:
    """How the matrices of a checkpoint are kept."""

    bfloat16: MatrixKind | None = None
    """Those of that dtype; None: in rows."""
    quantized: MatrixKind | None = None
    """All of them, whatever their dtype; None: they are not rounded."""
    keeps_blocks: bool = False
    """Whether a file's blocks stay blocks; otherwise they become rows of their values."""

    def form_of(self, dtype: torch.dtype) -> Form:
        """Of a matrix that would be rows of ``dtype``."""
        if self.quantized is not None:
            return self.quantized
        return self.bfloat16 if self.bfloat16 and dtype == torch.bfloat16 else dtype

    def of_drafters(self, head: Matrix) -> Packing:
        """That of a drafter's own layers, which are small: rows are rounded, for half of the
        products and no token, and so are weights beside a target in bytes, of whose pass they would
        else be twice the share. A matrix unit makes several rows of bf16 cheaper than of bytes.

        Args:
            head: the target's.
        """
        of_bfloat16 = MatrixKind.BF16_SPLIT, MatrixKind.BF16_ROUNDED
        is_of_bytes = isinstance(head, PackedMatrix) and head.kind not in of_bfloat16
        if is_of_bytes and build_info().active_isa != "amx":
            return Packing(quantized=MatrixKind.INT8)
        rounded = None if self.bfloat16 is None else MatrixKind.BF16_ROUNDED
        return Packing(rounded, None, self.keeps_blocks)


ROWS = Packing()
"""What a GPU takes, and who computes with weights by other means."""


def choose_packing(
    dtype: torch.dtype, device: torch.device, quantize: str | None, activations: str | None
) -> Packing:
    """How a target is kept where it runs.

    Args:
        dtype: of its weights.
        device: as :func:`specrt.models.placement.parse_device` gives it.
        quantize: a key of :data:`QUANTIZED`, or None.
        activations: a key of :data:`ACTIVATIONS`; None: ``"split"`` on the CPU.

    Raises:
        ValueError: no such key, or what only the CPU's kernels or only weights of another kind
            have.
    """
    for name, value, known in (
        ("quantize", quantize, QUANTIZED),
        ("activations", activations, ACTIVATIONS),
    ):
        if value is not None and value not in known:
            expected = f"one of {', '.join(known)}" if len(known) > 1 else next(iter(known))
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if value not in (None, "none") and device.type != "cpu":
            raise ValueError(f"{name}: {value!r} is for the CPU's kernels, the device is {device}")
    quantized = None if quantize is None else QUANTIZED[quantize]
    if quantized is not None and activations is not None:
        raise ValueError(
            f"activations: {activations!r} is of bfloat16 weights, got quantize={quantize!r}"
        )
    if activations in ("split", "bfloat16") and dtype != torch.bfloat16:
        raise ValueError(
            f"activations: {activations!r} is of bfloat16 weights, the target's are "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if device.type != "cpu":
        return ROWS
    return Packing(ACTIVATIONS[activations or "split"], quantized, keeps_blocks=quantize is None)
