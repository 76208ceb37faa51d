#include "core/block_rows.h"
#include "core/rows.h"
#include "matrix_pack/matrix_pack.h"

namespace specrt::SPECRT_ISA {
namespace {

// Row `n` of tiles of bfloat16, to which values are rounded; zeros past K. Whether all are finite.
template <typename T>
bool pack_row(const MatrixPackParams& p, const T* source, int64_t n) {
    auto* lane =
        reinterpret_cast<bf16*>(const_cast<char*>(strip_of(p.values, p.format, p.depth, n))) +
        n % kStripOutputs * 2;
    const int64_t padded = divide_up(p.depth, kTileDepth) * kTileDepth;
    uint32_t worst = 0;
    for (int64_t k = 0; k < padded; ++k) {
        bf16 value{0};
        if (k < p.depth) from_float(to_float(source[k]), &value);
        const uint32_t magnitude = value.bits & 0x7fffu;
        worst = magnitude > worst ? magnitude : worst;
        lane[k / 2 * 32 + k % 2] = value;
    }
    return worst < 0x7f80u;
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

template <typename T>
void pack_rows(const MatrixPackParams& p, int part, int num_parts) {
    const auto* source = static_cast<const T*>(p.source);
    for (int64_t r = p.num_rows * part / num_parts; r < p.num_rows * (part + 1) / num_parts; ++r) {
        const T* row = source + r * p.source_stride;
        const int64_t n = p.first_row + r;
        bool is_finite;
        if constexpr (sizeof(T) == 1) {
            is_finite = pack_blocks(p, row, n);
        } else {
            is_finite = is_in_blocks(p.format) ? pack_blocks(p, row, n) : pack_row(p, row, n);
        }
        if (!is_finite) __atomic_store_n(p.is_bad, 1, __ATOMIC_RELAXED);
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
