#include "core/matrix_rows.h"
#include "core/rows.h"
#include "embed/embed.h"

namespace specrt::SPECRT_ISA {
namespace {

template <typename T>
V16 load_up_to_16(const T* p, int count) {
    return count == 16 ? load(p) : load_first(p, count);
}
template <typename T>
void store_up_to_16(V16 a, T* p, int count) {
    if (count == 16) return store(a, p);
    store_first(a, p, count);
}

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

// Of a row's elements from `begin` on; `source` may be `out`.
template <typename From, typename To>
void adjust(const EmbedParams& p, int64_t row, int64_t begin, int64_t width, const From* source,
            To* out) {
    const V16 scale = splat(p.scale);
    const auto scaled = [&](auto position) {
        for (int64_t i = 0; i < width; i += 16) {
            const int count = width - i < 16 ? static_cast<int>(width - i) : 16;
            const V16 v = mul(load_up_to_16(source + i, count), scale);
            store_up_to_16(position(v, i, count), out + i, count);
        }
    };
    const PositionRows& rows = p.positions;
    if (!rows.table) return scaled([](V16 v, int64_t, int) { return v; });
    with_float_type(rows.dtype, [&](auto type) {
        const auto* at = static_cast<const decltype(type)*>(rows.table) + begin;
        at += position_start(rows, row);
        scaled([at](V16 v, int64_t i, int count) { return add(v, load_up_to_16(at + i, count)); });
    });
}

template <typename From, typename To>
void one_span(const EmbedParams& p, int64_t row, int64_t begin, int64_t end) {
    const From* source =
        static_cast<const From*>(p.table) + source_row(p, row) * p.table_stride + begin;
    To* out = static_cast<To*>(p.out) + row * p.out_stride + begin;
    if (is_adjusted(p)) return adjust(p, row, begin, end - begin, source, out);
    convert(source, out, end - begin);
}

void packed_rows(const EmbedParams& p, int part, int num_parts) {
    const bool is_open = is_any_open(p.open);
    for (int64_t m = p.num_rows * part / num_parts; m < p.num_rows * (part + 1) / num_parts; ++m) {
        write_id(p, m, is_open);
        float* out = static_cast<float*>(p.out) + m * p.out_stride;
        if (!is_open) continue;
        unpack_row(p.table, p.format, p.width, source_row(p, m), out);
        if (is_adjusted(p)) adjust(p, m, 0, p.width, out, out);
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
