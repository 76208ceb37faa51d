"""What the compiled CUDA kernels need, and that none of them goes to memory for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import resources

CUOBJDUMP = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN6specrt12_GLOBAL__N_11kI13__nv_bfloat16Li64EEEvNS_1PE:
  REG:32 STACK:0 SHARED:128 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN6specrt12_GLOBAL__N_11kI6__halfLi64EEEvNS_1PE:
  REG:40 STACK:8 SHARED:128 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Function _Z5plainPf:
  REG:10 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_80'
ptxas info    : Function properties for _Z5spillPf
    168 bytes stack frame, 176 bytes spill stores, 172 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_90a'
ptxas info    : Function properties for _Z5plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


def test_parsing_cuobjdump() -> None:
    found = resources.parse_cuobjdump(CUOBJDUMP)
    facts = [(one.arch, one.registers, one.shared, one.stack, one.local) for one in found]
    assert facts == [("sm_80", 32, 128, 0, 0), ("sm_80", 40, 128, 8, 0), ("sm_90a", 10, 0, 0, 0)]
    assert found[2].kernel == "_Z5plainPf"


def test_parsing_ptxas() -> None:
    assert resources.parse_ptxas(PTXAS) == [
        resources.Resources("_Z5spillPf", "sm_80", 32, 64, 168, 348),
        resources.Resources("_Z5plainPf", "sm_90a", 10, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void specrt::(anonymous namespace)::norm<__nv_bfloat16, 4>(specrt::Params)",
            "norm<bf16, 4>",
        ),
        ("void specrt::a<(int)64, (bool)1, __half>(specrt::P, int)", "a<64, 1, f16>"),
        ("plain(float*)", "plain"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert resources.short_name(name) == short


def test_table_of_resources() -> None:
    one = resources.Resources("k<bf16>", "sm_80", 32, 128, 0, 0)
    other = replace(one, kernel="k<f16>", registers=40, stack=8)
    assert resources.table([one, other]).splitlines()[2:] == [
        "| `k` | sm_80 | 2 | 32–40 | 128 | 0–8 | 0 |"
    ]
    detailed = resources.table([one, other], is_detailed=True).splitlines()
    assert detailed[2] == "| `k<bf16>` | sm_80 | 1 | 32 | 128 | 0 | 0 |" and len(detailed) == 4
    spills = ["k<f16> (sm_80): 8 bytes of stack, 0 of local memory"]
    assert resources.in_memory([one, other]) == spills
    assert json.loads(resources.summary([one, other])) == {"kernels": 2, "spills": spills}


def test_files_that_the_shim_compiles_are_left_out() -> None:
    compilers = ("/bin/c++", "/cuda/bin/nvcc", "/bin/ccache /cuda/bin/nvcc")
    entries = [{"command": f"{compiler} -c a.cu"} for compiler in compilers]
    assert resources.nvcc_commands(entries) == 2 * [["/cuda/bin/nvcc", "-c", "a.cu"]]


def test_outputs_of_a_compile_command_are_left_out() -> None:
    command = ["nvcc", "-O3", "-MD", "-MT", "a.o", "-MF", "a.d", "-x", "cu", "-c", "a.cu"]
    kept = list(resources.without_output([*command, "-o", "a.o"]))
    assert kept == ["nvcc", "-O3", "-x", "cu", "-c", "a.cu"]


def test_no_kernel_of_the_build_uses_the_stack() -> None:
    try:
        found = resources.from_extension()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip("this build has no CUDA kernels")
    assert resources.in_memory(found) == []
