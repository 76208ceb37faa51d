#include "core/activation_lanes.h"
#include "core/matrix_rows.h"
#include "core/rows.h"
#include "feature_sample/feature_sample.h"

namespace specrt::SPECRT_ISA {
namespace {

template <typename T>
void widen(const T* from, float* to, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(load(from + i), to + i);
    for (; i < width; ++i) to[i] = to_float(from[i]);
}

void copy_row(const GatherParams& p, const RowSource& from, int64_t m) {
    const int64_t row = chosen_row(from.chosen, m), start = row * from.chosen.stride;
    const void* rows = from.chosen.rows;
    float* to = p.workspace + m * p.workspace_stride + from.to;
    if (from.format != MatrixFormat::kRows)
        return unpack_row(rows, from.format, from.width, row, to);
    switch (from.dtype) {
        case DType::kBFloat16:
            return widen(static_cast<const bf16*>(rows) + start, to, from.width);
        case DType::kFloat16:
            return widen(static_cast<const f16*>(rows) + start, to, from.width);
        default:
            return widen(static_cast<const float*>(rows) + start, to, from.width);
    }
}

}  // namespace

void feature_gather_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const GatherParams*>(params);
    for (int64_t m = p.num_rows * part / num_parts; m < p.num_rows * (part + 1) / num_parts; ++m)
        for (int i = 0; i < p.num_sources; ++i) copy_row(p, p.from[i], m);
}

void feature_norm_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const NormParams*>(params);
    for (int64_t m = p.num_rows * part / num_parts; m < p.num_rows * (part + 1) / num_parts; ++m)
        rms_norm_row(p.x + m * p.stride, p.weight, p.eps, p.out + m * p.stride, p.width);
}

void feature_gate_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const GateParams*>(params);
    for_spans(p.num_rows, p.width, part, num_parts, [&](int64_t row, int64_t begin, int64_t end) {
        float* gate = p.gate + row * p.stride + begin;
        gated_row<Activation::kSilu>(gate, p.up + row * p.stride + begin, gate, end - begin);
    });
}

}  // namespace specrt::SPECRT_ISA
