// ldmatrix and mma.
#include "core/ptx.cuh"
#include "probes/probe.h"

namespace probes {
namespace {

constexpr int kRegisters = 4;

template <int kCount, typename Load>
__device__ void load_as(int* out, const unsigned char* row, Load load) {
    uint32_t r[kCount];
    load(r, row);
    for (int i = 0; i < kCount; ++i) out[threadIdx.x * kRegisters + i] = static_cast<int>(r[i]);
}

// Four 8 x 8 matrices of 16-bit words, row after row of 16 bytes; `form`: 0 to 2 are x1, x2 and
// x4, 3 to 5 the same transposed.
__global__ void load_matrices(const int* words, int* out, int form) {
    unsigned char* shared = dynamic_shared();
    for (unsigned i = threadIdx.x; i < 128; i += 32) reinterpret_cast<int*>(shared)[i] = words[i];
    __syncwarp();
    const unsigned char* row = shared + threadIdx.x * 16;
    if (form == 0) load_as<1>(out, row, [](auto& r, auto p) { ptx::ldmatrix_x1(r, p); });
    if (form == 1) load_as<2>(out, row, [](auto& r, auto p) { ptx::ldmatrix_x2(r, p); });
    if (form == 2) load_as<4>(out, row, [](auto& r, auto p) { ptx::ldmatrix_x4(r, p); });
    if (form == 3) load_as<1>(out, row, [](auto& r, auto p) { ptx::ldmatrix_x1_trans(r, p); });
    if (form == 4) load_as<2>(out, row, [](auto& r, auto p) { ptx::ldmatrix_x2_trans(r, p); });
    if (form == 5) load_as<4>(out, row, [](auto& r, auto p) { ptx::ldmatrix_x4_trans(r, p); });
}
PROBE(load_matrices, p.tensor<const int>("words"), p.tensor<int>("out"), p.numbers[0])

// Each lane's fragments as they are in its registers: a [32, 4], b [32, 2], c [32, 4]. `is_apart`:
// products go to an accumulator of their own, which is added afterwards.
template <typename T>
__device__ void multiply(const uint32_t* a, const uint32_t* b, float* c, int num_times,
                         bool is_apart = false) {
    const unsigned lane = threadIdx.x % 32;
    uint32_t my_a[4], my_b[2];
    float my_c[4];
    for (int i = 0; i < 4; ++i) my_a[i] = a[lane * 4 + i], my_c[i] = c[lane * 4 + i];
    for (int i = 0; i < 2; ++i) my_b[i] = b[lane * 2 + i];
    for (int i = 0; i < num_times; ++i) {
        float sum[4] = {};
        ptx::mma_m16n8k16(is_apart ? sum : my_c, my_a, my_b, T{});
        if (!is_apart) continue;
        for (int j = 0; j < 4; ++j) my_c[j] = __fadd_rn(my_c[j], sum[j]);
    }
    for (int i = 0; i < 4; ++i) c[lane * 4 + i] = my_c[i];
}
__global__ void multiply_bf16(const uint32_t* a, const uint32_t* b, float* c, int num_times) {
    multiply<bf16_t>(a, b, c, num_times);
}
__global__ void multiply_bf16_apart(const uint32_t* a, const uint32_t* b, float* c, int num_times) {
    multiply<bf16_t>(a, b, c, num_times, true);
}
__global__ void multiply_f16(const uint32_t* a, const uint32_t* b, float* c, int num_times) {
    multiply<f16_t>(a, b, c, num_times);
}
PROBE(multiply_bf16, p.tensor<const uint32_t>("a"), p.tensor<const uint32_t>("b"),
      p.tensor<float>("c"), p.numbers[0])
PROBE(multiply_bf16_apart, p.tensor<const uint32_t>("a"), p.tensor<const uint32_t>("b"),
      p.tensor<float>("c"), p.numbers[0])
PROBE(multiply_f16, p.tensor<const uint32_t>("a"), p.tensor<const uint32_t>("b"),
      p.tensor<float>("c"), p.numbers[0])

}  // namespace
}  // namespace probes
