// A launch is a function and its parameters by value (as a CUDA kernel's); on the CPU, also the
// number of parts it splits into, and how many are worth a piece. There a thread pool runs lists of
// launches. A launch is cut into pieces by that and the number of threads; whoever runs begins the
// next piece, so the caller can do all of them alone and nobody waits for a thread that has not
// begun. A launch for a GPU runs on a stream, and never in a list.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/dispatch.h"
#include "core/tensor_view.h"

namespace specrt {

// How a launch may be split. Parts are of about equal work, each about the least that is worth
// another thread; a function that gets piece i of n takes its units from units * i / n on, so
// pieces that follow one another are neighbours in memory.
struct Split {
    int64_t max_parts = 1;
    // In a piece of so many parts what beginning it costs does not show, and it is short beside
    // what the caller waits for a thread that has lost its core.
    int64_t parts_a_piece = 32;
};

struct Launch {
    static constexpr size_t kMaxParams = 400;
    static constexpr int kMostParts = 0xffff;
    PartFn fn = nullptr;     // on the CPU
    int max_parts = 1;       // never split into more parts than this
    int parts_a_piece = 32;  // nor into pieces of fewer, while each thread has one
    CudaFn cuda = nullptr;   // on a GPU
    int device = kCpu;
    alignas(16) unsigned char params[kMaxParams] = {};
};

template <typename Params>
Launch make_launch(PartFn fn, const Params& params, Split split) {
    static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= Launch::kMaxParams);
    const auto bounded = [](int64_t count) {
        return static_cast<int>(std::clamp<int64_t>(count, 1, Launch::kMostParts));
    };
    Launch launch;
    launch.fn = fn;
    launch.max_parts = bounded(split.max_parts);
    launch.parts_a_piece = bounded(split.parts_a_piece);
    std::memcpy(launch.params, &params, sizeof(Params));
    return launch;
}

template <typename Params>
Launch make_launch(PartFn fn, const Params& params, int64_t max_parts) {
    return make_launch(fn, params, Split{max_parts});
}

// Of `num_strips` that are never split and stream `bytes` of weights each, for `num_rows` rows. A
// core streams 16 KB in about a microsecond, and a matrix unit takes 16 rows in one's time.
inline Split split_strips(int64_t num_strips, int64_t bytes, int64_t num_rows) {
    constexpr int64_t kPart = 16 << 10, kPiece = 256 << 10, kRows = 16;
    const int64_t work = std::max<int64_t>(bytes * std::max(num_rows, kRows) / kRows, 1);
    const int64_t strips_a_part = std::max<int64_t>(kPart / work, 1);
    return {(num_strips + strips_a_part - 1) / strips_a_part, kPiece / (work * strips_a_part)};
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
