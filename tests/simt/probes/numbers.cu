// Conversions and arithmetic, element by element.
#include "core/ptx.cuh"
#include "core/vector.cuh"
#include "fused_sum.h"
#include "probes/probe.h"

namespace probes {
namespace {

__global__ void convert(const float* x, bf16_t* bf16, f16_t* f16, float* from_bf16,
                        float* from_f16) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    bf16[i] = from_float<bf16_t>(x[i]);
    f16[i] = from_float<f16_t>(x[i]);
    from_bf16[i] = to_float(bf16[i]);
    from_f16[i] = to_float(f16[i]);
}
PROBE(convert, p.tensor<const float>("x"), p.tensor<bf16_t>("bf16"), p.tensor<f16_t>("f16"),
      p.tensor<float>("from_bf16"), p.tensor<float>("from_f16"))

__global__ void convert_back(const bf16_t* bf16, const f16_t* f16, float* from_bf16,
                             float* from_f16) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    from_bf16[i] = to_float(bf16[i]);
    from_f16[i] = to_float(f16[i]);
}
PROBE(convert_back, p.tensor<const bf16_t>("bf16"), p.tensor<const f16_t>("f16"),
      p.tensor<float>("from_bf16"), p.tensor<float>("from_f16"))

__global__ void exp2(const float* x, float* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = ptx::exp2_approx(x[i]);
}
PROBE(exp2, p.tensor<const float>("x"), p.tensor<float>("out"))

__global__ void bits(const int* x, int* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const int v = x[i];
    const long long wide = static_cast<long long>(v) << 20;
    const int row[] = {__popc(static_cast<unsigned>(v)),
                       __ffs(v),
                       __clz(v),
                       __popcll(static_cast<unsigned long long>(wide)),
                       __ffsll(wide),
                       min(v, 7),
                       max(v, -7)};
    for (int j = 0; j < 7; ++j) out[i * 7 + j] = row[j];
}
PROBE(bits, p.tensor<const int>("x"), p.tensor<int>("out"))

// a, b [threads, n], c and out [threads].
__global__ void fused_sums(const float* a, const float* b, const float* c, float* out, int n,
                           int bits, int min_exponent) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = simt::fused_sum(a + i * n, b + i * n, n, c[i], bits, min_exponent);
}
PROBE(fused_sums, p.tensor<const float>("a"), p.tensor<const float>("b"),
      p.tensor<const float>("c"), p.tensor<float>("out"), p.numbers[0], p.numbers[1], p.numbers[2])

}  // namespace
}  // namespace probes
