#include "core/rows.h"
#include "silu_mul/silu_mul.h"

namespace specrt::SPECRT_ISA {
namespace {

template <typename T>
void one_span(const SiluMulParams& p, int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride + begin;
    T* out = static_cast<T*>(p.out) + row * p.out_stride + begin;
    silu_mul_row(gate, gate + p.width, out, end - begin);
}

}  // namespace

void silu_mul_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const SiluMulParams*>(params);
    with_float_type(p.dtype, [&](auto type) {
        for_spans(p.num_rows, p.width, part, num_parts,
                  [&](int64_t row, int64_t begin, int64_t end) {
                      one_span<decltype(type)>(p, row, begin, end);
                  });
    });
}

}  // namespace specrt::SPECRT_ISA
