#include "core/matrix_rows.h"
#include "core/rows.h"
#include "embed/embed.h"

namespace specrt::SPECRT_ISA {
namespace {

template <typename From, typename To>
void convert(const From* source, To* out, int64_t width) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) store(load(source + i), out + i);
    for (; i < width; ++i) from_float(to_float(source[i]), out + i);
}

template <typename T>
void convert(const T* source, T* out, int64_t width) {
    __builtin_memcpy(out, source, static_cast<size_t>(width) * sizeof(T));
}

template <typename From, typename To>
void one_span(const EmbedParams& p, int64_t row, int64_t begin, int64_t end) {
    convert(static_cast<const From*>(p.table) + source_row(p, row) * p.table_stride + begin,
            static_cast<To*>(p.out) + row * p.out_stride + begin, end - begin);
}

void packed_rows(const EmbedParams& p, int part, int num_parts) {
    const bool is_open = is_any_open(p.open);
    for (int64_t m = p.num_rows * part / num_parts; m < p.num_rows * (part + 1) / num_parts; ++m) {
        write_id(p, m, is_open);
        float* out = static_cast<float*>(p.out) + m * p.out_stride;
        if (is_open) unpack_row(p.table, p.format, p.width, source_row(p, m), out);
    }
}

}  // namespace

void embed_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const EmbedParams*>(params);
    if (p.format != MatrixFormat::kRows) return packed_rows(p, part, num_parts);
    const bool is_open = is_any_open(p.open);
    with_float_type(p.table_dtype, [&](auto from) {
        with_float_type(p.out_dtype, [&](auto to) {
            for_spans(p.num_rows, p.width, part, num_parts,
                      [&](int64_t row, int64_t begin, int64_t end) {
                          if (begin == 0) write_id(p, row, is_open);
                          if (is_open) one_span<decltype(from), decltype(to)>(p, row, begin, end);
                      });
        });
    });
}

}  // namespace specrt::SPECRT_ISA
