// Which instruction set runs. Every CPU kernel is one source compiled once per set, in a namespace
// of the set's name; all sets give the same bits (see core/simd.h), so the choice is speed alone.
#pragma once
#include "core/check.h"

namespace specrt {

// Each has what those before it have. Those from kAvx512Vnni on have kernels of their own for
// products by packed matrices alone: of bytes, of bfloat16, of both.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };
constexpr Isa kAllIsas[] = {Isa::kPortable,   Isa::kAvx2,       Isa::kAvx512,
                            Isa::kAvx512Vnni, Isa::kAvx512Bf16, Isa::kAmx};

Isa active_isa();                // the best this CPU has, or what set_isa / SPECRT_ISA chose
void set_isa(const char* name);  // by isa_name; throws if the CPU lacks it
const char* isa_name(Isa isa);
// Whether it may run. Of kAmx the first call asks Linux for tile registers, once for the process.
bool cpu_has(Isa isa);
// Why a set that the CPU has may not run, nullptr if there is none.
const char* refused_isa();

// A launch's body: does share `part` of `num_parts` of the work that `params` describes.
using PartFn = void (*)(const void* params, int part, int num_parts);

// A cudaStream_t, which host code need not know.
using CudaStream = void*;
// A launch's body on a GPU: starts kernels on the stream for what `params` describes.
using CudaFn = void (*)(const void* params, CudaStream stream);

}  // namespace specrt

#if defined(SPECRT_X86)
#define SPECRT_DECLARE_CPU(fn)                                                                 \
    namespace portable {                                                                       \
    void fn(const void*, int, int);                                                            \
    }                                                                                          \
    namespace avx2 {                                                                           \
    void fn(const void*, int, int);                                                            \
    }                                                                                          \
    namespace avx512 {                                                                         \
    void fn(const void*, int, int);                                                            \
    }                                                                                          \
    inline PartFn fn##_for(Isa isa) {                                                          \
        return isa >= Isa::kAvx512 ? avx512::fn : isa == Isa::kAvx2 ? avx2::fn : portable::fn; \
    }
#else
#define SPECRT_DECLARE_CPU(fn)      \
    namespace portable {            \
    void fn(const void*, int, int); \
    }                               \
    inline PartFn fn##_for(Isa) {   \
        return portable::fn;        \
    }
#endif

// SPECRT_CUDA_KERNELS: the .cu files are part of this module (by nvcc, or through the SIMT shim).
#if defined(SPECRT_CUDA_KERNELS)
#define SPECRT_DECLARE_CUDA(fn) void fn(const void* params, ::specrt::CudaStream stream);
#else
#define SPECRT_DECLARE_CUDA(fn)                                                        \
    inline void fn(const void*, ::specrt::CudaStream) {                                \
        ::specrt::fail("this build of specrt has no CUDA kernels: see `specrt info`"); \
    }
#endif
