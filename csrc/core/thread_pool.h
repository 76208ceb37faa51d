// A launch is a function and its parameters by value (as a CUDA kernel's); on the CPU, also the
// number of parts it splits into. There a thread pool runs lists of launches. A launch is cut into
// pieces by its shape and the number of threads; whoever runs begins the next piece, so the caller
// can do all of them alone and nobody waits for a thread that has not begun. A launch for a GPU
// runs on a stream, and never in a list.
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
    static constexpr size_t kMaxParams = 400;
    static constexpr int kMostParts = 0xffff;
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
    launch.max_parts = max_parts < 1                    ? 1
                       : max_parts > Launch::kMostParts ? Launch::kMostParts
                                                        : static_cast<int>(max_parts);
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

// Runs the launches in order on up to `num_threads` threads, the caller's among them; each launch
// sees all writes of those before it. A launch's function must not throw. A call that finds the
// pool at work for another thread, or for itself, does its launches alone. Where threads cannot be
// started, those that could run everything.
void run_launches(const Launch* launches, size_t count, int num_threads);

// How many pieces each of the pool's threads has done, the callers' first; empty without a pool.
std::vector<int64_t> pieces_by_thread();

// From now on no worker begins a piece for so long; 0 ends a rest. Without a pool, nothing.
void rest_workers(double seconds);

// While a recorder is set on the calling thread, submit() also appends to it (core of cpu_graph).
void set_recorder(std::vector<Launch>* recorder);
std::vector<Launch>* recorder();
void submit(const Launch* launches, size_t count, int num_threads);

}  // namespace specrt
