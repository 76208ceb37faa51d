// P6: how should the parts of a split sum meet? The barrier of a cluster; 58 KB read from the
// shared memory of seven peers; the merge of 66 KB states through a cluster against one through the
// L2 cache with tickets; and how many clusters are resident.
#include "bench/probes/hopper.cuh"
#include "bench/probes/probe.h"
#include "bench/probes/probes.h"

namespace probes {
namespace {

// A state of attention: 128 rows of 128 sums, a maximum and a total.
constexpr int kRows = 128, kRowFloats = 130;
constexpr int kStateVectors = kRows * kRowFloats / 4;  // of 16 bytes
constexpr int kStateBytes = kStateVectors * 16;        // 66,560
constexpr int kThreads = 256;
constexpr int kGroups = 16;    // merges in one launch
constexpr int kLaunches = 50;  // in a graph
// Of each block, so that an SM holds one, as attention's are: more than half of a Hopper SM's.
constexpr size_t kSharedBytes = 120 * 1024;

// Small integers, so that sums in float32 are exact in any order.
__host__ __device__ inline float state_value(int block, int index) {
    return static_cast<float>((block * 37 + index * 11) % 101);
}
__device__ __forceinline__ float4 state_vector(int block, int vector) {
    const int i = 4 * vector;
    return make_float4(state_value(block, i), state_value(block, i + 1), state_value(block, i + 2),
                       state_value(block, i + 3));
}
__device__ __forceinline__ void add_to(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// What a block does of a merge; less for the launches that the others are compared with.
enum class Work {
    kNone,     // makes its state, writes its share of it
    kBarrier,  // and meets the others twice
    kMerge,    // and writes its share of the sum
};

// A cluster of kRanks blocks: rank r sums its share of the vectors over all states.
template <int kRanks>
__global__ void __launch_bounds__(kThreads, 1) merge_in_cluster(Work work, float4* merged) {
    auto* const state = reinterpret_cast<float4*>(specrt::dynamic_shared());
    const int rank = blockIdx.x % kRanks, group = blockIdx.x / kRanks;
    for (int i = threadIdx.x; i < kStateVectors; i += kThreads)
        state[i] = state_vector(blockIdx.x, i);
    if (work == Work::kNone)
        __syncthreads();
    else
        cluster_barrier();
    constexpr int kShare = kStateVectors / kRanks;
    for (int i = rank * kShare + threadIdx.x; i < (rank + 1) * kShare; i += kThreads) {
        float4 sum = state[i];
        if (work == Work::kMerge) {
            float4 v[kRanks];
#pragma unroll
            for (int peer = 0; peer < kRanks; ++peer) v[peer] = load_peer(&state[i], peer);
            sum = v[0];
#pragma unroll
            for (int peer = 1; peer < kRanks; ++peer) add_to(sum, v[peer]);
        }
        merged[group * kStateVectors + i] = sum;
    }
    // A block that has gone takes its shared memory along.
    if (work != Work::kNone) cluster_barrier();
}

// kRanks blocks of a group write their states; who draws the last ticket sums them.
template <int kRanks>
__global__ void __launch_bounds__(kThreads, 1)
    merge_by_ticket(Work work, float4* states, unsigned* tickets, float4* merged) {
    auto* const state = reinterpret_cast<float4*>(specrt::dynamic_shared());
    SPECRT_SHARED(bool, is_last);
    const int rank = blockIdx.x % kRanks, group = blockIdx.x / kRanks;
    for (int i = threadIdx.x; i < kStateVectors; i += kThreads)
        state[i] = state_vector(blockIdx.x, i);
    __syncthreads();
    constexpr int kShare = kStateVectors / kRanks;
    float4* const out = merged + group * kStateVectors;
    if (work == Work::kNone) {
        for (int i = rank * kShare + threadIdx.x; i < (rank + 1) * kShare; i += kThreads)
            out[i] = state[i];
        return;
    }
    float4* const mine = states + static_cast<int64_t>(blockIdx.x) * kStateVectors;
    for (int i = threadIdx.x; i < kStateVectors; i += kThreads) mine[i] = state[i];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[group], 1) == kRanks - 1;
        if (is_last) tickets[group] = 0;  // for the next launch
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const float4* const all = states + static_cast<int64_t>(group) * kRanks * kStateVectors;
    for (int i = threadIdx.x; i < kStateVectors; i += kThreads) {
        float4 v[kRanks];
#pragma unroll
        for (int peer = 0; peer < kRanks; ++peer) v[peer] = __ldcg(all + peer * kStateVectors + i);
        float4 sum = v[0];
#pragma unroll
        for (int peer = 1; peer < kRanks; ++peer) add_to(sum, v[peer]);
        out[i] = sum;
    }
}

__global__ void __launch_bounds__(kThreads, 1) meet(int rounds) {
    for (int i = 0; i < rounds; ++i) cluster_barrier();
}

// Each rank of eight reads its eighth of seven peers' states, again and again.
__global__ void __launch_bounds__(kThreads, 1) read_peers(int rounds, float4* result) {
    auto* const state = reinterpret_cast<float4*>(specrt::dynamic_shared());
    constexpr int kRanks = 8, kShare = kStateVectors / kRanks;
    const int rank = blockIdx.x % kRanks;
    for (int i = threadIdx.x; i < kStateVectors; i += kThreads)
        state[i] = state_vector(blockIdx.x, i);
    cluster_barrier();
    float4 sum = make_float4(0, 0, 0, 0);
    for (int round = 0; round < rounds; ++round) {
        for (int i = rank * kShare + threadIdx.x; i < (rank + 1) * kShare; i += kThreads) {
            float4 v[kRanks - 1];
#pragma unroll
            for (int peer = 1; peer < kRanks; ++peer)
                v[peer - 1] = load_peer(&state[i], (rank + peer) % kRanks);
#pragma unroll
            for (int peer = 1; peer < kRanks; ++peer) add_to(sum, v[peer - 1]);
        }
    }
    result[blockIdx.x * kThreads + threadIdx.x] = sum;
    cluster_barrier();
}

// --- host ------------------------------------------------------------------------------------

class Merges {
  public:
    explicit Merges(const Device& device)
        : shared_bytes_(std::min(kSharedBytes, device.shared_bytes - 1024)),
          states_(kGroups * 8 * kStateVectors),
          merged_(kGroups * kStateVectors),
          tickets_(kGroups) {
        tickets_.fill(0);
        warm_up(stream_);
    }

    template <int kRanks>
    void measure_tickets() {
        const auto kernel = merge_by_ticket<kRanks>;
        allow(kernel, shared_bytes_);
        const Launch launch{kGroups * kRanks, kThreads, shared_bytes_};
        print("L2 tickets", kRanks, {Work::kNone, Work::kMerge}, [=](Work work) {
            start(launch, stream_, kernel, work, states_.get(), tickets_.get(), merged_.get());
        });
    }
    template <int kRanks>
    void measure_cluster() {
        const auto kernel = merge_in_cluster<kRanks>;
        allow(kernel, shared_bytes_, kRanks);
        Launch launch{kGroups * kRanks, kThreads, shared_bytes_};
        launch.cluster = kRanks;
        print("cluster", kRanks, {Work::kNone, Work::kBarrier, Work::kMerge},
              [=](Work work) { start(launch, stream_, kernel, work, merged_.get()); });
    }
    void measure_barrier(int ranks) {
        constexpr int kRounds = 1000;
        Launch launch{static_cast<unsigned>(kGroups * ranks), kThreads};
        launch.cluster = ranks;
        const auto timings = measure(stream_, {[&] { start(launch, stream_, meet, 1); },
                                               [&] { start(launch, stream_, meet, kRounds + 1); }});
        Row("p6")
            .add("what", "cluster barrier")
            .add("ranks", ranks)
            .add("us", (timings[1].us - timings[0].us) / kRounds)
            .add("spread", timings[1].spread)
            .print();
    }
    void measure_peer_reads() {
        constexpr int kRounds = 100, kRanks = 8;
        allow(read_peers, shared_bytes_, kRanks);
        Launch launch{kGroups * kRanks, kThreads, shared_bytes_};
        launch.cluster = kRanks;
        const Buffer<float4> result(launch.grid.x * kThreads);
        const auto timings = measure(
            stream_, {[&] { start(launch, stream_, read_peers, 1, result.get()); },
                      [&] { start(launch, stream_, read_peers, kRounds + 1, result.get()); }});
        const double us = (timings[1].us - timings[0].us) / kRounds;
        const int bytes = kStateBytes / kRanks * (kRanks - 1);
        Row("p6")
            .add("what", "reads of peers")
            .add("ranks", kRanks)
            .add("bytes", bytes)
            .add("us", us)
            .add("gb_s_per_sm", bytes / us / 1e3)
            .add("spread", timings[1].spread)
            .print();
    }

  private:
    // One merge a launch: what it takes beyond a launch that makes the same states.
    template <typename Start>
    void print(const char* what, int ranks, const std::vector<Work>& works, Start start_work) {
        std::vector<Graph> graphs;
        std::vector<Run> runs;
        for (Work work : works) {
            graphs.push_back(Graph::captured(stream_, [&] {
                for (int i = 0; i < kLaunches; ++i) start_work(work);
            }));
            check(graphs.back(), work, ranks, what);
        }
        for (const Graph& graph : graphs) runs.push_back([&] { graph.launch(stream_); });
        const auto timings = measure(stream_, runs);
        Row row("p6");
        row.add("what", what).add("ranks", ranks).add("bytes", kStateBytes);
        const double alone = timings[0].us / kLaunches;
        row.add("launch_us", alone);
        if (works.size() == 3) row.add("barriers_us", timings[1].us / kLaunches - alone);
        row.add("merge_us", timings.back().us / kLaunches - alone);
        row.add("spread_us", timings.back().spread * timings.back().us / kLaunches).print();
    }
    void check(const Graph& graph, Work work, int ranks, const char* what) {
        merged_.fill(0xff);
        graph.launch(stream_);
        stream_.wait();
        const auto merged = merged_.values();
        const int share = kStateVectors / ranks;
        for (int group = 0; group < kGroups; ++group) {
            for (int i = 0; i < kStateVectors; ++i) {
                float expected = 0;
                const int owner = group * ranks + i / share;
                if (work != Work::kMerge) expected = state_value(owner, 4 * i);
                for (int rank = 0; work == Work::kMerge && rank < ranks; ++rank)
                    expected += state_value(group * ranks + rank, 4 * i);
                require(merged[group * kStateVectors + i].x == expected,
                        std::string(what) + " of " + std::to_string(ranks) + ": a wrong sum");
            }
        }
    }

    const size_t shared_bytes_;
    Stream stream_;
    Buffer<float4> states_, merged_;
    Buffer<unsigned> tickets_;
};

__global__ void __launch_bounds__(384, 1) hold_shared() {
    let_next_start();
}

// How many clusters run at once, by the occupancy calculator.
void print_resident(int ranks, int shared_kb) {
    Row row("p6");
    row.add("what", "resident clusters").add("ranks", ranks).add("shared_kb", shared_kb);
    Launch launch{static_cast<unsigned>(ranks), 384, static_cast<size_t>(shared_kb) * 1024};
    launch.cluster = ranks;
    try {
        allow(hold_shared, launch.shared_bytes, ranks);
        int clusters = 0;
        with_config(launch, nullptr, [&](const cudaLaunchConfig_t& config) {
            PROBES_CHECK(cudaOccupancyMaxActiveClusters(&clusters, hold_shared, &config));
        });
        row.add("clusters", clusters).add("blocks", clusters * ranks);
    } catch (const std::runtime_error& error) {  // a size this GPU has not is an answer too
        cudaGetLastError();
        row.add("error", std::string(error.what()));
    }
    row.print();
}

}  // namespace

void probe_p6(const Device& device) {
    Merges merges(device);
    merges.measure_tickets<2>();
    merges.measure_tickets<4>();
    merges.measure_tickets<8>();
    if (!device.has_hopper) return;
    for (int ranks : {2, 4, 8, 16})
        for (int shared_kb : {66, 110, 200}) print_resident(ranks, shared_kb);
    for (int ranks : {2, 4, 8}) merges.measure_barrier(ranks);
    merges.measure_cluster<2>();
    merges.measure_cluster<4>();
    merges.measure_cluster<8>();
    merges.measure_peer_reads();
}

}  // namespace probes
