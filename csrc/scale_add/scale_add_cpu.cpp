#include "core/rows.h"
#include "core/tanh_lanes.h"
#include "scale_add/scale_add.h"

namespace specrt::SPECRT_ISA {
namespace {

struct Steps {
    V16 factor, cap;
    bool is_capped;

    V16 operator()(V16 x) const {
        const V16 scaled = mul(factor, x);
        return is_capped ? mul(cap, tanh(div(scaled, cap))) : scaled;
    }
};

template <typename T>
void one_span(const ScaleAddParams& p, int64_t row, int64_t begin, int64_t end) {
    const Steps steps{splat(p.factor), splat(p.cap), p.cap > 0.0f};
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual =
        p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
        const V16 y = steps(load(x + i));
        store(residual ? add(load(residual + i), y) : y, out + i);
    }
    const int rest = static_cast<int>(end - i);
    if (rest == 0) return;
    const V16 y = steps(load_first(x + i, rest));
    store_first(residual ? add(load_first(residual + i, rest), y) : y, out + i, rest);
}

}  // namespace

void scale_add_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const ScaleAddParams*>(params);
    with_float_type(p.dtype, [&](auto type) {
        for_spans(p.num_rows, p.width, part, num_parts,
                  [&](int64_t row, int64_t begin, int64_t end) {
                      one_span<decltype(type)>(p, row, begin, end);
                  });
    });
}

}  // namespace specrt::SPECRT_ISA
