#include "core/rows.h"
#include "silu_mul/silu_mul.h"

namespace specrt::SPECRT_ISA {

void silu_mul_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const SiluMulParams*>(params);
    for_spans(p.num_rows, p.width, part, num_parts, [&](int64_t row, int64_t begin, int64_t end) {
        const float* gate = p.gate_up + row * p.gate_up_stride;
        silu_mul_row(gate + begin, gate + p.width + begin, p.out + row * p.out_stride + begin,
                     end - begin);
    });
}

}  // namespace specrt::SPECRT_ISA
