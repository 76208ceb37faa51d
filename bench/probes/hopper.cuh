// PTX that core/ptx.cuh has not: Hopper's own instructions, and copies with a hint for the L2
// cache. Where device code is not compiled for sm_90a they do nothing, and no probe launches what
// needs them (Device::has_hopper).
#pragma once
#include <cuda.h>

#include <cstdint>

#include "core/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PROBES_HOPPER 1
#else
#define PROBES_HOPPER 0
#endif

namespace probes {

using specrt::ptx::shared_address;

__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time)::"memory");
    return time;
}

// --- L2 hints --------------------------------------------------------------------------------

// The policy that lines read once should be the first to go.
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

template <bool kHint>
__device__ __forceinline__ uint4 load_16(const uint4* global, uint64_t policy) {
    uint4 v;
    if constexpr (kHint)
        asm volatile(
            "ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(global), "l"(policy));
    else
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(global));
    return v;
}

template <bool kHint>
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, uint64_t policy) {
    if constexpr (kHint)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                         shared_address(shared)),
                     "l"(global), "l"(policy)
                     : "memory");
    else
        specrt::ptx::cp_async_16(shared, global);
}

// --- programmatic launches -------------------------------------------------------------------

// The next kernel of the stream may begin where it was launched so.
__device__ __forceinline__ void let_next_start() {
#if PROBES_HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and its writes can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if PROBES_HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- mbarriers and bulk copies ---------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
#if PROBES_HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
#endif
}

// After barrier_init, before __syncthreads(): the copy engine sees the barriers too.
__device__ __forceinline__ void barrier_init_fence() {
#if PROBES_HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// One arrival, and so many bytes to come before the phase is over.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
#if PROBES_HOPPER
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
#endif
}

// Until the phase of this parity (0 for the first) is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
#if PROBES_HOPPER
    asm volatile(
        "{\n"
        ".reg .pred is_over;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_over, [%0], %1;\n"
        "@!is_over bra WAIT;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// Shared memory written by this thread's stores, for what the tensor core reads after a barrier.
__device__ __forceinline__ void fence_for_async() {
#if PROBES_HOPPER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Consecutive bytes; addresses and count are multiples of 16. Completes on the barrier.
template <bool kHint>
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          uint64_t* barrier, uint64_t policy) {
#if PROBES_HOPPER
    if constexpr (kHint)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
            "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
            "l"(global), "r"(bytes), "r"(shared_address(barrier))
            : "memory");
#endif
}

// A box of a matrix, its upper left element at (row, column). The map is a kernel parameter
// (__grid_constant__).
template <bool kHint>
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap* map, int column, int row,
                                         uint64_t* barrier, uint64_t policy) {
#if PROBES_HOPPER
    if constexpr (kHint)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
            ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
            "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
            "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
            : "memory");
#endif
}

// --- clusters --------------------------------------------------------------------------------

// All threads of all blocks of the cluster; what was written before can be read behind it.
__device__ __forceinline__ void cluster_barrier() {
#if PROBES_HOPPER
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// 16 bytes from the shared memory of a block of the cluster, at this block's address `shared`.
__device__ __forceinline__ float4 load_peer(const void* shared, uint32_t rank) {
    float4 v = make_float4(0, 0, 0, 0);
#if PROBES_HOPPER
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(shared)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
#endif
    return v;
}

}  // namespace probes
