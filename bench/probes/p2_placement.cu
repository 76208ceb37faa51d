// P2: is a dot product's result the same wherever it stands? 64 x 128 dot products of 4096 bf16,
// each at every row and column of tiles of 8 to 128 columns, by mma.sync and wgmma; with every
// number of rows before padding that is zero, NaN or huge; and with A and B in each other's place.
#include <random>
#include <thread>

#include "bench/probes/probe.h"
#include "bench/probes/probes.h"
#include "bench/probes/tile.cuh"
#include "tests/simt/fused_sum.h"

namespace probes {
namespace {

constexpr int kK = 4096, kNumA = 64, kNumB = 128;
constexpr int kRowChunks = kK / 8;  // of 16 bytes
constexpr int kStageChunks = kStageK / 8;

// Which rows a block of threads multiplies, and where.
struct Place {
    int a_shift, b_shift;  // row i of the tile is row i + shift of the pool, which is a ring
    int columns;           // of B; the others are padding
    uint32_t padding;      // two values
};

struct Pools {
    const uint4 *a, *b;  // [num, kK] bf16
    int num_a, num_b;
};

// results[a * a_stride + b * b_stride], of rows of the pools: written, or compared with.
struct Results {
    float* values;
    int a_stride, b_stride;
    unsigned long long* differing;  // nullptr: write
};

template <int N>
__device__ void load_stage(unsigned char* a_stage, unsigned char* b_stage, const Pools& pools,
                           const Place& place, int first_chunk) {
    for (int i = threadIdx.x; i < (kTileRows + N) * kStageChunks; i += kTileThreads) {
        const int row = i / kStageChunks, chunk = i % kStageChunks;
        const bool is_a = row < kTileRows;
        const int in_tile = is_a ? row : row - kTileRows;
        const int in_pool = is_a ? (in_tile + place.a_shift) % pools.num_a
                                 : (in_tile + place.b_shift) % pools.num_b;
        const uint4* source =
            (is_a ? pools.a : pools.b) + in_pool * kRowChunks + first_chunk + chunk;
        const uint32_t pad = place.padding;
        const bool is_padding = !is_a && in_tile >= place.columns;
        const uint4 value = is_padding ? make_uint4(pad, pad, pad, pad) : *source;
        *reinterpret_cast<uint4*>((is_a ? a_stage : b_stage) + chunk_at(in_tile, chunk)) = value;
    }
}

template <int N>
__device__ void store_or_compare(const Sums<N>& sums, const Pools& pools, const Place& place,
                                 const Results& results) {
    unsigned differing = 0;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = row_of_sum(e), column = column_of_sum(j, e);
            if (column >= place.columns) continue;
            const int a = (row + place.a_shift) % pools.num_a;
            const int b = (column + place.b_shift) % pools.num_b;
            float* result = results.values + a * results.a_stride + b * results.b_stride;
            if (results.differing == nullptr)
                *result = sums[j][e];
            else
                differing += __float_as_uint(*result) != __float_as_uint(sums[j][e]);
        }
    }
    if (differing > 0) atomicAdd(results.differing, static_cast<unsigned long long>(differing));
}

template <Unit kUnit, int N>
__global__ void __launch_bounds__(kTileThreads)
    dot_products(const Pools pools, const Place* places, const Results results) {
    SPECRT_SHARED(Stage<kTileRows>, a_rows);
    SPECRT_SHARED(Stage<N>, b_rows);
    unsigned char *const a_stage = a_rows.bytes, *const b_stage = b_rows.bytes;
    const Place place = places[blockIdx.x];
    Sums<N> sums = {};
    for (int chunk = 0; chunk < kRowChunks; chunk += kStageChunks) {
        __syncthreads();  // the product before has read its stage
        load_stage<N>(a_stage, b_stage, pools, place, chunk);
        fence_for_async();
        __syncthreads();
        multiply<kUnit, kStageK / 16, N>(sums, a_stage, b_stage, bf16_t{});
    }
    store_or_compare<N>(sums, pools, place, results);
}

// --- what is compared ------------------------------------------------------------------------

std::vector<Place> every_place() {
    std::vector<Place> places;
    for (int a = 0; a < kNumA; ++a)
        for (int b = 0; b < kNumB; ++b) places.push_back({a, b, kNumB, 0});
    return places;
}

// Every number of columns that fits, with each padding.
std::vector<Place> every_count(int n) {
    constexpr uint32_t kZero = 0, kNaN = 0x7fc07fc0, kHuge = 0x7f007f00;  // 2^127
    std::vector<Place> places;
    for (int columns = 1; columns <= n; ++columns)
        for (uint32_t padding : {kZero, kNaN, kHuge})
            places.push_back({7 * columns % kNumA, 11 * columns % kNumB, columns, padding});
    return places;
}

// Random, some rows with products of very different magnitude.
std::vector<uint16_t> random_rows(int count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(static_cast<size_t>(count) * kK);
    for (size_t i = 0; i < values.size(); ++i) {
        const int reach = i / kK % 4 == 3 ? 12 : 0;
        const int shift = reach ? static_cast<int>(random() % (2 * reach)) - reach : 0;
        values[i] = __bfloat16_as_ushort(__float2bfloat16(std::ldexp(normal(random), shift)));
    }
    return values;
}

class Placement {
  public:
    Placement()
        : a_values_(random_rows(kNumA, 3)),
          b_values_(random_rows(kNumB, 4)),
          a_(a_values_),
          b_(b_values_),
          expected_(kNumA * kNumB),
          differing_(1) {
        expected_.fill(0xff);
        std::vector<Place> places;
        for (int b = 0; b < kNumB; b += 8) places.push_back({0, b, 8, 0});
        run<Unit::kMma, 8>(places, pools(), {expected_.get(), kNumB, 1, nullptr});
    }

    template <Unit kUnit, int N>
    void compare() {
        const Results plain{expected_.get(), kNumB, 1, differing_.get()};
        print<kUnit, N>("placement", every_place(), pools(), plain,
                        1L * kTileRows * N * kNumA * kNumB);
        print<kUnit, N>("rows", every_count(N), pools(), plain, 3L * kTileRows * N * (N + 1) / 2);
    }
    // A is the first 64 rows of B, B is A.
    template <Unit kUnit, int N>
    void compare_swapped() {
        const Results swapped{expected_.get(), 1, kNumB, differing_.get()};
        const Pools pools{chunks(b_), chunks(a_), kTileRows, kNumA};
        print<kUnit, N>("operands swapped", every_place(), pools, swapped,
                        1L * kTileRows * N * kNumA * kNumB);
    }
    void compare_model(int width, int bits) const;

  private:
    Pools pools() const { return {chunks(a_), chunks(b_), kNumA, kNumB}; }
    static const uint4* chunks(const Buffer<uint16_t>& rows) {
        return reinterpret_cast<const uint4*>(rows.get());
    }
    template <Unit kUnit, int N>
    void run(const std::vector<Place>& places, const Pools& pools, const Results& results) const {
        const Buffer<Place> on_gpu(places);
        start({static_cast<unsigned>(places.size()), kTileThreads}, nullptr, dot_products<kUnit, N>,
              pools, on_gpu.get(), results);
        PROBES_CHECK(cudaDeviceSynchronize());
    }
    template <Unit kUnit, int N>
    void print(const char* check, const std::vector<Place>& places, const Pools& pools,
               const Results& results, long compared) const {
        differing_.fill(0);
        run<kUnit, N>(places, pools, results);
        Row("p2")
            .add("check", check)
            .add("unit", name_of(kUnit))
            .add("n", N)
            .add("compared", compared)
            .add("differ", differing_.values()[0])
            .print();
    }

    std::vector<uint16_t> a_values_, b_values_;
    Buffer<uint16_t> a_, b_;
    Buffer<float> expected_;
    Buffer<unsigned long long> differing_;
};

// --- the chain of sums, on the host ----------------------------------------------------------

std::vector<simt::Unpacked> unpacked(const uint16_t* values) {
    std::vector<simt::Unpacked> result(kK);
    for (int k = 0; k < kK; ++k)
        result[k] = simt::unpack(__bfloat162float(__ushort_as_bfloat16(values[k])));
    return result;
}

float chain(const std::vector<simt::Unpacked>& a, const std::vector<simt::Unpacked>& b, int width,
            int bits) {
    float sum = 0;
    for (int k = 0; k < kK; k += width) sum = simt::fused_sum(&a[k], &b[k], width, sum, bits);
    return sum;
}

void Placement::compare_model(int width, int bits) const {
    constexpr int kColumns = 32;  // of the 128: the host takes its time
    const std::vector<float> found = expected_.values();
    std::vector<long> differing(kColumns);
    std::vector<std::thread> threads;
    for (int column = 0; column < kColumns; ++column)
        threads.emplace_back([&, column] {
            const int b = column * (kNumB / kColumns) + column % 4;
            const auto right = unpacked(&b_values_[static_cast<size_t>(b) * kK]);
            for (int a = 0; a < kNumA; ++a) {
                const auto left = unpacked(&a_values_[static_cast<size_t>(a) * kK]);
                differing[column] += chain(left, right, width, bits) != found[a * kNumB + b];
            }
        });
    for (auto& thread : threads) thread.join();
    long differ = 0;
    for (long count : differing) differ += count;
    Row("p2")
        .add("check", "model")
        .add("model", std::to_string(width) + " x " + std::to_string(bits) + " bits")
        .add("compared", kColumns * kNumA)
        .add("differ", differ)
        .print();
}

}  // namespace

void probe_p2(const Device& device) {
    Placement placement;
    placement.compare_model(16, 25);
    placement.compare_model(8, 24);
    placement.compare<Unit::kMma, 8>();
    placement.compare<Unit::kMma, 16>();
    placement.compare<Unit::kMma, 32>();
    placement.compare<Unit::kMma, 64>();
    placement.compare<Unit::kMma, 128>();
    placement.compare_swapped<Unit::kMma, 64>();
    if (!device.has_hopper) return;
    placement.compare<Unit::kWgmma, 8>();
    placement.compare<Unit::kWgmma, 16>();
    placement.compare<Unit::kWgmma, 32>();
    placement.compare<Unit::kWgmma, 64>();
    placement.compare<Unit::kWgmma, 128>();
    placement.compare_swapped<Unit::kWgmma, 64>();
}

}  // namespace probes
