// Norms of rows on the CPU: the residual, and which rows a part takes.
#pragma once
#include "core/norm.h"
#include "core/rows.h"

namespace specrt::SPECRT_ISA {

template <typename T>
void add_into(T* residual, const T* x, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(add(load(residual + i), load(x + i)), residual + i);
    for (; i < width; ++i) from_float(to_float(residual[i]) + to_float(x[i]), residual + i);
}

template <typename T, typename F>
void norm_row(const NormRows& p, int64_t row, int64_t slice, F& normalise) {
    const auto at = [&](const int64_t* stride) { return row * stride[0] + slice * stride[1]; };
    const T* x = static_cast<const T*>(p.x) + at(p.x_stride);
    if (p.residual) {
        T* residual = static_cast<T*>(p.residual) + at(p.residual_stride);
        add_into(residual, x, p.width);
        x = residual;
    }
    normalise(x, static_cast<T*>(p.out) + at(p.out_stride));
}

// Calls normalise(x, out) for each row of the part, the residual having been added.
template <typename F>
void norm_rows_part(const NormRows& p, int part, int num_parts, F normalise) {
    const int64_t total = p.num_rows * p.num_slices;
    with_float_type(p.dtype, [&](auto type) {
        for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i)
            norm_row<decltype(type)>(p, i / p.num_slices, i % p.num_slices, normalise);
    });
}

}  // namespace specrt::SPECRT_ISA
