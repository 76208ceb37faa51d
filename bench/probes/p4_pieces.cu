// P4: what does it cost to read in pieces, a launch each? 1 GB in matrices of 33 MB and 117 MB,
// back to back in a graph, with plain and with programmatic edges, where a kernel begins to read
// its weights before the one before has ended; the same with a norm's small kernel between two
// pieces; and all of it in one launch.
#include "bench/probes/probe.h"
#include "bench/probes/probes.h"
#include "bench/probes/stream.cuh"

namespace probes {
namespace {

constexpr int64_t kBytes = int64_t{1} << 30;
constexpr int64_t kFlushBytes = int64_t{1} << 28;  // more than any L2
constexpr int64_t kPieces[] = {int64_t{4096} * 8192, int64_t{14336} * 8192};
constexpr size_t kSums = 1 << 11;  // words of one launch
constexpr int kMostPieces = 32;
constexpr int kCpAsyncStages = 6;
constexpr int kSmallRows = 60, kSmallThreads = 256;

// As a norm: each row waits for the matrix before it, and the matrix behind it for each row.
__global__ void __launch_bounds__(kSmallThreads) touch_rows(uint4* rows) {
    let_next_start();
    wait_for_previous();
    uint4* mine = rows + blockIdx.x * (2 * kSmallThreads) + threadIdx.x;
    uint4 v = mine[0], w = mine[kSmallThreads];
    const int is_any = __syncthreads_or((v.x ^ w.x) == 1);
    v.x += is_any, w.x += is_any;
    mine[0] = v, mine[kSmallThreads] = w;
}

// One way to read a piece.
struct Reader {
    Row row;
    std::function<void(const Piece&, bool is_programmatic)> start;
    int num_sums;
    bool has_programmatic;
};

class Pieces {
  public:
    explicit Pieces(const Device& device)
        : device_(device),
          matrix_(kBytes),
          flush_(kFlushBytes),
          rows_(kSmallRows * 2 * kSmallThreads * 16),
          sums_(kSums * kMostPieces),
          flush_sums_(1 << 14),
          chain_(2) {
        fill_random(matrix_);
        fill_random(flush_);
        fill_random(rows_);
        warm_up(stream_);
    }

    void measure_all() {
        const auto cp_async = read_by_cp_async<128, true, kCpAsyncStages>;
        allow(cp_async, kCpAsyncStages * kTile);
        for (int blocks : {1, 2}) {
            add("cp.async", blocks, kCpAsyncStages * kTile,
                [this, cp_async](const Launch& launch, const Piece& piece) {
                    probes::start(launch, stream_, cp_async, piece);
                });
        }
        if (device_.has_hopper) {
            add_bulk(1, 6);
            add_bulk(1, 12);
            add_bulk(2, 6);
        }
        for (const Reader& reader : readers_)
            for (int64_t bytes : kPieces) measure_reader(reader, bytes);
    }

  private:
    void add_bulk(int blocks, int num_stages) {
        const auto kernel = read_by_copies<false, true>;
        const Stages stages{kTile, num_stages};
        allow(kernel, 12 * kTile + kAtom);
        add("bulk", blocks, stages.shared_bytes(),
            [this, kernel, stages](const Launch& launch, const Piece& piece) {
                probes::start(launch, stream_, kernel, piece, stages, CUtensorMap{});
            });
    }
    template <typename Start>
    void add(const char* variant, int blocks, size_t shared_bytes, Start start) {
        Row row("p4");
        row.add("variant", variant).add("blocks_per_sm", blocks);
        row.add("shared_kb", shared_bytes / 1024);
        Launch launch{static_cast<unsigned>(device_.num_sms * blocks), kStreamThreads,
                      shared_bytes};
        const int num_sums = device_.num_sms * blocks * kStreamThreads / 32;
        require(static_cast<size_t>(num_sums) <= kSums, "p4: too many blocks for the sums");
        readers_.push_back({row,
                            [=](const Piece& piece, bool is_programmatic) mutable {
                                launch.is_programmatic = is_programmatic;
                                start(launch, piece);
                            },
                            num_sums, device_.has_hopper});
    }
    Run flush() {
        return [this] {
            const Piece piece{flush_.get(), kFlushBytes, flush_sums_.get(), nullptr, 0};
            const auto blocks = static_cast<unsigned>(4 * device_.num_sms);
            probes::start({blocks, kLoadThreads}, stream_, read_by_loads<false>, piece);
        };
    }
    void start_small(bool is_programmatic) {
        Launch launch{kSmallRows, kSmallThreads};
        launch.is_programmatic = is_programmatic;
        probes::start(launch, stream_, touch_rows, reinterpret_cast<uint4*>(rows_.get()));
    }
    // All pieces; the first launch of a graph has no edge, so it is never programmatic.
    Graph graph(const Reader& reader, int64_t bytes, bool is_programmatic, bool has_small) {
        return Graph::captured(stream_, [&] {
            for (int i = 0; i < kBytes / bytes; ++i) {
                if (has_small && i > 0) start_small(is_programmatic);
                reader.start({matrix_.get() + i * bytes, bytes, sums_.get() + i * kSums,
                              has_small ? nullptr : chain_.get(), i},
                             is_programmatic && i > 0);
            }
        });
    }
    struct Mode {
        const char* name;
        bool is_programmatic, has_small;
        int64_t bytes;  // of a piece
    };
    void measure_reader(const Reader& reader, int64_t bytes) {
        const int64_t read = kBytes / bytes * bytes;
        std::vector<Mode> modes{{"plain", false, false, bytes},
                                {"plain, small between", false, true, bytes}};
        if (reader.has_programmatic) {
            modes.push_back({"programmatic", true, false, bytes});
            modes.push_back({"programmatic, small between", true, true, bytes});
        }
        modes.push_back({"one launch", false, false, read});
        std::vector<Graph> graphs;
        std::vector<Run> runs;
        for (const Mode& mode : modes) {
            graphs.push_back(graph(reader, mode.bytes, mode.is_programmatic, mode.has_small));
            check(reader, graphs.back(), mode);
        }
        for (const Graph& one : graphs) runs.push_back([this, &one] { one.launch(stream_); });
        const auto timings = measure(stream_, runs, flush());
        for (size_t i = 0; i < modes.size(); ++i) {
            Row row = reader.row;
            row.add("piece_mb", bytes / 1e6)
                .add("pieces", kBytes / bytes)
                .add("mode", modes[i].name);
            row.add("programmatic_edges", graphs[i].num_programmatic_edges());
            row.add("us", timings[i].us).add("us_per_piece", timings[i].us * bytes / read);
            row.add("gb_s", read / timings[i].us / 1e3).add("spread", timings[i].spread).print();
        }
    }
    // Each byte read once, and no launch behind its wait before the one before had ended.
    void check(const Reader& reader, const Graph& graph, const Mode& mode) {
        sums_.fill(0);
        chain_.fill(0);
        graph.launch(stream_);
        stream_.wait();
        const auto sums = sums_.values();
        const int pieces = static_cast<int>(kBytes / mode.bytes);
        uint32_t sum = 0;
        for (int piece = 0; piece < pieces; ++piece)
            for (int i = 0; i < reader.num_sums; ++i) sum += sums[piece * kSums + i];
        require(sum == sum_random(0, pieces * mode.bytes / 4),
                std::string(mode.name) + ": not each byte was read once");
        require(mode.has_small || chain_.values()[1] == 0,
                std::string(mode.name) + ": a kernel went on before the one before had ended");
    }

    const Device device_;
    Stream stream_;
    Buffer<char> matrix_, flush_, rows_;
    Buffer<uint32_t> sums_, flush_sums_;
    Buffer<int> chain_;
    std::vector<Reader> readers_;
};

}  // namespace

void probe_p4(const Device& device) {
    Pieces(device).measure_all();
}

}  // namespace probes
