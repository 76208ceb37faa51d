// The device as it is found, its memory filled, its time taken.
#include "bench/probes/hopper.cuh"
#include "bench/probes/probe.h"

namespace probes {
namespace {

__global__ void report_features(int* has_hopper) {
    *has_hopper = PROBES_HOPPER;
}

__global__ void __launch_bounds__(256) fill_words(uint4* words, uint64_t count) {
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
    for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride)
        words[i] = make_uint4(random_word(4 * i), random_word(4 * i + 1), random_word(4 * i + 2),
                              random_word(4 * i + 3));
}

__global__ void __launch_bounds__(256) sum_words(uint64_t first, uint64_t last, uint32_t* sum) {
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
    uint32_t mine = 0;
    for (uint64_t i = first + uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < last;
         i += stride)
        mine += random_word(i);
    mine = __reduce_add_sync(0xffffffffu, mine);
    if (threadIdx.x % 32 == 0) atomicAdd(sum, mine);
}

// Arithmetic that no compiler takes out, for `rounds` times some ten nanoseconds.
__global__ void keep_busy(int rounds, float* result) {
    float x = static_cast<float>(threadIdx.x);
    for (int i = 0; i < rounds; ++i) x = fmaf(x, 0.999f, 1.0f);
    if (x < 0) *result = x;
}

// Long enough for the host to start what is timed.
__global__ void hold() {
    const uint64_t end = nanoseconds() + 400000;
    while (nanoseconds() < end) {
    }
}

}  // namespace

Device find_device() {
    int count = 0;
    PROBES_CHECK(cudaGetDeviceCount(&count));
    require(count > 0, "no GPU");
    PROBES_CHECK(cudaSetDevice(0));
    int sms = 0, shared = 0;
    PROBES_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    PROBES_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    const Buffer<int> has_hopper(1);
    start({1, 1}, nullptr, report_features, has_hopper.get());
    return {sms, static_cast<size_t>(shared), has_hopper.values()[0] != 0};
}

void fill_random(const Buffer<char>& buffer) {
    require(buffer.bytes() % 16 == 0, "fill_random: expected a multiple of 16 bytes");
    auto* words = reinterpret_cast<uint4*>(buffer.get());
    start({1024, 256}, nullptr, fill_words, words, buffer.bytes() / 16);
    PROBES_CHECK(cudaDeviceSynchronize());
}

uint32_t sum_random(uint64_t first_word, uint64_t last_word) {
    const Buffer<uint32_t> sum(1);
    sum.fill(0);
    start({1024, 256}, nullptr, sum_words, first_word, last_word, sum.get());
    return sum.values()[0];
}

void warm_up(cudaStream_t stream) {
    const Buffer<float> result(1);
    const double end = now() + 0.15;
    while (now() < end) {
        start({1024, 256}, stream, keep_busy, 100000, result.get());
        PROBES_CHECK(cudaStreamSynchronize(stream));
    }
}

int Graph::num_programmatic_edges() const {
    size_t count = 0;
    PROBES_CHECK(cudaGraphGetEdges(graph_, nullptr, nullptr, nullptr, &count));
    std::vector<cudaGraphNode_t> from(count), to(count);
    std::vector<cudaGraphEdgeData> edges(count);
    if (count > 0)
        PROBES_CHECK(cudaGraphGetEdges(graph_, from.data(), to.data(), edges.data(), &count));
    int found = 0;
    for (const auto& edge : edges) found += edge.type == cudaGraphDependencyTypeProgrammatic;
    return found;
}

std::vector<Timing> measure(cudaStream_t stream, const std::vector<Run>& runs, const Run& before,
                            int rounds) {
    cudaEvent_t begin, end;
    PROBES_CHECK(cudaEventCreate(&begin));
    PROBES_CHECK(cudaEventCreate(&end));
    std::vector<std::vector<double>> halves[2];
    halves[0].resize(runs.size());
    halves[1].resize(runs.size());
    for (int round = -1; round < rounds; ++round) {
        for (size_t i = 0; i < runs.size(); ++i) {
            if (before) before();
            start({1, 1}, stream, hold);
            PROBES_CHECK(cudaEventRecord(begin, stream));
            runs[i]();
            PROBES_CHECK(cudaEventRecord(end, stream));
            PROBES_CHECK(cudaEventSynchronize(end));
            float ms = 0;
            PROBES_CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (round >= 0) halves[round % 2][i].push_back(1e3 * ms);
        }
    }
    PROBES_CHECK(cudaEventDestroy(begin));
    PROBES_CHECK(cudaEventDestroy(end));
    std::vector<Timing> timings;
    for (size_t i = 0; i < runs.size(); ++i) {
        const double even = median(halves[0][i]), odd = median(halves[1][i]);
        const double us = (even + odd) / 2;
        timings.push_back({us, std::fabs(even - odd) / us});
    }
    return timings;
}

}  // namespace probes
