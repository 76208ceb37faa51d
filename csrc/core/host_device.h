// Functions for host and device. `static`: kernel sources are compiled once per instruction set,
// with different -m flags, and the linker must not merge the copies.
#pragma once

#if defined(__CUDACC__)
#define SPECRT_HD __host__ __device__ static inline
#else
#define SPECRT_HD static inline
#endif
