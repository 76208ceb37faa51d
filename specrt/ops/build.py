"""How the extension was built and what of it runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from specrt import _C

_DRIVERS = {11: 450, 12: 525, 13: 580}
"""By the toolkit's major version: the first release of the driver that is of it."""


@dataclass(frozen=True)
class BuildInfo:
    """Facts about the compiled extension."""

    version: str
    """specrt's version when it was compiled."""
    compiler: str
    cuda: str | None
    """Version of the CUDA toolkit whose kernels are in it; None if it was built without."""
    cuda_archs: str | None
    cpu_isas: tuple[str, ...]
    """Instruction sets this CPU has and the extension has kernels for."""
    active_isa: str
    """The one that runs: the best, or what ``SPECRT_ISA`` asks for."""
    refused_isa: str | None
    """Which the CPU has and may not run, and why; None if there is none."""

    @property
    def least_driver(self) -> str | None:
        """The oldest NVIDIA driver that its CUDA kernels run with; None if there are none.

        Within a major version of the toolkit any driver of that version will do.
        """
        if self.cuda is None:
            return None
        major = int(self.cuda.split(".")[0])
        release = _DRIVERS.get(major)
        return f"a driver of CUDA {major}" + (f", release {release} or newer" if release else "")


def build_info() -> BuildInfo:
    """Facts about the compiled extension on this machine.

    Raises:
        ValueError: ``SPECRT_ISA`` names an instruction set that is unknown or that the CPU lacks.
    """
    facts = _C.build_info()
    return BuildInfo(
        version=str(facts["version"]),
        compiler=str(facts["compiler"]),
        cuda=facts["cuda"],
        cuda_archs=facts["cuda_archs"],
        cpu_isas=tuple(facts["cpu_isas"]),
        active_isa=str(facts["active_isa"]),
        refused_isa=facts["refused_isa"],
    )
