// What the host side of every probe uses: checked calls, a line of JSON for each fact, memory,
// graphs, and timing. A probe that cannot go on throws; main prints why and exits with 1.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if CUDART_VERSION < 13000
#error "the probes are written for CUDA 13, whose calls for edges of graphs differ from CUDA 12's"
#endif

// PROBES_CHECK(cudaX(...)): throws with the call's text and the runtime's reason.
#define PROBES_CHECK(call) ::probes::check((call), #call)

namespace probes {

inline void check(cudaError_t status, const char* call) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

inline void require(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

// --- results ---------------------------------------------------------------------------------

// One JSON object on a line of stdout: {"probe": "p3", "variant": "ldg", ...}.
class Row {
  public:
    explicit Row(const char* probe) : text_("{\"probe\": " + quoted(probe)) {}

    Row& add(const char* key, const std::string& value) { return put(key, quoted(value)); }
    Row& add(const char* key, const char* value) { return put(key, quoted(value)); }
    Row& add(const char* key, bool value) { return put(key, value ? "true" : "false"); }
    template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
    Row& add(const char* key, Number value) {
        if constexpr (std::is_floating_point_v<Number>) {
            if (!std::isfinite(value)) return put(key, "null");
            char digits[32];
            std::snprintf(digits, sizeof digits, "%.6g", static_cast<double>(value));
            return put(key, digits);
        } else {
            return put(key, std::to_string(value));
        }
    }
    // At once, so that it is there if the process dies with the next kernel.
    void print() const {
        std::printf("%s}\n", text_.c_str());
        std::fflush(stdout);
    }

  private:
    Row& put(const char* key, const std::string& value) {
        text_ += ", " + quoted(key) + ": " + value;
        return *this;
    }
    static std::string quoted(const std::string& text) {
        std::string result = "\"";
        for (char c : text) {
            if (c == '"' || c == '\\') result += '\\';
            result += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
        }
        return result + '"';
    }

    std::string text_;
};

// --- device ----------------------------------------------------------------------------------

struct Device {
    int num_sms;
    size_t shared_bytes;  // a block's, at most
    // Device code of sm_90a runs here: wgmma, TMA, clusters, programmatic launches.
    bool has_hopper;
};

Device find_device();  // device.cu; its first launch, so it also tells whether this build runs

// Device memory. Copies and fills are over when the call returns: streams here do not wait for the
// default stream, and neither a memset nor a copy of pageable memory waits for its end.
template <typename T>
class Buffer {
  public:
    explicit Buffer(size_t count) : count_(count) {
        PROBES_CHECK(cudaMalloc(&data_, count * sizeof(T)));
    }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
        PROBES_CHECK(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
        PROBES_CHECK(cudaDeviceSynchronize());
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }

    T* get() const { return data_; }
    size_t count() const { return count_; }
    size_t bytes() const { return count_ * sizeof(T); }
    void fill(int byte) const {
        PROBES_CHECK(cudaMemset(data_, byte, bytes()));
        PROBES_CHECK(cudaDeviceSynchronize());
    }
    // Waits for all work before.
    std::vector<T> values() const {
        std::vector<T> result(count_);
        PROBES_CHECK(cudaDeviceSynchronize());
        PROBES_CHECK(cudaMemcpy(result.data(), data_, bytes(), cudaMemcpyDeviceToHost));
        return result;
    }

  private:
    T* data_ = nullptr;
    size_t count_;
};

// Word i becomes random_word(i), the sum of which `sum_random` gives without reading memory.
__host__ __device__ inline uint32_t random_word(uint64_t index) {
    uint64_t x = (index + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(x >> 32);
}
void fill_random(const Buffer<char>& buffer);                  // device.cu
uint32_t sum_random(uint64_t first_word, uint64_t last_word);  // device.cu
void warm_up(cudaStream_t stream);                             // device.cu: until clocks are up

class Stream {
  public:
    Stream() { PROBES_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream_); }
    operator cudaStream_t() const { return stream_; }
    void wait() const { PROBES_CHECK(cudaStreamSynchronize(stream_)); }

  private:
    cudaStream_t stream_ = nullptr;
};

// --- launches --------------------------------------------------------------------------------

struct Launch {
    dim3 grid, block;
    size_t shared_bytes = 0;       // dynamic
    bool is_programmatic = false;  // may begin before the kernel before it has ended
    unsigned cluster = 1;          // blocks
};

// Dynamic shared memory above 48 KiB, and clusters of more than 8 blocks, must be allowed first.
template <typename... Params>
void allow(void (*kernel)(Params...), size_t shared_bytes, unsigned cluster = 1) {
    const auto* entry = reinterpret_cast<const void*>(kernel);
    PROBES_CHECK(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)));
    PROBES_CHECK(cudaFuncSetAttribute(entry, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
    if (cluster > 8)
        PROBES_CHECK(
            cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Calls `use` with the launch's configuration, whose attributes live that long.
template <typename Use>
void with_config(const Launch& launch, cudaStream_t stream, Use use) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = launch.block;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (launch.is_programmatic) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = launch.cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    use(config);
}

template <typename... Params, typename... Args>
void start(const Launch& launch, cudaStream_t stream, void (*kernel)(Params...),
           const Args&... args) {
    with_config(launch, stream, [&](const cudaLaunchConfig_t& config) {
        PROBES_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
    });
}

// A graph that can be launched, made of what `record` starts on the stream it is given.
class Graph {
  public:
    template <typename Record>
    static Graph captured(cudaStream_t stream, Record record) {
        cudaGraph_t graph = nullptr;
        PROBES_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        try {
            record();
        } catch (...) {  // or the stream stays in capture and hides the reason
            cudaStreamEndCapture(stream, &graph);
            throw;
        }
        PROBES_CHECK(cudaStreamEndCapture(stream, &graph));
        return Graph(graph);
    }
    // Takes the graph.
    explicit Graph(cudaGraph_t graph) : graph_(graph) {
        PROBES_CHECK(cudaGraphInstantiate(&exec_, graph_, 0));
    }
    Graph(Graph&& other) noexcept
        : graph_(std::exchange(other.graph_, nullptr)),
          exec_(std::exchange(other.exec_, nullptr)) {}
    Graph(const Graph&) = delete;
    ~Graph() {
        if (exec_) cudaGraphExecDestroy(exec_);
        if (graph_) cudaGraphDestroy(graph_);
    }
    void launch(cudaStream_t stream) const { PROBES_CHECK(cudaGraphLaunch(exec_, stream)); }
    int num_programmatic_edges() const;  // device.cu

  private:
    cudaGraph_t graph_ = nullptr;
    cudaGraphExec_t exec_ = nullptr;
};

// --- timing ----------------------------------------------------------------------------------

inline double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t middle = values.size() / 2;
    return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

struct Timing {
    double us;      // of one run
    double spread;  // between the medians of two interleaved halves, of their mean
};

using Run = std::function<void()>;

// Microseconds of each run on the stream, between two events: in turn (A B A B ...), twice seven
// times, after one that is not counted. `before`: started ahead of each, not timed. The stream is
// held while the host starts a run, so what that takes is not in the time.
std::vector<Timing> measure(cudaStream_t stream, const std::vector<Run>& runs,
                            const Run& before = {}, int rounds = 14);  // device.cu

}  // namespace probes
