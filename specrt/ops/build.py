"""How the extension was built and what of it runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from specrt import _C


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
    )
