#include "core/simd.h"
#include "silu_mul/silu_mul.h"

namespace specrt::SPECRT_ISA {
namespace {

inline V16 silu(V16 x) {
    return div(x, add(splat(1.0f), exp(sub(zero(), x))));
}

// Every element is its own, so the work may be cut anywhere.
void columns(const float* gate, float* out, int64_t width, int64_t begin, int64_t end) {
    const float* up = gate + width;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) store(mul(silu(load(gate + i)), load(up + i)), out + i);
    const int rest = static_cast<int>(end - i);
    if (rest > 0)
        store_first(mul(silu(load_first(gate + i, rest)), load_first(up + i, rest)), out + i, rest);
}

}  // namespace

void silu_mul_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const SiluMulParams*>(params);
    // Units of one row's 16 columns, so that one row can be shared too.
    const int64_t per_row = (p.width + 15) / 16, total = p.num_rows * per_row;
    int64_t unit = total * part / num_parts;
    const int64_t end = total * (part + 1) / num_parts;
    while (unit < end) {
        const int64_t row = unit / per_row, first = unit % per_row;
        const int64_t last = first + (end - unit) < per_row ? first + (end - unit) : per_row;
        columns(p.gate_up + row * p.gate_up_stride, p.out + row * p.out_stride, p.width, first * 16,
                last * 16 < p.width ? last * 16 : p.width);
        unit += last - first;
    }
}

}  // namespace specrt::SPECRT_ISA
