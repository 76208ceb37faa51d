// P7: are conditional nodes of a graph worth it? An IF, taken and not taken, and a round of a
// WHILE, with bodies of 1 and of 14 small kernels (a level of a draft), against the same kernels in
// line and against kernels that read a flag and return.
#include <tuple>

#include "bench/probes/probe.h"
#include "bench/probes/probes.h"

namespace probes {
namespace {

constexpr int kNodes = 20;   // conditional nodes, or what stands for one, in a graph
constexpr int kRounds = 50;  // of a WHILE
constexpr int kBlocks = 16, kThreads = 128;
constexpr int kFirstDriver = 12040;  // with IF and WHILE

struct Flags {
    int is_open;  // whether bodies are run
    int steps;    // counted by each kernel of a body that does its work
    int rounds;   // of a WHILE, still to be run
};

__global__ void decide(Flags* flags, int* decision) {
    *decision = flags->is_open;
}
__global__ void decide_node(cudaGraphConditionalHandle node, Flags* flags, int* decision) {
    *decision = flags->is_open;
    cudaGraphSetConditional(node, flags->is_open);
}

// A kernel of a level. Kernels of a graph run one after another, so its first thread counts alone.
__global__ void step(Flags* flags) {
    if (flags->is_open == 0) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) ++flags->steps;
}
__global__ void last_step(cudaGraphConditionalHandle node, Flags* flags) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    ++flags->steps;
    cudaGraphSetConditional(node, --flags->rounds > 0);
}
__global__ void set_rounds(Flags* flags, int rounds) {
    flags->rounds = rounds;
}

// --- graphs ----------------------------------------------------------------------------------

// Nodes one after another, added to a graph that somebody else owns.
class Chain {
  public:
    explicit Chain(cudaGraph_t graph) : graph_(graph) {}

    template <typename... Params, typename... Args>
    void kernel(dim3 grid, dim3 block, void (*function)(Params...), Args... args) {
        std::tuple<Params...> values(args...);
        std::apply(
            [&](auto&... value) {
                void* pointers[] = {&value...};
                cudaGraphNodeParams node{};
                node.type = cudaGraphNodeTypeKernel;
                node.kernel.func = reinterpret_cast<void*>(function);
                node.kernel.gridDim = grid;
                node.kernel.blockDim = block;
                node.kernel.kernelParams = pointers;  // copied when the node is added
                add(node);
            },
            values);
    }
    cudaGraphConditionalHandle handle(unsigned first_value = 0, unsigned flags = 0) const {
        cudaGraphConditionalHandle result{};
        PROBES_CHECK(cudaGraphConditionalHandleCreate(&result, graph_, first_value, flags));
        return result;
    }
    // Gives the body, to be filled.
    cudaGraph_t conditional(cudaGraphConditionalHandle handle, cudaGraphConditionalNodeType type) {
        cudaGraphNodeParams node{};
        node.type = cudaGraphNodeTypeConditional;
        node.conditional.handle = handle;
        node.conditional.type = type;
        node.conditional.size = 1;
        add(node);
        return node.conditional.phGraph_out[0];
    }

  private:
    void add(cudaGraphNodeParams& params) {
        cudaGraphNode_t node = nullptr;
        PROBES_CHECK(cudaGraphAddNode(&node, graph_, last_ ? &last_ : nullptr, nullptr,
                                      last_ ? 1 : 0, &params));
        last_ = node;
    }

    cudaGraph_t graph_;
    cudaGraphNode_t last_ = nullptr;
};

// What stands behind each decision.
enum class Body {
    kNothing,
    kInline,  // the kernels, which read the flag
    kIf,      // an IF node with the kernels
};

class Conditionals {
  public:
    Conditionals() : flags_(1), decision_(1) {
        set_open(true);
        warm_up(stream_);
    }

    // A body of so many kernels behind each decision, against decisions alone.
    void measure_body(Body body, int kernels) {
        const Graph nothing = if_graph(Body::kNothing, 0);
        const double begin = now();
        const Graph graph = if_graph(body, kernels);
        const double graph_ms = 1e3 * (now() - begin);
        for (bool is_open : {true, false}) {
            set_open(is_open);
            check_steps(graph, is_open ? kNodes * kernels : 0);
            const auto timings = measure(
                stream_, {[&] { nothing.launch(stream_); }, [&] { graph.launch(stream_); }});
            Row("p7")
                .add("what", body == Body::kIf ? "if" : "predicated")
                .add("kernels", kernels)
                .add("taken", is_open)
                .add("us", (timings[1].us - timings[0].us) / kNodes)
                .add("spread_us", timings[1].spread * timings[1].us / kNodes)
                .add("graph_ms", graph_ms)
                .print();
        }
        set_open(true);
    }

    void measure_while(int kernels) {
        const double begin = now();
        const Graph once = while_graph(kernels, 1), often = while_graph(kernels, kRounds + 1);
        const double graph_ms = 1e3 * (now() - begin) / 2;
        check_steps(once, kernels);
        check_steps(often, (kRounds + 1) * kernels);
        const auto timings =
            measure(stream_, {[&] { once.launch(stream_); }, [&] { often.launch(stream_); }});
        Row("p7")
            .add("what", "while")
            .add("kernels", kernels)
            .add("us", (timings[1].us - timings[0].us) / kRounds)
            .add("spread_us", timings[1].spread * timings[1].us / kRounds)
            .add("graph_ms", graph_ms)
            .print();
    }

  private:
    static cudaGraph_t new_graph() {
        cudaGraph_t graph = nullptr;
        PROBES_CHECK(cudaGraphCreate(&graph, 0));
        return graph;
    }
    void add_steps(Chain& chain, int kernels) const {
        for (int i = 0; i < kernels; ++i) chain.kernel(kBlocks, kThreads, step, flags_.get());
    }
    Graph if_graph(Body body, int kernels) const {
        const cudaGraph_t graph = new_graph();
        Chain chain(graph);
        for (int i = 0; i < kNodes; ++i) {
            if (body == Body::kIf) {
                const auto node = chain.handle();
                chain.kernel(1, 1, decide_node, node, flags_.get(), decision_.get());
                Chain inner(chain.conditional(node, cudaGraphCondTypeIf));
                add_steps(inner, kernels);
            } else {
                chain.kernel(1, 1, decide, flags_.get(), decision_.get());
                if (body == Body::kInline) add_steps(chain, kernels);
            }
        }
        return Graph(graph);
    }
    Graph while_graph(int kernels, int rounds) const {
        const cudaGraph_t graph = new_graph();
        Chain chain(graph);
        const auto node = chain.handle(1, cudaGraphCondAssignDefault);
        chain.kernel(1, 1, set_rounds, flags_.get(), rounds);
        Chain inner(chain.conditional(node, cudaGraphCondTypeWhile));
        add_steps(inner, kernels - 1);
        inner.kernel(kBlocks, kThreads, last_step, node, flags_.get());
        return Graph(graph);
    }

    void write(const Flags& flags) const {
        PROBES_CHECK(cudaMemcpy(flags_.get(), &flags, sizeof flags, cudaMemcpyHostToDevice));
        PROBES_CHECK(cudaDeviceSynchronize());
    }
    void set_open(bool is_open) {
        is_open_ = is_open;
        write({is_open, 0, 0});
    }
    // That bodies ran as often as they should.
    void check_steps(const Graph& graph, int expected) const {
        write({is_open_, 0, 0});
        graph.launch(stream_);
        stream_.wait();
        const int steps = flags_.values()[0].steps;
        require(steps == expected, "expected " + std::to_string(expected) +
                                       " kernels of bodies, found " + std::to_string(steps));
    }

    Stream stream_;
    Buffer<Flags> flags_;
    Buffer<int> decision_;
    bool is_open_ = true;
};

}  // namespace

void probe_p7(const Device&) {
    int driver = 0;
    PROBES_CHECK(cudaDriverGetVersion(&driver));
    if (driver < kFirstDriver) {
        Row("p7").add("what", "unsupported").add("driver", driver).print();
        return;
    }
    Conditionals conditionals;
    for (int kernels : {1, 14}) conditionals.measure_body(Body::kInline, kernels);
    for (int kernels : {1, 14}) conditionals.measure_body(Body::kIf, kernels);
    for (int kernels : {1, 14}) conditionals.measure_while(kernels);
}

}  // namespace probes
