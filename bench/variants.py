"""Ways to do the same work on a GPU, measured against the one in use, and the winners put to use.

Without ``--record``: for each shape all variants in one process, in turn, over inputs that rotate;
the one in use twice, which shows how far two measurements of the same thing lie apart (spread). A
variant wins where it is quicker by more than twice the spread and by more than 2 %; ties go to the
one in use. All give the same bits, which is looked at first. Saved as ``variants_<GPU>.json``, of
``--kernel linear`` as ``linear_variants_<GPU>.json``.

``--record FILE`` writes the winners of such a file into the table that launches are planned by.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from bench import attention_variants, gpu, linear_variants
from bench.gpu import Device
from bench.gpu_report import run_bench
from bench.harness import parser, start
from bench.probes.report import file_name
from bench.variant_table import Tabled, record

KERNELS: dict[str, ModuleType] = {
    "tree_attention": attention_variants,
    "linear": linear_variants,
}
"""Each has ``TABLED``, ``cases``, ``one_case`` and ``once``."""


def main() -> None:
    arguments = parser(__doc__)
    gpu.add_arguments(arguments)
    arguments.set_defaults(device="cuda")
    arguments.add_argument("--kernel", choices=list(KERNELS), default="tree_attention")
    arguments.add_argument("--record", type=Path, metavar="FILE", help="instead of measuring")
    arguments.add_argument("--only", metavar="CASE", help="shapes whose name contains this")
    arguments.add_argument("--once", action="store_true", help="one launch, for a profiler")
    args = start(arguments)
    if args.record:
        record(args.record, [module.TABLED for module in KERNELS.values()])
        return
    torch.manual_seed(0)
    device, kernel = gpu.chosen_device(args), KERNELS[args.kernel]
    chosen = [case for case in kernel.cases(args.quick, device) if (args.only or "") in str(case)]
    if not chosen:
        raise SystemExit(f"--only: no shape's name contains {args.only!r}")
    if args.once:
        kernel.once(chosen[0], device)
        return
    run_bench(result_name(kernel.TABLED, device), chosen, kernel.one_case, args, device)


def result_name(tabled: Tabled, device: Device) -> str:
    """``variants_h100_80gb_hbm3``, say."""
    return file_name(tabled.prefix, str(device.facts()["device"]).split(":")[0])


if __name__ == "__main__":
    main()
