// P3: how fast can weights be read? 2 GiB in two launches, by loads, cp.async, bulk copies and
// boxes of TMA; rows of a matrix against packed tiles; blocks an SM, stages, hints. A plain copy
// within the device, before and after, is the measure of all.
#include "bench/probes/probe.h"
#include "bench/probes/probes.h"
#include "bench/probes/stream.cuh"

namespace probes {

// From the driver itself, so nothing links to libcuda.
CUtensorMap make_map(const char* data, int64_t bytes, int rows, bool has_promotion) {
    using Encode =
        CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    PROBES_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                  cudaEnableDefault, &found));
    require(found == cudaDriverEntryPointSuccess && entry != nullptr,
            "the driver has no cuTensorMapEncodeTiled");
    const cuuint64_t size[] = {kRowPitch / 2, static_cast<cuuint64_t>(bytes / kRowPitch)};
    const cuuint64_t pitch[] = {kRowPitch};
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)};
    const cuuint32_t step[] = {1, 1};
    CUtensorMap map{};
    const CUresult status = reinterpret_cast<Encode>(entry)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<char*>(data), size, pitch, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        has_promotion ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error " + std::to_string(status));
    return map;
}

namespace {

constexpr int64_t kBytes = int64_t{1} << 30;       // of each of two matrices
constexpr int64_t kFlushBytes = int64_t{1} << 28;  // more than any L2
constexpr int kCpAsyncStages = 6;
constexpr size_t kMostSums = 1 << 14;

// One way to read a matrix.
struct Variant {
    Row row;
    std::function<void(const Piece&)> start;
    int num_sums;  // words of Piece::sums that it writes
};

class Streams {
  public:
    explicit Streams(const Device& device)
        : device_(device), a_(kBytes), b_(kBytes), flush_(kFlushBytes), sums_(kMostSums) {
        fill_random(a_);
        fill_random(b_);
        fill_random(flush_);
        warm_up(stream_);
        expected_ = sum_random(0, kBytes / 4);  // of both: the same words
    }

    void measure_copy() {
        const auto copy = [&] {
            PROBES_CHECK(
                cudaMemcpyAsync(b_.get(), a_.get(), kBytes, cudaMemcpyDeviceToDevice, stream_));
        };
        Row row("p3");
        row.add("variant", "copy");
        // After another copy, whose last lines it writes back as its own are by the next.
        print(row, measure(stream_, {copy}, copy)[0], 2 * kBytes);
    }
    void measure_loads() {
        for (int blocks : {4, 8}) {
            add_loads<true>(blocks);
            add_loads<false>(blocks);
        }
        measure_variants();
    }
    void measure_cp_async() {
        for (int blocks : {1, 2}) {
            add_cp_async<64, true>(blocks);
            add_cp_async<128, true>(blocks);
            add_cp_async<256, true>(blocks);
            add_cp_async<kTile, true>(blocks);
            add_cp_async<128, false>(blocks);
            add_cp_async<kTile, false>(blocks);
        }
        measure_variants();
    }
    void measure_bulk() {
        for (int blocks : {1, 2}) {
            add_copies<false, true>(blocks, {8192, 12});
            add_copies<false, true>(blocks, {16384, 3});
            add_copies<false, true>(blocks, {16384, 6});
            add_copies<false, true>(blocks, {32768, 3});
            add_copies<false, false>(blocks, {16384, 6});
        }
        add_copies<false, true>(1, {16384, 12});
        measure_variants();
    }
    void measure_boxes() {
        for (int blocks : {1, 2}) {
            add_copies<true, true>(blocks, {8192, 12});
            add_copies<true, true>(blocks, {16384, 6});
            add_copies<true, true>(blocks, {32768, 3});
            add_copies<true, true>(blocks, {16384, 6}, false);
            add_copies<true, false>(blocks, {16384, 6});
        }
        add_copies<true, true>(1, {16384, 12});
        measure_variants();
    }

  private:
    // Reads what no variant does, so that none finds its own lines in the L2 cache.
    Run flush() {
        return [this] {
            const Piece piece{flush_.get(), kFlushBytes, sums_.get(), nullptr, 0};
            const auto blocks = static_cast<unsigned>(4 * device_.num_sms);
            probes::start({blocks, kLoadThreads}, stream_, read_by_loads<false>, piece);
        };
    }
    static Row row(const char* variant, int blocks, bool has_hint) {
        Row row("p3");
        row.add("variant", variant).add("blocks_per_sm", blocks).add("evict_first", has_hint);
        return row;
    }
    template <bool kHint>
    void add_loads(int blocks) {
        const Launch launch{static_cast<unsigned>(device_.num_sms * blocks), kLoadThreads};
        variants_.push_back({row("ldg", blocks, kHint).add("layout", "packed"),
                             [=](const Piece& piece) {
                                 probes::start(launch, stream_, read_by_loads<kHint>, piece);
                             },
                             static_cast<int>(launch.grid.x) * kLoadThreads / 32});
    }
    template <int kRow, bool kHint>
    void add_cp_async(int blocks) {
        const auto kernel = read_by_cp_async<kRow, kHint, kCpAsyncStages>;
        const Launch launch{static_cast<unsigned>(device_.num_sms * blocks), kStreamThreads,
                            kCpAsyncStages * kTile};
        allow(kernel, launch.shared_bytes);
        Row line = row("cp.async", blocks, kHint);
        line.add("layout", kRow == kTile ? "packed" : "rows").add("segment", kRow);
        line.add("stage_kb", kTile / 1024).add("stages", kCpAsyncStages - 1);
        variants_.push_back(
            {line, [=](const Piece& piece) { probes::start(launch, stream_, kernel, piece); },
             static_cast<int>(launch.grid.x) * kStreamThreads / 32});
    }
    template <bool kBox, bool kHint>
    void add_copies(int blocks, const Stages& stages, bool has_promotion = true) {
        const auto kernel = read_by_copies<kBox, kHint>;
        const Launch launch{static_cast<unsigned>(device_.num_sms * blocks), kStreamThreads,
                            stages.shared_bytes()};
        allow(kernel, 12 * kTile + kAtom);
        Row line = row(kBox ? "tma box" : "bulk", blocks, kHint);
        line.add("layout", kBox ? "rows" : "packed").add("stage_kb", stages.bytes / 1024);
        line.add("stages", stages.count);
        if (kBox) line.add("l2_promotion", has_promotion);
        CUtensorMap maps[2] = {};
        for (int i = 0; kBox && i < 2; ++i)
            maps[i] =
                make_map(i == 0 ? a_.get() : b_.get(), kBytes, stages.bytes / 128, has_promotion);
        variants_.push_back({line,
                             [=](const Piece& piece) {
                                 const CUtensorMap& map = maps[piece.data == b_.get()];
                                 probes::start(launch, stream_, kernel, piece, stages, map);
                             },
                             static_cast<int>(launch.grid.x) * kStreamThreads / 32});
    }

    void read(const Variant& variant, const Buffer<char>& matrix) {
        variant.start({matrix.get(), kBytes, sums_.get(), nullptr, 0});
    }
    // Times and prints what was added, and forgets it.
    void measure_variants() {
        std::vector<Run> runs;
        for (const Variant& variant : variants_) {
            check_sum(variant, a_);
            check_sum(variant, b_);
            runs.push_back([this, &variant] {
                read(variant, a_);
                read(variant, b_);
            });
        }
        const auto timings = measure(stream_, runs, flush());
        for (size_t i = 0; i < runs.size(); ++i) print(variants_[i].row, timings[i], 2 * kBytes);
        variants_.clear();
    }
    void check_sum(const Variant& variant, const Buffer<char>& matrix) {
        sums_.fill(0);
        read(variant, matrix);
        stream_.wait();
        uint32_t sum = 0;
        const auto sums = sums_.values();
        for (int i = 0; i < variant.num_sums; ++i) sum += sums[i];
        if (sum == expected_) return;
        Row line = variant.row;
        line.add("sum_is_wrong", true).print();
        throw std::runtime_error(
            "a variant does not read each byte once: the last row has its name");
    }
    static void print(Row row, const Timing& timing, int64_t bytes) {
        row.add("us", timing.us).add("gb_s", bytes / timing.us / 1e3).add("spread", timing.spread);
        row.print();
    }

    const Device device_;
    Stream stream_;
    Buffer<char> a_, b_, flush_;
    Buffer<uint32_t> sums_;
    uint32_t expected_ = 0;
    std::vector<Variant> variants_;
};

}  // namespace

void probe_p3(const Device& device) {
    Streams streams(device);
    streams.measure_copy();
    streams.measure_loads();
    streams.measure_cp_async();
    if (device.has_hopper) {
        streams.measure_bulk();
        streams.measure_boxes();
    }
    streams.measure_copy();
}

}  // namespace probes
