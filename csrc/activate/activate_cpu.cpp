#include "activate/activate.h"
#include "core/activation_lanes.h"

namespace specrt::SPECRT_ISA {
namespace {

template <Activation kKind, typename T>
void one_span(const ActivateParams& p, int64_t row, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride + begin;
    T* out = static_cast<T*>(p.out) + row * p.out_stride + begin;
    if (p.is_gated) return gated_row<kKind>(x, x + p.width, out, end - begin);
    activate_row<kKind>(x, out, end - begin);
}

}  // namespace

void activate_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const ActivateParams*>(params);
    with_activation(p.activation, [&](auto activated) {
        with_float_type(p.dtype, [&](auto type) {
            for_spans(p.num_rows, p.width, part, num_parts,
                      [&](int64_t row, int64_t begin, int64_t end) {
                          one_span<decltype(activated)::kKind, decltype(type)>(p, row, begin, end);
                      });
        });
    });
}

}  // namespace specrt::SPECRT_ISA
