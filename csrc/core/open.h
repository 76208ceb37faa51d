// Predication: a launch of a level that nobody drafts any more ends without having done anything,
// so that rounds need no branch on the host, and a captured graph none at all.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/tensor_view.h"

namespace specrt {

struct Openness {
    const int32_t* is_open;  // [B] of sequences, 0 where one is closed; nullptr: all are open
    int32_t batch;
};

// Whether there is anything to do. On a GPU it decides only behind ptx::wait_for_previous(). Before
// that the launch that writes the flags may still run: what is read then is a hint, and read again,
// hence volatile.
SPECRT_HD bool is_any_open(const Openness& o) {
    if (!o.is_open) return true;
    const volatile int32_t* flags = o.is_open;
    int32_t any = 0;
    for (int32_t b = 0; b < o.batch; ++b) any |= flags[b];
    return any != 0;
}

inline Openness openness_of(const TensorView& is_open) {
    if (!is_open) return {};
    expect(is_open, DType::kInt32, "[B]", -1);
    return {is_open.as<int32_t>(), static_cast<int32_t>(is_open.shape[0])};
}

}  // namespace specrt
