// A launch is a function and its parameters by value (as a CUDA kernel's); on the CPU, also the
// number of parts it splits into. There a thread pool runs lists of launches; between two
// launches all threads meet at a spinning barrier and none sleeps, so a launch costs well under a
// microsecond. Workers fall asleep when nothing came for a millisecond. A launch for a GPU runs on
// a stream, and never in a list.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/dispatch.h"
#include "core/tensor_view.h"

namespace specrt {

struct Launch {
    static constexpr size_t kMaxParams = 320;
    PartFn fn = nullptr;    // on the CPU
    int max_parts = 1;      // never split into more parts than this
    CudaFn cuda = nullptr;  // on a GPU
    int device = kCpu;
    alignas(16) unsigned char params[kMaxParams] = {};
};

template <typename Params>
Launch make_launch(PartFn fn, const Params& params, int64_t max_parts) {
    static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= Launch::kMaxParams);
    Launch launch;
    launch.fn = fn;
    launch.max_parts = max_parts < 1 ? 1 : max_parts > 1024 ? 1024 : static_cast<int>(max_parts);
    std::memcpy(launch.params, &params, sizeof(Params));
    return launch;
}

// On the GPU `device`.
template <typename Params>
Launch make_cuda_launch(CudaFn cuda, const Params& params, int device) {
    static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= Launch::kMaxParams);
    Launch launch;
    launch.cuda = cuda;
    launch.device = device;
    std::memcpy(launch.params, &params, sizeof(Params));
    return launch;
}

// Runs the launches in order on `num_threads` threads, the caller's among them; each launch sees
// all writes of those before it. Calls from several threads take turns.
void run_launches(const Launch* launches, size_t count, int num_threads);

// While a recorder is set on the calling thread, submit() also appends to it (core of cpu_graph).
void set_recorder(std::vector<Launch>* recorder);
std::vector<Launch>* recorder();
void submit(const Launch* launches, size_t count, int num_threads);

}  // namespace specrt
