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

}  // namespace

void matrix_pack_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatrixPackParams*>(params);
    with_float_type(p.source_dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(p.source);
        for (int64_t r = p.num_rows * part / num_parts; r < p.num_rows * (part + 1) / num_parts;
             ++r)
            if (!pack_row(p, source + r * p.source_stride, p.first_row + r))
                __atomic_store_n(p.is_bad, 1, __ATOMIC_RELAXED);
    });
}

}  // namespace specrt::SPECRT_ISA
