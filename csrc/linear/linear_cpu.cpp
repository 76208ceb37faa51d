// Each output (m, n) is one dot product in one fixed order: sixteen lanes over k, then the fixed
// tree. Blocking over rows and outputs only decides how often a weight is loaded, never the order,
// so any number of rows gives the same bits. Weights are read from memory once, by the first block
// of rows, which also prefetches the next outputs' weights; later blocks find them in the cache.
#include "core/simd.h"
#include "linear/linear.h"

namespace specrt::SPECRT_ISA {
namespace {

constexpr int kOutputs = 4;  // outputs a block computes together: one reduce_add4
constexpr int kRows = 4;     // rows a block computes together

struct Block {
    const LinearParams& p;
    int64_t row, output;
};

template <int R>
void finish(const Block& at, const float (&sums)[R][kOutputs], int num_outputs) {
    const LinearParams& p = at.p;
    for (int r = 0; r < R; ++r) {
        const int64_t row = at.row + r;
        for (int j = 0; j < num_outputs; ++j) {
            const int64_t n = at.output + j;
            float y = sums[r][j];
            if (p.bias) y += p.bias[n];
            if (p.residual) y += p.residual[row * p.residual_stride + n];
            p.out[row * p.out_stride + n] = y;
        }
    }
}

// R rows x up to kOutputs outputs. With fewer outputs the last weight row is computed again in
// place of the missing ones, which costs nothing that matters and keeps one code path.
template <typename W, int R, bool kPrefetch>
void block(const Block& at, int num_outputs) {
    const LinearParams& p = at.p;
    const W* w[kOutputs];
    const float* x[R];
    for (int j = 0; j < kOutputs; ++j) {
        const int64_t n = at.output + (j < num_outputs ? j : num_outputs - 1);
        w[j] = static_cast<const W*>(p.weight) + n * p.depth;
    }
    for (int r = 0; r < R; ++r) x[r] = p.x + (at.row + r) * p.x_stride;

    V16 acc[R][kOutputs];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kOutputs; ++j) acc[r][j] = zero();
    const auto step = [&](auto&& load_at) {
        V16 wv[kOutputs];
        for (int j = 0; j < kOutputs; ++j) wv[j] = load_at(w[j]);
        for (int r = 0; r < R; ++r) {
            const V16 xv = load_at(x[r]);
            for (int j = 0; j < kOutputs; ++j) acc[r][j] = fma(xv, wv[j], acc[r][j]);
        }
    };
    // The next kOutputs weight rows start where these end.
    const char* ahead = reinterpret_cast<const char*>(w[0] + kOutputs * p.depth);
    int64_t k = 0;
    for (; k + 16 <= p.depth; k += 16) {
        if constexpr (kPrefetch) {
            for (size_t line = 0; line < kOutputs * 16 * sizeof(W); line += 64)
                prefetch(ahead + k * kOutputs * sizeof(W) + line);
        }
        step([&](auto* row) { return load(row + k); });
    }
    const int rest = static_cast<int>(p.depth - k);
    if (rest > 0) step([&](auto* row) { return load_first(row + k, rest); });

    float sums[R][kOutputs];
    for (int r = 0; r < R; ++r) reduce_add4(acc[r], sums[r]);
    finish<R>(at, sums, num_outputs);
}

template <typename W>
void all_rows(const LinearParams& p, int64_t output, int num_outputs) {
    int64_t row = 0;
    if (p.num_rows >= kRows) {
        block<W, kRows, true>({p, 0, output}, num_outputs);
        for (row = kRows; row + kRows <= p.num_rows; row += kRows)
            block<W, kRows, false>({p, row, output}, num_outputs);
    } else {
        block<W, 1, true>({p, 0, output}, num_outputs);
        row = 1;
    }
    for (; row + 2 <= p.num_rows; row += 2) block<W, 2, false>({p, row, output}, num_outputs);
    if (row < p.num_rows) block<W, 1, false>({p, row, output}, num_outputs);
}

template <typename W>
void outputs_of_part(const LinearParams& p, int part, int num_parts) {
    const int64_t num_blocks = (p.num_outputs + kOutputs - 1) / kOutputs;
    const int64_t end = num_blocks * (part + 1) / num_parts;
    for (int64_t b = num_blocks * part / num_parts; b < end; ++b) {
        const int64_t output = b * kOutputs, left = p.num_outputs - output;
        all_rows<W>(p, output, left < kOutputs ? static_cast<int>(left) : kOutputs);
    }
}

}  // namespace

void linear_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const LinearParams*>(params);
    if (p.num_rows == 0) return;
    switch (p.weight_dtype) {
        case DType::kBFloat16:
            return outputs_of_part<bf16>(p, part, num_parts);
        case DType::kFloat16:
            return outputs_of_part<f16>(p, part, num_parts);
        default:
            return outputs_of_part<float>(p, part, num_parts);
    }
}

}  // namespace specrt::SPECRT_ISA
