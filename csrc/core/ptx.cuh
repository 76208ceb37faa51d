// All PTX there is, each instruction behind a function that the shim (tests/simt) has a twin of.
// Layouts of fragments are those of the PTX ISA, section "Matrix fragments for mma.m16n8k16".
#pragma once
#include "core/launch.cuh"

namespace specrt::ptx {

#if defined(SPECRT_SIMT)

using simt::cp_async_16;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::evict_first;
using simt::evict_last;
using simt::evict_normal;
using simt::exp2_approx;
using simt::global_timer;
using simt::ldmatrix_x1;
using simt::ldmatrix_x1_trans;
using simt::ldmatrix_x2;
using simt::ldmatrix_x2_trans;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;
using simt::let_next_start;
using simt::mma_m16n8k16;
using simt::wait_for_previous;

#else

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, both 16-byte aligned; there once a wait has passed. With
// `is_read` false nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool is_read = true) {
    const int bytes = is_read ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}

// Policies for lines of the L2 cache: which are given up first.
#define SPECRT_POLICY(name)                                                         \
    __device__ __forceinline__ uint64_t name() {                                    \
        uint64_t policy;                                                            \
        asm("createpolicy.fractional.L2::" #name ".b64 %0, 1.0;\n" : "=l"(policy)); \
        return policy;                                                              \
    }
SPECRT_POLICY(evict_first)
SPECRT_POLICY(evict_normal)
SPECRT_POLICY(evict_last)
#undef SPECRT_POLICY

// As above; lines that are read come under `policy`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool is_read,
                                            uint64_t policy) {
    const int bytes = is_read ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until at most `kPending` of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Lanes 8i .. 8i + 7 give the rows' addresses (16 bytes each) of 8 x 8 matrix i.
#define SPECRT_LDMATRIX(name, count, trans, outputs, address, ...)                       \
    __device__ __forceinline__ void name(uint32_t (&r)[count], const void* row) {        \
        asm volatile("ldmatrix.sync.aligned.m8n8.x" #count trans ".shared.b16 {" outputs \
                     "}, [" address "];\n"                                               \
                     : __VA_ARGS__                                                       \
                     : "r"(shared_address(row))                                          \
                     : "memory");                                                        \
    }
SPECRT_LDMATRIX(ldmatrix_x1, 1, "", "%0", "%1", "=r"(r[0]))
SPECRT_LDMATRIX(ldmatrix_x1_trans, 1, ".trans", "%0", "%1", "=r"(r[0]))
SPECRT_LDMATRIX(ldmatrix_x2, 2, "", "%0, %1", "%2", "=r"(r[0]), "=r"(r[1]))
SPECRT_LDMATRIX(ldmatrix_x2_trans, 2, ".trans", "%0, %1", "%2", "=r"(r[0]), "=r"(r[1]))
SPECRT_LDMATRIX(ldmatrix_x4, 4, "", "%0, %1, %2, %3", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
                "=r"(r[3]))
SPECRT_LDMATRIX(ldmatrix_x4_trans, 4, ".trans", "%0, %1, %2, %3", "%4", "=r"(r[0]), "=r"(r[1]),
                "=r"(r[2]), "=r"(r[3]))
#undef SPECRT_LDMATRIX

// c (16 x 8, float32) += a (16 x 16, row-major) b (16 x 8, column-major); the last argument only
// tells the type of a and b.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], bf16_t) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], f16_t) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Launches that overlap (core/launch.cuh; compute capability 9.0 on). Until `wait_for_previous` has
// returned nothing may be read that an earlier launch writes, nor written that one reads or writes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Lets the next launch start once all blocks of this one have come here or ended. It makes nothing
// visible: that is for the next one's wait.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Nanoseconds, the same on all of a GPU.
__device__ __forceinline__ uint64_t global_timer() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(nanoseconds));
    return nanoseconds;
}

// 2^x to 2 ulp; 2^-inf is 0, 2^0 is 1.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

#endif

}  // namespace specrt::ptx
