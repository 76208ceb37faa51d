#include "core/norm_rows.h"
#include "rms_norm/rms_norm.h"

namespace specrt::SPECRT_ISA {

void rms_norm_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const NormRows*>(params);
    norm_rows_part(p, part, num_parts, [&](const auto* x, auto* out) {
        rms_norm_row(x, p.weight, p.eps, out, p.width);
    });
}

}  // namespace specrt::SPECRT_ISA
