// Products by bfloat16 in tiles. For each 32 of k, and each part of x, a chain of fused
// multiplications over the even k and one over the odd k are added to each other, then to the sum.
#include "core/matmul.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {
namespace {

struct Split {
    float part[2][kTileDepth];
};

Split split(const float* x, int64_t count) {
    Split s{};
    for (int64_t k = 0; k < count; ++k) {
        bf16 hi, lo;
        from_float(x[k], &hi);
        s.part[0][k] = to_float(hi);
        from_float(x[k] - s.part[0][k], &lo);
        s.part[1][k] = to_float(lo);
    }
    return s;
}

V16 step(const float* x, const bf16* tile, V16 sum) {
    V16 even = zero(), odd = zero();
    for (int p = 0; p < 16; ++p) {
        float w[2][16];
        for (int n = 0; n < 16; ++n)
            for (int i = 0; i < 2; ++i) w[i][n] = to_float(tile[p * 32 + 2 * n + i]);
        even = fma(splat(x[2 * p]), load(w[0]), even);
        odd = fma(splat(x[2 * p + 1]), load(w[1]), odd);
    }
    return add(sum, add(even, odd));
}

void finish(const MatmulParams& p, int64_t row, int64_t first, V16 sum) {
    float y[16];
    store(sum, y);
    for (int64_t i = 0, n = first; i < kStripOutputs && n < p.num_outputs; ++i, ++n) {
        if (p.bias) y[i] += p.bias[n];
        if (p.residual) y[i] += p.residual[row * p.residual_stride + n];
        p.out[row * p.out_stride + n] = y[i];
    }
}

void strip_of_row(const MatmulParams& p, int64_t row, int64_t strip) {
    const auto* tile =
        reinterpret_cast<const bf16*>(strip_of(p.weight, p.format, p.depth, strip * kStripOutputs));
    const int num_parts = p.format == MatrixFormat::kBf16Split ? 2 : 1;
    V16 sum = zero();
    for (int64_t k = 0; k < p.depth; k += kTileDepth, tile += kTileBytes / 2) {
        const int64_t left = p.depth - k;
        const Split x = split(p.x + row * p.x_stride + k, left < kTileDepth ? left : kTileDepth);
        for (int i = 0; i < num_parts; ++i) sum = step(x.part[i], tile, sum);
    }
    finish(p, row, strip * kStripOutputs, sum);
}

}  // namespace

void matmul_tiles_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (!is_any_open(p.openness)) return;
    const int64_t strips = divide_up(p.num_outputs, kStripOutputs);
    for (int64_t s = strips * part / num_parts; s < strips * (part + 1) / num_parts; ++s)
        for (int64_t row = 0; row < p.num_rows; ++row) strip_of_row(p, row, s);
}

}  // namespace specrt::SPECRT_ISA
