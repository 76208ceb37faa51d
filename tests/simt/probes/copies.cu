// cp.async.
#include "core/ptx.cuh"
#include "probes/probe.h"

namespace probes {
namespace {

// out = x (4 floats a thread), through shared memory, in as many groups as threads have rows.
__global__ void copy_in_groups(const float* x, float* out, int num_groups, int is_waiting) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared());
    const int stride = static_cast<int>(blockDim.x) * 4, at = static_cast<int>(threadIdx.x) * 4;
    for (int g = 0; g < num_groups; ++g) {
        ptx::cp_async_16(shared + g * stride + at, x + g * stride + at);
        ptx::cp_async_commit();
    }
    if (is_waiting) ptx::cp_async_wait<1>();  // all groups but the last are there
    for (int g = 0; g < num_groups; ++g)
        for (int i = 0; i < 4; ++i) out[g * stride + at + i] = shared[g * stride + at + i];
    ptx::cp_async_wait<0>();
}
PROBE(copy_in_groups, p.tensor<const float>("x"), p.tensor<float>("out"), p.numbers[0],
      p.numbers[1])

__global__ void copy_never_awaited(const float* x, int is_committed) {
    ptx::cp_async_16(dynamic_shared() + threadIdx.x * 16, x);
    if (is_committed) {
        ptx::cp_async_commit();
    } else {
        ptx::cp_async_wait<0>();  // covers committed groups alone
    }
}
PROBE(copy_never_awaited, p.tensor<const float>("x"), p.numbers[0])

__global__ void copy_zeros(float* out) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared()) + threadIdx.x * 4;
    for (int i = 0; i < 4; ++i) shared[i] = 1.0f;
    ptx::cp_async_16(shared, nullptr, false);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = shared[i];
}
PROBE(copy_zeros, p.tensor<float>("out"))

__global__ void copy_at(const float* x, int from_bytes, int to_bytes) {
    ptx::cp_async_16(dynamic_shared() + to_bytes,
                     reinterpret_cast<const unsigned char*>(x) + from_bytes);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
PROBE(copy_at, p.tensor<const float>("x"), p.numbers[0], p.numbers[1])

__global__ void copy_to_global(const float* x, float* out) {
    ptx::cp_async_16(out, x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
PROBE(copy_to_global, p.tensor<const float>("x"), p.tensor<float>("out"))

}  // namespace
}  // namespace probes
