// Rows that a kernel takes out of a table as an index on the device says.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/tensor_view.h"

namespace specrt {

struct RowOperand {
    const void* rows;      // [S, width] of the kernel's type; nullptr: there is none
    int64_t stride;        // from one row to the next, in values
    const int32_t* index;  // [M], contents of any kind, or nullptr: row m is the table's
    int64_t count;         // S, above 0
};

// Which of the table's rows is row m. An index comes from launches before.
SPECRT_HD int64_t chosen_row(const RowOperand& o, int64_t m) {
    if (!o.index) return m;
    const int64_t row = o.index[m];
    return row < 0 ? 0 : row < o.count ? row : o.count - 1;
}

// From row `first` on; `bytes` of a value.
inline RowOperand rows_behind(RowOperand o, int64_t first, int64_t bytes) {
    if (o.index) {
        o.index += first;
    } else if (o.rows) {
        o.rows = static_cast<const char*>(o.rows) + first * o.stride * bytes;
    }
    return o;
}

// A matrix whose rows can be moved by 16 bytes.
inline void expect_rows_of_16_bytes(const TensorView& t) {
    expect_aligned(t, 16);
    SPECRT_CHECK(t.stride[0] * size_of(t.dtype) % 16 == 0 || t.shape[0] <= 1, t.name,
                 ": expected rows at multiples of 16 bytes on a GPU");
}

}  // namespace specrt
