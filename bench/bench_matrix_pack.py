"""Packing rows of weights for the CPU, beside torch's copy of the same bytes."""

from __future__ import annotations

import torch

from bench.harness import measure_interleaved, parser, ratio_to, report, start
from specrt import ops
from specrt.ops import MatrixKind, PackedMatrix

SHAPES = ((8192, 2048), (2048, 8192))


def main() -> None:
    """Measure and report."""
    args = start(parser(__doc__))
    rows = []
    for shape in SHAPES:
        source = torch.randn(shape).bfloat16()
        matrix = PackedMatrix.empty(MatrixKind.BF16_SPLIT, *shape)
        copy = torch.empty_like(source)
        calls = {
            "pack": lambda source=source, matrix=matrix: ops.matrix_pack(source, matrix),
            "copy": lambda source=source, copy=copy: copy.copy_(source),
        }
        seconds = measure_interleaved(calls, min_time=0, rounds=3 if args.quick else 30)
        rows.append(
            {
                "shape": f"{shape[0]} x {shape[1]}",
                "ms": 1e3 * seconds["pack"],
                "GB/s": 2 * source.nbytes / seconds["pack"] / 1e9,
                "torch/ours": ratio_to(seconds["copy"], seconds["pack"]),
            }
        )
    report("matrix_pack", rows, save=args.save)


if __name__ == "__main__":
    main()
