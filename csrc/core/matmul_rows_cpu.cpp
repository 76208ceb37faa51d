// Each output (m, n) is one dot product in one fixed order: sixteen lanes over k, then the fixed
// tree. Blocking over rows and outputs only decides how often a weight is loaded, never the order,
// so any number of rows gives the same bits. Weights are read from memory once, by the first block
// of rows, which also prefetches the next outputs' weights; later blocks find them in the cache.
#include "core/matmul.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {
namespace {

// A block computes kRows x kOutputs results together; as large as the registers allow. Rows beyond
// kWholeRows accumulate in pieces, going over the operands once a piece.
//
//     AVX-512: 6 x 4               w[0]  w[1]  w[2]  w[3]     16 lanes of k each
//     a step of 16 along k   x[0]  fma   fma   fma   fma
//                            ...                              24 accumulators, 4 weights, 1 input
//                            x[5]  fma   fma   fma   fma      at a time: 29 of 32 registers
//
// Ten loads feed 24 multiplications, and a core begins as many of these as of those a cycle: once
// weights are in L1, multiplications are what is waited for.
#if defined(__AVX512F__)
constexpr int kRows = 6, kWholeRows = 6, kOutputs = 4;
constexpr int kMemoryRows = 3, kMemoryFour = 1, kMostMemoryRows = 9;
#else
constexpr int kRows = 4, kWholeRows = 2, kOutputs = 3;
constexpr int kMemoryRows = 2, kMemoryFour = 2, kMostMemoryRows = 8;
#endif
constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kAhead = 16 * 1024;  // fetch at least so far ahead: half of L1

// Where a block starts, and which cache lines of the next outputs' weights it fetches meanwhile.
struct Block {
    int64_t row, output;
    int num_outputs;
    const char* ahead;
    int64_t num_lines, lines_per_step;
};

// Sums to results. `count` is a constant but in the last block, so that the loops become vectors.
template <int R>
inline void finish_outputs(const MatmulParams& p, const Block& at, const V16 (&acc)[R][kOutputs],
                           int count) {
    for (int r = 0; r < R; ++r) {
        float y[4];
        const V16 four[4] = {acc[r][0], acc[r][1], acc[r][2], acc[r][kOutputs - 1]};
        reduce_add4(four, y);
        const int64_t row = at.row + r;
        if (p.scale)  // times the unit it is exact
            for (int j = 0; j < count; ++j) y[j] *= p.scale[at.output + j] * kUnitOfE4M3;
        if (p.bias)
            for (int j = 0; j < count; ++j) y[j] += p.bias[at.output + j];
        if (p.residual) {
            const float* residual = p.residual + row * p.residual_stride + at.output;
            for (int j = 0; j < count; ++j) y[j] += residual[j];
        }
        float* out = p.out + row * p.out_stride + at.output;
        for (int j = 0; j < count; ++j) out[j] = y[j];
    }
}

template <int R>
void finish(const MatmulParams& p, const Block& at, const V16 (&acc)[R][kOutputs]) {
    if (at.num_outputs == kOutputs) {
        finish_outputs<R>(p, at, acc, kOutputs);
    } else {
        finish_outputs<R>(p, at, acc, at.num_outputs);
    }
}

template <typename W, int R>
struct Operands {
    const W* w[kOutputs];
    const float* x[R];
};

// One piece of the lanes of all R x kOutputs dot products; the first piece also prefetches.
template <typename V, typename W, int R>
void accumulate(const Operands<W, R>& from, int64_t depth, int piece, const Block& at,
                V16 (&acc)[R][kOutputs]) {
    V sum[R][kOutputs];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kOutputs; ++j) clear(sum[r][j]);
    const auto step = [&](auto&& load_at) {
        V wv[kOutputs];
        for (int j = 0; j < kOutputs; ++j) load_at(wv[j], from.w[j]);
        for (int r = 0; r < R; ++r) {
            V xv;
            load_at(xv, from.x[r]);
            for (int j = 0; j < kOutputs; ++j) sum[r][j] = fma(xv, wv[j], sum[r][j]);
        }
    };
    // Steps that prefetch, then steps that do nothing but multiply.
    int64_t k = 0;
    for (int64_t line = piece == 0 ? 0 : at.num_lines; line < at.num_lines && k + 16 <= depth;
         k += 16, line += at.lines_per_step) {
        for (int64_t i = 0; i < at.lines_per_step; ++i) prefetch(at.ahead + (line + i) * kLine);
        step([&](V& v, auto* row) { load_piece(v, row + k, piece); });
    }
    for (; k + 16 <= depth; k += 16) step([&](V& v, auto* row) { load_piece(v, row + k, piece); });
    const int rest = static_cast<int>(depth - k);
    if (rest > 0) step([&](V& v, auto* row) { take_piece(v, load_first(row + k, rest), piece); });
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kOutputs; ++j) put_piece(acc[r][j], sum[r][j], piece);
}

// With fewer outputs than kOutputs the last weight row is computed again in place of the missing
// ones, which costs nothing that matters and keeps one code path.
template <typename W, int R>
void block(const MatmulParams& p, const Block& at) {
    Operands<W, R> from;
    for (int j = 0; j < kOutputs; ++j) {
        const int64_t n = at.output + (j < at.num_outputs ? j : at.num_outputs - 1);
        from.w[j] = static_cast<const W*>(p.weight) + n * p.depth;
    }
    for (int r = 0; r < R; ++r) from.x[r] = p.x + (at.row + r) * p.x_stride;
    V16 acc[R][kOutputs];
    if constexpr (R <= kWholeRows || sizeof(Part) == sizeof(V16)) {
        accumulate<V16>(from, p.depth, 0, at, acc);
    } else {
        for (int piece = 0; piece < static_cast<int>(sizeof(V16) / sizeof(Part)); ++piece)
            accumulate<Part>(from, p.depth, piece, at, acc);
    }
    finish<R>(p, at, acc);
}

template <typename W, int R = kRows>
void block_of(const MatmulParams& p, const Block& at, int64_t num_rows) {
    if constexpr (R == 1) {
        block<W, 1>(p, at);
    } else {
        if (num_rows >= R) {
            block<W, R>(p, at);
        } else {
            block_of<W, R - 1>(p, at, num_rows);
        }
    }
}

// All rows against kOutputs outputs. The blocks share out the fetching of the next outputs' weights
// evenly, so that memory is busy while the later blocks compute from the cache.
template <typename W>
void all_rows(const MatmulParams& p, int64_t output, int num_outputs) {
    // Up to kMostMemoryRows rows of float32 weights wait for memory, and blocks larger than
    // kMemoryRows only delay the fetching (measured; so was that four rows go best one by one).
    // 16-bit weights need the larger blocks all the same, to convert less.
    const bool is_memory_bound = sizeof(W) == 4 && p.num_rows <= kMostMemoryRows;
    const int64_t most = is_memory_bound ? (p.num_rows == 4 ? kMemoryFour : kMemoryRows) : kRows;
    const int64_t num_blocks = (p.num_rows + most - 1) / most;
    const int64_t bytes = kOutputs * p.depth * static_cast<int64_t>(sizeof(W));
    const int64_t share = (bytes / kLine + num_blocks) / num_blocks;
    const int64_t steps = p.depth / 16;
    const char* ahead = static_cast<const char*>(p.weight) +
                        output * p.depth * static_cast<int64_t>(sizeof(W)) +
                        (bytes > kAhead ? bytes : kAhead);
    const int64_t per_step = steps > 0 ? (share + steps - 1) / steps : 0;
    // Rows are spread evenly (7 = 2 + 2 + 3): a lone row uses the weights it loads once.
    for (int64_t i = 0, row = 0; i < num_blocks; ++i) {
        const int64_t end = p.num_rows * (i + 1) / num_blocks;
        block_of<W>(p, {row, output, num_outputs, ahead + i * share * kLine, share, per_step},
                    end - row);
        row = end;
    }
}

#if defined(__AVX512F__)
// Many rows: weights of kPanel outputs and a block of rows stay in L1 together, and the lanes of
// sixteen results are added up at once.
constexpr int kPanel = 16, kLeastPanelRows = 12;
constexpr int64_t kMostPanelDepth = 1024;

// The end of one row's sixteen results.
inline void finish_panel(const MatmulParams& p, int64_t row, int64_t output, V16 y) {
    if (p.scale) y = mul(y, mul(load(p.scale + output), splat(kUnitOfE4M3)));
    if (p.bias) y = add(y, load(p.bias + output));
    if (p.residual) y = add(y, load(p.residual + row * p.residual_stride + output));
    store(y, p.out + row * p.out_stride + output);
}

template <typename W, int R>
void panel_rows(const MatmulParams& p, int64_t row, int64_t output) {
    V16 folded[R][kPanel / kOutputs];
    Operands<W, R> from;
    for (int r = 0; r < R; ++r) from.x[r] = p.x + (row + r) * p.x_stride;
    for (int q = 0; q < kPanel / kOutputs; ++q) {
        for (int j = 0; j < kOutputs; ++j)
            from.w[j] = static_cast<const W*>(p.weight) + (output + q * kOutputs + j) * p.depth;
        V16 acc[R][kOutputs];
        accumulate<V16>(from, p.depth, 0, {row, output, kOutputs, nullptr, 0, 0}, acc);
        for (int r = 0; r < R; ++r) folded[r][q] = fold4(acc[r]);
    }
    for (int r = 0; r < R; ++r)
        finish_panel(p, row + r, output,
                     reduce_folded(folded[r][0], folded[r][1], folded[r][2], folded[r][3]));
}

template <typename W, int R = kRows>
void panel_rows_of(const MatmulParams& p, int64_t row, int64_t output, int64_t num_rows) {
    if constexpr (R == 1) {
        panel_rows<W, 1>(p, row, output);
    } else {
        if (num_rows >= R) {
            panel_rows<W, R>(p, row, output);
        } else {
            panel_rows_of<W, R - 1>(p, row, output, num_rows);
        }
    }
}

template <typename W>
void panel(const MatmulParams& p, int64_t output) {
    const int64_t num_blocks = (p.num_rows + kRows - 1) / kRows;
    for (int64_t i = 0, row = 0; i < num_blocks; ++i) {
        const int64_t end = p.num_rows * (i + 1) / num_blocks;
        panel_rows_of<W>(p, row, output, end - row);
        row = end;
    }
}
#endif

template <typename W>
void outputs_of_part(const MatmulParams& p, int part, int num_parts) {
#if defined(__AVX512F__)
    if (p.num_rows >= kLeastPanelRows && p.depth <= kMostPanelDepth &&
        p.num_outputs % kPanel == 0) {
        const int64_t num_panels = p.num_outputs / kPanel;
        const int64_t last = num_panels * (part + 1) / num_parts;
        for (int64_t i = num_panels * part / num_parts; i < last; ++i) panel<W>(p, i * kPanel);
        return;
    }
#endif
    const int64_t num_blocks = (p.num_outputs + kOutputs - 1) / kOutputs;
    const int64_t end = num_blocks * (part + 1) / num_parts;
    for (int64_t b = num_blocks * part / num_parts; b < end; ++b) {
        const int64_t output = b * kOutputs, left = p.num_outputs - output;
        all_rows<W>(p, output, left < kOutputs ? static_cast<int>(left) : kOutputs);
    }
}

}  // namespace

void matmul_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (p.num_rows == 0 || !is_any_open(p.openness)) return;
    switch (p.weight_dtype) {
        case DType::kBFloat16:
            return outputs_of_part<bf16>(p, part, num_parts);
        case DType::kFloat16:
            return outputs_of_part<f16>(p, part, num_parts);
        case DType::kE4M3:
            return outputs_of_part<e4m3>(p, part, num_parts);
        default:
            return outputs_of_part<float>(p, part, num_parts);
    }
}

}  // namespace specrt::SPECRT_ISA
