#include "core/block_rows.h"
#include "core/rows.h"
#include "matrix_pack/matrix_pack.h"

namespace specrt::SPECRT_ISA {
namespace {

// 32 values of a row, zeros from `count` on.
template <typename T>
inline void read_values(const T* row, int64_t count, bf16* out) {
    if (count >= kTileDepth) {
        for (int i = 0; i < kTileDepth; i += 16) store(load(row + i), out + i);
        return;
    }
    for (int i = 0; i < kTileDepth; ++i) from_float(i < count ? to_float(row[i]) : 0.0f, out + i);
}

// Pairs of k of each output become, pair by pair, all outputs' pairs.
inline void transpose(const bf16 (&rows)[kStripOutputs][kTileDepth],
                      uint32_t (&lines)[kTileDepth / 2][kStripOutputs]) {
    uint32_t pairs[kStripOutputs][kTileDepth / 2];
    std::memcpy(pairs, rows, sizeof pairs);
    for (int p = 0; p < kTileDepth / 2; ++p)
        for (int n = 0; n < kStripOutputs; ++n) lines[p][n] = pairs[n][p];
}

// Outputs `n` .. `n + count` of one strip, rounded to bfloat16; zeros past K. Whether all are
// finite.
template <typename T>
bool pack_tiles(const MatrixPackParams& p, const T* source, int64_t n, int count) {
    char* tile = const_cast<char*>(strip_of(p.values, p.format, p.depth, n));
    bf16 rows[kStripOutputs][kTileDepth] = {};
    uint32_t lines[kTileDepth / 2][kStripOutputs], carries = 0;
    for (int64_t k = 0; k < p.depth; k += kTileDepth, tile += kTileBytes) {
        for (int r = 0; r < count; ++r)
            read_values(source + r * p.source_stride + k, p.depth - k, rows[r]);
        transpose(rows, lines);
        // An exponent of ones carries into the sign's place.
        for (const auto& line : lines)
            for (const uint32_t pair : line) carries |= (pair & 0x7f807f80u) + 0x00800080u;
        if (count == kStripOutputs) {
            std::memcpy(tile, lines, sizeof lines);
            continue;
        }
        for (int i = 0; i < kTileDepth / 2; ++i)
            std::memcpy(tile + sizeof lines[0] * i + 4 * (n % kStripOutputs), lines[i], 4 * count);
    }
    return (carries & 0x80008000u) == 0;
}

// Row `n` in blocks, of a file's own bytes, or int8 of floats.
template <typename T>
bool pack_blocks(const MatrixPackParams& p, const T* source, int64_t n) {
    auto* strip =
        reinterpret_cast<uint8_t*>(const_cast<char*>(strip_of(p.values, p.format, p.depth, n)));
    const int lane = static_cast<int>(n % kStripOutputs);
    if constexpr (sizeof(T) > 1) {
        return write_row_int8(source, p.depth, strip, lane);
    } else {
        bool is_finite = true;
        with_blocks(p.format, [&](auto named) {
            constexpr MatrixFormat kFormat = decltype(named)::kFormat;
            if constexpr (kFormat != MatrixFormat::kInt8)
                is_finite = write_row<kFormat>(source, p.depth, strip, lane);
        });
        return is_finite;
    }
}

// Outputs `n` .. `n + count` of one strip.
template <typename T>
bool pack_some(const MatrixPackParams& p, const T* source, int64_t n, int count) {
    if constexpr (sizeof(T) > 1)
        if (!is_in_blocks(p.format)) return pack_tiles(p, source, n, count);
    bool is_finite = true;
    for (int r = 0; r < count; ++r)
        is_finite &= pack_blocks(p, source + r * p.source_stride, n + r);
    return is_finite;
}

// A strip is one thread's: its lines hold all sixteen outputs.
template <typename T>
void pack_rows(const MatrixPackParams& p, int part, int num_parts) {
    const auto* source = static_cast<const T*>(p.source);
    const int64_t last_row = p.first_row + p.num_rows;
    const int64_t first = p.first_row / kStripOutputs;
    const int64_t num_strips = divide_up(last_row, kStripOutputs) - first;
    const int64_t end = first + num_strips * (part + 1) / num_parts;
    for (int64_t strip = first + num_strips * part / num_parts; strip < end; ++strip) {
        const int64_t begin = strip * kStripOutputs, behind = begin + kStripOutputs;
        const int64_t n = begin > p.first_row ? begin : p.first_row;
        const int64_t to = behind < last_row ? behind : last_row;
        const T* rows = source + (n - p.first_row) * p.source_stride;
        if (!pack_some(p, rows, n, static_cast<int>(to - n)))
            __atomic_store_n(p.is_bad, 1, __ATOMIC_RELAXED);
    }
}

}  // namespace

void matrix_pack_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatrixPackParams*>(params);
    if (p.source_dtype == DType::kUInt8) return pack_rows<uint8_t>(p, part, num_parts);
    with_float_type(p.source_dtype,
                    [&](auto type) { pack_rows<decltype(type)>(p, part, num_parts); });
}

}  // namespace specrt::SPECRT_ISA
