// Launches, and the device they believe to run on.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda_types.h"

namespace simt {

// How mma adds: float32 in index order, or as a GPU's tensor cores (fused_sum.h).
enum class Arithmetic { kIeee, kSm80, kSm90 };

struct Settings {
    uint64_t seed = 0;             // of the schedule; 0: in order
    unsigned resident_blocks = 3;  // blocks of a grid that run interleaved
    bool is_strict = true;         // divergent barriers are errors
    int num_sms = 8;
    size_t shared_bytes = 232448;  // a block's, at most: an H100's
    Arithmetic arithmetic = Arithmetic::kIeee;
    uint64_t num_good = UINT64_MAX;  // launches until the device breaks, and none runs any more
    std::string fault;               // why, as CUDA says it
};

Settings settings();
void set_settings(const Settings& settings);
uint64_t num_launches();     // that ended well, since the process began
uint64_t num_overlapping();  // those of them that overlap
std::string last_kernel();
int last_device();  // the current one when it began

inline int num_sms() {
    return settings().num_sms;
}
inline size_t max_shared_bytes() {
    return settings().shared_bytes;
}

// Runs `body` once for each thread of the grid. One that `overlaps` is held to its wait: see
// Scheduler::run_to_wait. Throws std::runtime_error, which names kernel, block and thread; the next
// launch works again. Launches of several OS threads take turns.
void launch(const char* name, const dim3& grid, const dim3& block, size_t shared_bytes,
            bool overlaps, void* stream, std::function<void()> body);

}  // namespace simt
