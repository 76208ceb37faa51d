// Products by quantised weights (core/block_format.h): sums of integers.
//
// A row of x is rounded to 16 bits, q = rint(x * 32512 / max|x|), so the dot product of a group is
// an exact integer, however an instruction set comes by it. What is rounded has one order:
//
//     groups:  sum = fma(float(dot), scale, sum), and with mins fma(float(sum of q), min, sum),
//              group after group; y = sum * (max|x| / 32512)
//     int8:    y = float(double(dot of the whole row) * (double(max|x| / 32512) * double(scale)))
//
// then the bias, then the residual. A row with a NaN or an infinity gives NaN; one whose values are
// all below 2^-100 counts as zeros.
//
// With VNNI a tile of up to eight rows goes over a strip with all it needs in registers: a group's
// weights, unpacked once, each row's dot product and sum. An instruction takes its value of x from
// memory, and rows take turns, so that none waits for itself. Another tile finds the strip cached.
// The other sets have no such instruction and too few registers: there a group's weights meet one
// row after another, whose sums stay in L1.
#include "core/block_scales.h"
#include "core/matmul.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {
namespace {

constexpr float kMostOfX = 32512.0f;  // whose upper byte is 127 when rounded
constexpr float kLeastOfX = 0x1p-100f;
constexpr int64_t kMostRows = 64;              // of x at a time
constexpr int64_t kMostRowBytes = 640 * 1024;  // of these: they stay in L2
constexpr int64_t kAhead = 4096;               // bytes that weights are fetched ahead
constexpr int64_t kMostGroups = 8;             // whose dot products' sum surely is below 2^31

// Rows of x in 16 bits, in the workspace.
struct RoundedRows {
    XGroup* groups;  // [groups, M]
    float* scale;    // [M]: max|x| / 32512, or NaN
    uint32_t* sums;  // [groups * scales of a group, M]: the sum of q, as is needed (`sum_word`)
    int64_t num_groups, num_rows;
};

RoundedRows rounded_rows(const MatmulParams& p) {
    const BlockFormat f = block_format(p.format);
    const int64_t groups = divide_up(p.depth, f.record_depth()) * f.num_groups;
    auto* at = static_cast<XGroup*>(p.workspace);
    auto* scale = reinterpret_cast<float*>(at + groups * p.num_rows);
    return {at, scale, reinterpret_cast<uint32_t*>(scale + p.num_rows), groups, p.num_rows};
}

// What multiplication starts from to take `zero_point` off the weights, or a float where there are
// mins.
template <MatrixFormat F>
uint32_t sum_word(int32_t sum) {
    if (Scales<F>::kHasMins) return to_bits(static_cast<float>(sum));
    return static_cast<uint32_t>(-block_format(F).zero_point * sum);
}

V16 load_within(const float* x, int64_t k, int64_t depth) {
    if (k + 16 <= depth) return load(x + k);
    return k < depth ? load_first(x + k, static_cast<int>(depth - k)) : zero();
}

struct Range {
    float inverse, scale;
};

Range range_of(const float* x, int64_t depth) {
    V16 most = zero(), wrong = zero();
    for (int64_t k = 0; k < depth; k += 16) {
        const V16 v = load_within(x, k, depth);
        most = max(most, max(v, sub(zero(), v)));
        wrong = fma(v, zero(), wrong);  // NaN, once and for all, of an infinity too
    }
    if (reduce_add(wrong) != 0.0f) return {0.0f, from_bits(0x7fc00000u)};
    const float largest = reduce_max(most);
    return {largest < kLeastOfX ? 0.0f : kMostOfX / largest, largest / kMostOfX};
}

// Rounds by adding what leaves no room for a fraction.
void round_group(const float* x, int64_t k, int64_t depth, float inverse, int16_t (&q)[32]) {
    float rounded[32];
    for (int i = 0; i < 32; i += 16)
        store(fma(load_within(x, k + i, depth), splat(inverse), zero()), rounded + i);
    for (int i = 0; i < 32; ++i)
        q[i] = static_cast<int16_t>(to_bits(rounded[i] + 12582912.0f) - 0x4b400000u);
}

void store_group(const int16_t (&q)[32], XGroup* out) {
    if constexpr (kMultipliesBytes) {
        uint8_t first[32], second[32];
        for (int i = 0; i < 32; ++i) {
            first[i] = static_cast<uint8_t>((q[i] + 128) >> 8);
            second[i] = static_cast<uint8_t>(q[i]);
        }
        std::memcpy(out->first, first, 32);
        std::memcpy(out->second, second, 32);
    } else {
        const auto pair = [&](int i) {
            return static_cast<uint32_t>(static_cast<uint16_t>(q[i])) |
                   static_cast<uint32_t>(q[i + 2]) << 16;
        };
        for (int i = 0; i < 8; ++i) {
            out->first[i] = pair(4 * i);
            out->second[i] = pair(4 * i + 1);
        }
    }
}

template <MatrixFormat F>
void round_row(const MatmulParams& p, const RoundedRows& rows, int64_t m) {
    constexpr int kPer = Scales<F>::kPerGroup;
    const float* x = p.x + m * p.x_stride;
    const Range range = range_of(x, p.depth);
    rows.scale[m] = range.scale;
    for (int64_t g = 0; g < rows.num_groups; ++g) {
        int16_t q[32];
        round_group(x, g * kGroupDepth, p.depth, range.inverse, q);
        store_group(q, rows.groups + g * rows.num_rows + m);
        for (int h = 0; h < kPer; ++h) {
            int32_t sum = 0;
            for (int i = 0; i < 32 / kPer; ++i) sum += q[h * (32 / kPer) + i];
            rows.sums[(g * kPer + h) * rows.num_rows + m] = sum_word<F>(sum);
        }
    }
}

// Rows of x that a strip is multiplied by together: as many as a tile has, which is then known to
// the compiler, or where a tile is one row up to kMostRows of them, tile after tile.
template <int R>
struct RowBlock {
    static constexpr int kMost = kTileRows > 1 ? R : kMostRows;
    int64_t first;
    int num_rows;

    constexpr int count() const { return kTileRows > 1 ? R : num_rows; }
    template <typename F>
    void each_row(F&& f) const {
        if constexpr (kTileRows > 1) {
            each<R>(f);
        } else {
            for (int r = 0; r < num_rows; ++r) f(r);
        }
    }
};

// The sums of rows, for sixteen outputs.
template <MatrixFormat F, int kMost>
struct Sums {
    V16 of_row[kMost];

    template <typename Rows>
    void clear(const Rows& rows) {
        rows.each_row([&](auto r) { of_row[r] = zero(); });
    }
    template <typename Rows>
    void flush(const Rows&) {}
    V16 finished(int r, float scale, const uint8_t*) const { return mul(of_row[r], splat(scale)); }
};
template <int kMost>
struct Sums<MatrixFormat::kInt8, kMost> {
    I16 latest[kMost];  // of up to kMostGroups groups
    int64_t of_row[kMost][16];

    template <typename Rows>
    void clear(const Rows& rows) {
        rows.each_row([&](auto r) { latest[r] = zero_ints(); });
        std::memset(of_row, 0, sizeof of_row[0] * static_cast<size_t>(rows.count()));
    }
    template <typename Rows>
    void flush(const Rows& rows) {
        rows.each_row([&](auto r) {
            uint32_t sums[16];
            store(latest[r], sums);
            for (int n = 0; n < 16; ++n) of_row[r][n] += static_cast<int32_t>(sums[n]);
            latest[r] = zero_ints();
        });
    }
    V16 finished(int r, float scale, const uint8_t* strip) const {
        const auto* scales = reinterpret_cast<const float*>(strip);
        float y[16];
        for (int n = 0; n < 16; ++n)
            y[n] =
                static_cast<float>(static_cast<double>(of_row[r][n]) *
                                   (static_cast<double>(scale) * static_cast<double>(scales[n])));
        return load(y);
    }
};

// A group's weights and scales, in registers.
template <MatrixFormat F>
struct Group {
    static constexpr int kPer = Scales<F>::kPerGroup;
    Operand w[8];
    V16 scale[kPer], offset;
};

template <MatrixFormat F>
inline __attribute__((always_inline)) Group<F> group_of(const uint8_t* record, int g) {
    constexpr BlockFormat f = block_format(F);
    Group<F> group;
    load_group<f.quant_bits>(record + f.scale_bytes + g * f.group_bytes(), group.w);
    if constexpr (F != MatrixFormat::kInt8)
        each<Group<F>::kPer>(
            [&](auto h) { group.scale[h] = Scales<F>::scale(record, g * Group<F>::kPer + h); });
    if constexpr (Scales<F>::kHasMins) group.offset = Scales<F>::offset(record, g);
    return group;
}

// T rows by a group. `words` of its second half, where it has one, lie `stride` behind.
template <int T, int kMost>
inline __attribute__((always_inline)) void add_tile(const Group<MatrixFormat::kInt8>& group,
                                                    const XGroup* x, const uint32_t* words, int64_t,
                                                    int row,
                                                    Sums<MatrixFormat::kInt8, kMost>& sums) {
    I16 dot[T];
    dots<0, 8, false>(group.w, x, words, dot);
    each<T>([&](auto r) { sums.latest[row + r] = add(sums.latest[row + r], dot[r]); });
}

template <int T, MatrixFormat F, int kMost>
inline __attribute__((always_inline)) void add_tile(const Group<F>& group, const XGroup* x,
                                                    const uint32_t* words, int64_t stride, int row,
                                                    Sums<F, kMost>& sums) {
    constexpr bool kHasMins = Scales<F>::kHasMins;
    constexpr int kRun = 8 / Group<F>::kPer;
    V16 sum[T];
    each<T>([&](auto r) { sum[r] = sums.of_row[row + r]; });
    each<Group<F>::kPer>([&](auto h) {
        const uint32_t* word = words + h * stride;
        I16 dot[T];
        dots<h * kRun, (h + 1) * kRun, kHasMins>(group.w, x, word, dot);
        each<T>([&](auto r) {
            sum[r] = fma(to_float(dot[r]), group.scale[h], sum[r]);
            if constexpr (kHasMins) sum[r] = fma(splat(from_bits(word[r])), group.offset, sum[r]);
        });
    });
    each<T>([&](auto r) { sums.of_row[row + r] = sum[r]; });
}

template <MatrixFormat F, int R, int kMost>
inline void add_strip(const uint8_t* strip, const RoundedRows& x, const RowBlock<R>& rows,
                      Sums<F, kMost>& sums) {
    constexpr BlockFormat f = block_format(F);
    constexpr int64_t kLines = divide_up(f.record_bytes() / 64, f.num_groups);  // of a group
    constexpr int kPer = Scales<F>::kPerGroup;
    const uint8_t* record = strip + f.head_bytes;
    const XGroup* groups = x.groups + rows.first;
    const uint32_t* words = x.sums + rows.first;
    for (int64_t done = 0; done < x.num_groups; record += f.record_bytes()) {
        for (int g = 0; g < f.num_groups; ++g) {
            for (int64_t i = 0; i < kLines; ++i) prefetch(record + kAhead + (g * kLines + i) * 64);
            const Group<F> group = group_of<F>(record, g);
            if constexpr (kTileRows > 1) {
                add_tile<R>(group, groups, words, x.num_rows, 0, sums);
            } else {
                for (int r = 0; r < rows.num_rows; ++r)
                    add_tile<1>(group, groups + r, words + r, x.num_rows, r, sums);
            }
            groups += x.num_rows;
            words += kPer * x.num_rows;
            if (++done % kMostGroups == 0) sums.flush(rows);
        }
    }
}

void store_outputs(const MatmulParams& p, int64_t row, int64_t first, V16 y) {
    const int64_t left = p.num_outputs - first;
    const int count = left < kStripOutputs ? static_cast<int>(left) : 16;
    const auto rest = [&](const float* v) { return count == 16 ? load(v) : load_first(v, count); };
    if (p.bias) y = add(y, rest(p.bias + first));
    if (p.residual) y = add(y, rest(p.residual + row * p.residual_stride + first));
    float* out = p.out + row * p.out_stride + first;
    count == 16 ? store(y, out) : store_first(y, out, count);
}

template <MatrixFormat F, int R>
__attribute__((noinline, flatten)) void multiply_rows(const MatmulParams& p, const RoundedRows& x,
                                                      const RowBlock<R>& rows, int64_t output) {
    const auto* strip = reinterpret_cast<const uint8_t*>(strip_of(p.weight, F, p.depth, output));
    Sums<F, RowBlock<R>::kMost> sums;
    sums.clear(rows);
    add_strip<F>(strip, x, rows, sums);
    sums.flush(rows);
    rows.each_row([&](auto r) {
        const int64_t row = rows.first + r;
        store_outputs(p, row, output, sums.finished(r, x.scale[row], strip));
    });
}

// Calls f with `count` as a constant, 1 to R.
template <int R, typename F>
inline void with_constant(int64_t count, F&& f) {
    if constexpr (R > 1) {
        if (count < R) return with_constant<R - 1>(count, f);
    }
    f(Index<R>{});
}

template <MatrixFormat F>
void multiply_strip(const MatmulParams& p, const RoundedRows& x, int64_t first, int64_t count,
                    int64_t output) {
    const int64_t num_tiles = kTileRows > 1 ? divide_up(count, kTileRows) : 1;
    for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t begin = count * t / num_tiles, size = count * (t + 1) / num_tiles - begin;
        with_constant<kTileRows>(size, [&](auto rows) {
            multiply_rows<F, rows>(p, x, {first + begin, static_cast<int>(size)}, output);
        });
    }
}

template <MatrixFormat F>
void strips_of_part(const MatmulParams& p, int part, int num_parts) {
    const RoundedRows x = rounded_rows(p);
    const int64_t row_bytes = x.num_groups * static_cast<int64_t>(sizeof(XGroup));
    const int64_t fitting = kMostRowBytes / row_bytes, least = fitting < 16 ? 16 : fitting;
    const int64_t most = least < kMostRows ? least : kMostRows;
    const int64_t num_blocks = divide_up(p.num_rows, most);
    const int64_t strips = divide_up(p.num_outputs, kStripOutputs);
    for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t first = p.num_rows * b / num_blocks;
        const int64_t count = p.num_rows * (b + 1) / num_blocks - first;
        for (int64_t s = strips * part / num_parts; s < strips * (part + 1) / num_parts; ++s)
            multiply_strip<F>(p, x, first, count, s * kStripOutputs);
    }
}

}  // namespace

void round_rows_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (!is_any_open(p.openness)) return;
    const RoundedRows rows = rounded_rows(p);
    with_blocks(p.format, [&](auto named) {
        for (int64_t m = p.num_rows * part / num_parts; m < p.num_rows * (part + 1) / num_parts;
             ++m)
            round_row<decltype(named)::kFormat>(p, rows, m);
    });
}

void matmul_blocks_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (p.num_rows == 0 || !is_any_open(p.openness)) return;
    with_blocks(p.format,
                [&](auto named) { strips_of_part<decltype(named)::kFormat>(p, part, num_parts); });
}

}  // namespace specrt::SPECRT_ISA
