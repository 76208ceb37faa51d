// P5: what does a kernel cost that does nothing: as a node of a graph with plain and with
// programmatic edges, launched from the host, and as a graph of its own?
#include "bench/probes/hopper.cuh"
#include "bench/probes/probe.h"
#include "bench/probes/probes.h"

namespace probes {
namespace {

constexpr int kNodes = 300, kThreads = 128;
constexpr int kEagerLaunches = 400;  // fewer than a stream queues before the host has to wait
constexpr int kRepeats = 14;

__global__ void __launch_bounds__(kThreads) do_nothing(int* never) {
    let_next_start();
    wait_for_previous();
    if (never != nullptr && threadIdx.x == kThreads) *never = 1;
}

Graph empty_graph(cudaStream_t stream, int nodes, unsigned blocks, bool is_programmatic) {
    return Graph::captured(stream, [&] {
        for (int i = 0; i < nodes; ++i) {
            Launch launch{blocks, kThreads};
            launch.is_programmatic = is_programmatic && i > 0;
            start(launch, stream, do_nothing, nullptr);
        }
    });
}

void measure_nodes(const Device& device, cudaStream_t stream) {
    struct Case {
        unsigned blocks;
        bool is_programmatic;
    };
    const auto all = static_cast<unsigned>(device.num_sms);
    std::vector<Case> cases{{1, false}, {all, false}, {4 * all, false}};
    if (device.has_hopper)
        for (unsigned blocks : {1u, all, 4 * all}) cases.push_back({blocks, true});
    std::vector<Graph> graphs;
    std::vector<Run> runs;
    for (const Case& one : cases)
        graphs.push_back(empty_graph(stream, kNodes, one.blocks, one.is_programmatic));
    for (const Graph& graph : graphs) runs.push_back([&graph, stream] { graph.launch(stream); });
    const auto timings = measure(stream, runs);
    for (size_t i = 0; i < cases.size(); ++i)
        Row("p5")
            .add("what", "node of a graph")
            .add("edges", cases[i].is_programmatic ? "programmatic" : "plain")
            .add("programmatic_edges", graphs[i].num_programmatic_edges())
            .add("blocks", cases[i].blocks)
            .add("nodes", kNodes)
            .add("us", timings[i].us / kNodes)
            .add("spread", timings[i].spread)
            .print();
}

// Microseconds of the host for one `run`, of `count` in a row, and until the GPU has done it.
struct HostTiming {
    double host_us, total_us;
};

HostTiming measure_host(const Stream& stream, int count, const Run& run) {
    std::vector<double> host, total;
    for (int round = -1; round < kRepeats; ++round) {
        stream.wait();
        const double begin = now();
        for (int i = 0; i < count; ++i) run();
        const double started = now();
        stream.wait();
        const double end = now();
        if (round < 0) continue;
        host.push_back(1e6 * (started - begin) / count);
        total.push_back(1e6 * (end - begin) / count);
    }
    return {median(host), median(total)};
}

void print(const char* what, const HostTiming& timing) {
    Row("p5").add("what", what).add("host_us", timing.host_us).add("us", timing.total_us).print();
}

void measure_launches(const Device& device, const Stream& stream) {
    const Launch launch{static_cast<unsigned>(device.num_sms), kThreads};
    const Run eager = [&] { start(launch, stream, do_nothing, nullptr); };
    print("eager launch, one of many", measure_host(stream, kEagerLaunches, eager));
    print("eager launch and wait", measure_host(stream, 1, eager));
    for (int nodes : {1, kNodes}) {
        const Graph graph = empty_graph(stream, nodes, launch.grid.x, false);
        const std::string name = "graph of " + std::to_string(nodes);
        const Run run = [&] { graph.launch(stream); };
        print((name + ", one of many").c_str(), measure_host(stream, 20, run));
        print((name + " and wait").c_str(), measure_host(stream, 1, run));
    }
}

}  // namespace

void probe_p5(const Device& device) {
    const Stream stream;
    warm_up(stream);
    measure_nodes(device, stream);
    measure_launches(device, stream);
}

}  // namespace probes
