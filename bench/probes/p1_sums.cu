// P1: what one sum of sixteen products is. 2^20 sums for each type of operand, c + a[16] b[16],
// with planted magnitudes, by mma.sync and both forms of wgmma, against the model of
// tests/simt/fused_sum.h as sm_90 and as sm_80 have it.
#include <cstring>
#include <random>
#include <thread>

#include "bench/probes/probe.h"
#include "bench/probes/probes.h"
#include "bench/probes/tile.cuh"
#include "tests/simt/fused_sum.h"

namespace probes {
namespace {

constexpr int kN = 8, kK = 16;         // a tile: A [64, 16], B [8, 16], C [64, 8]
constexpr int kNumTiles = 2048;        // of 512 sums
constexpr int kSums = kTileRows * kN;  // of a tile
constexpr int kA = kTileRows * kK, kB = kN * kK;

// Of a tile; the tiles of a group are those whose number is its own modulo their count.
enum Group {
    kIntegers,  // every order and precision gives the exact sum: tells a wrong layout
    kNormal,
    kWide,          // products of very different magnitude
    kCancellation,  // products that all but cancel, and a small accumulator
    kTinyC,         // an accumulator at the edge of what is kept
    kLargeC,        // products at the edge
    kSubnormal,
    kZeroProducts,  // a is zero: the accumulator should come back
    kNumGroups
};
constexpr const char* kGroupNames[] = {"integers", "normal",  "wide",      "cancellation",
                                       "tiny c",   "large c", "subnormal", "zero products"};

template <Unit kUnit, typename T>
__global__ void __launch_bounds__(kTileThreads)
    sum_tiles(const uint4* a, const uint4* b, const float* c, float* d) {
    SPECRT_SHARED(Stage<kTileRows>, a_rows);
    SPECRT_SHARED(Stage<kN>, b_rows);
    unsigned char *const a_stage = a_rows.bytes, *const b_stage = b_rows.bytes;
    const int t = threadIdx.x, tile = blockIdx.x;
    // A row is two chunks of 16 bytes.
    *reinterpret_cast<uint4*>(a_stage + chunk_at(t / 2, t % 2)) = a[tile * (2 * kTileRows) + t];
    if (t < 2 * kN)
        *reinterpret_cast<uint4*>(b_stage + chunk_at(t / 2, t % 2)) = b[tile * (2 * kN) + t];
    Sums<kN> sums;
    for (int e = 0; e < 4; ++e)
        sums[0][e] = c[tile * kSums + row_of_sum(e) * kN + column_of_sum(0, e)];
    fence_for_async();
    __syncthreads();
    multiply<kUnit, 1, kN>(sums, a_stage, b_stage, T{});
    for (int e = 0; e < 4; ++e)
        d[tile * kSums + row_of_sum(e) * kN + column_of_sum(0, e)] = sums[0][e];
}

// --- operands --------------------------------------------------------------------------------

uint16_t bits_of(float x, bf16_t) {
    return __bfloat16_as_ushort(__float2bfloat16(x));
}
uint16_t bits_of(float x, f16_t) {
    return __half_as_ushort(__float2half(x));
}
float value_of(uint16_t bits, bf16_t) {
    return __bfloat162float(__ushort_as_bfloat16(bits));
}
float value_of(uint16_t bits, f16_t) {
    return __half2float(__ushort_as_half(bits));
}

struct Operands {
    std::vector<uint16_t> a, b;  // [tiles, 64, 16], [tiles, 8, 16]
    std::vector<float> c;        // [tiles, 64, 8]
};

class Generator {
  public:
    // `reach`: exponents of operands lie within, of both signs.
    Generator(int reach, int subnormal) : reach_(reach), subnormal_(subnormal) {}

    void fill(Group group, float* a, float* b, float* c) {
        for (int i = 0; i < kA; ++i) a[i] = value(group);
        for (int i = 0; i < kB; ++i) b[i] = group == kIntegers ? integer() : normal_(random_);
        for (int i = 0; i < kSums; ++i) c[i] = accumulator(group);
        if (group == kCancellation) cancel(a, b);
        for (int i = 0; i < kSums; i += 5)
            if (group != kZeroProducts) c[i] = 0;
    }

  private:
    float value(Group group) {
        switch (group) {
            case kIntegers:
                return integer();
            case kWide:
                return std::ldexp(normal_(random_), between(-reach_, reach_));
            case kSubnormal:
                return std::ldexp(normal_(random_), between(subnormal_, subnormal_ + 8));
            case kZeroProducts:
                return random_() % 2 ? 0.0f : -0.0f;
            default:
                return random_() % 16 ? normal_(random_) : 0.0f;
        }
    }
    float accumulator(Group group) {
        const float x = normal_(random_);
        switch (group) {
            case kIntegers:
                return integer();
            case kWide:
                return std::ldexp(x, between(-2 * reach_, reach_));
            case kCancellation:
                return std::ldexp(x, between(-30, -10));
            case kTinyC:
                return std::ldexp(x, between(-32, -18));
            case kLargeC:
                return std::ldexp(x, between(16, 32));
            case kSubnormal:
                return std::ldexp(x, between(subnormal_ - 12, subnormal_ + 8));
            case kZeroProducts:
                return std::ldexp(x, between(-60, 60));
            default:
                return x;
        }
    }
    // The second half of a row is the first negated; of B the same, but for a few last bits.
    void cancel(float* a, float* b) {
        for (int i = 0; i < kA; ++i)
            if (i % kK >= kK / 2) a[i] = -a[i - kK / 2];
        for (int i = 0; i < kB; ++i)
            if (i % kK >= kK / 2) b[i] = b[i - kK / 2] * (random_() % 4 ? 1.0f : 1.01f);
    }
    float integer() { return static_cast<float>(between(-8, 8)); }
    int between(int low, int high) {
        return std::uniform_int_distribution<int>(low, high)(random_);
    }

    int reach_, subnormal_;
    std::mt19937 random_{1};
    std::normal_distribution<float> normal_;
};

template <typename T>
Operands make_operands(T type) {
    constexpr bool kIsHalf = std::is_same_v<T, f16_t>;
    Generator generator(kIsHalf ? 10 : 24, kIsHalf ? -22 : -130);
    Operands operands{std::vector<uint16_t>(kNumTiles * kA), std::vector<uint16_t>(kNumTiles * kB),
                      std::vector<float>(kNumTiles * kSums)};
    float a[kA], b[kB];
    for (int tile = 0; tile < kNumTiles; ++tile) {
        generator.fill(static_cast<Group>(tile % kNumGroups), a, b, &operands.c[tile * kSums]);
        for (int i = 0; i < kA; ++i) operands.a[tile * kA + i] = bits_of(a[i], type);
        for (int i = 0; i < kB; ++i) operands.b[tile * kB + i] = bits_of(b[i], type);
    }
    return operands;
}

// Columns of A and B in another order, each tile in its own, within blocks of `width`.
Operands permuted(const Operands& operands, int width) {
    Operands result = operands;
    std::mt19937 random(2);
    int order[kK];
    for (int tile = 0; tile < kNumTiles; ++tile) {
        for (int k = 0; k < kK; ++k) order[k] = k;
        for (int k = 0; k < kK; k += width) std::shuffle(order + k, order + k + width, random);
        for (int i = 0; i < kA; ++i)
            result.a[tile * kA + i] = operands.a[tile * kA + i / kK * kK + order[i % kK]];
        for (int i = 0; i < kB; ++i)
            result.b[tile * kB + i] = operands.b[tile * kB + i / kK * kK + order[i % kK]];
    }
    return result;
}

// --- sums ------------------------------------------------------------------------------------

template <Unit kUnit, typename T>
std::vector<float> on_gpu(const Operands& operands, T) {
    const Buffer<uint16_t> a(operands.a), b(operands.b);
    const Buffer<float> c(operands.c), d(operands.c.size());
    d.fill(0xff);
    start({kNumTiles, kTileThreads}, nullptr, sum_tiles<kUnit, T>,
          reinterpret_cast<const uint4*>(a.get()), reinterpret_cast<const uint4*>(b.get()), c.get(),
          d.get());
    return d.values();
}

struct Model {
    int width, bits;  // sums of `width` products one after another, fractional bits kept
    std::string name() const {
        return std::to_string(width) + " x " + std::to_string(bits) + " bits";
    }
};
constexpr Model kHopper{16, 25}, kAmpere{8, 24};

struct Sum {
    simt::Unpacked a[kK], b[kK];
    float c;

    template <typename T>
    Sum(const Operands& operands, size_t index, T type) {
        const size_t tile = index / kSums, row = index % kSums / kN, column = index % kN;
        for (int k = 0; k < kK; ++k) {
            a[k] = unpacked(operands.a[tile * kA + row * kK + k], type);
            b[k] = unpacked(operands.b[tile * kB + column * kK + k], type);
        }
        c = operands.c[index];
    }
    float by(const Model& model) const {
        float sum = c;
        for (int k = 0; k < kK; k += model.width)
            sum = simt::fused_sum(a + k, b + k, model.width, sum, model.bits);
        return sum;
    }

  private:
    template <typename T>
    static simt::Unpacked unpacked(uint16_t bits, T type) {
        constexpr bool kIsHalf = std::is_same_v<T, f16_t>;
        return simt::unpack(value_of(bits, type),
                            kIsHalf ? simt::kMinExponentHalf : simt::kMinExponent);
    }
};

// The model's sum of every `stride`th.
template <typename T>
std::vector<float> by_model(const Operands& operands, const Model& model, T type, int stride = 1) {
    std::vector<float> sums(operands.c.size() / stride);
    const size_t workers = std::max(1u, std::min(16u, std::thread::hardware_concurrency()));
    std::vector<std::thread> threads;
    for (size_t worker = 0; worker < workers; ++worker)
        threads.emplace_back([&, worker] {
            for (size_t i = worker; i < sums.size(); i += workers)
                sums[i] = Sum(operands, i * stride, type).by(model);
        });
    for (auto& thread : threads) thread.join();
    return sums;
}

// --- comparisons -----------------------------------------------------------------------------

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

Group group_of(size_t index) {
    return static_cast<Group>(index / kSums % kNumGroups);
}

struct Counts {
    long of[kNumGroups] = {};
    long total() const {
        long sum = 0;
        for (long count : of) sum += count;
        return sum;
    }
};

Counts differing(const std::vector<float>& x, const std::vector<float>& y) {
    Counts counts;
    for (size_t i = 0; i < x.size(); ++i) counts.of[group_of(i)] += bits_of(x[i]) != bits_of(y[i]);
    return counts;
}

std::string hex(uint32_t bits, int digits) {
    char text[16];
    std::snprintf(text, sizeof text, "%0*x", digits, bits);
    return text;
}

// Everything one needs to find out by which rule the first few came about.
void print_examples(const char* dtype, const char* unit, const char* against,
                    const Operands& operands, const std::vector<float>& found,
                    const std::vector<float>& expected) {
    int left = 4;
    for (size_t i = 0; i < found.size() && left > 0; ++i) {
        if (bits_of(found[i]) == bits_of(expected[i])) continue;
        --left;
        const size_t tile = i / kSums, row = i % kSums / kN, column = i % kN;
        std::string a, b;
        for (int k = 0; k < kK; ++k) {
            a += hex(operands.a[tile * kA + row * kK + k], 4) + (k + 1 < kK ? " " : "");
            b += hex(operands.b[tile * kB + column * kK + k], 4) + (k + 1 < kK ? " " : "");
        }
        Row("p1")
            .add("check", "example")
            .add("dtype", dtype)
            .add("unit", unit)
            .add("against", against)
            .add("group", kGroupNames[group_of(i)])
            .add("a", a)
            .add("b", b)
            .add("c", hex(bits_of(operands.c[i]), 8))
            .add("found", hex(bits_of(found[i]), 8))
            .add("expected", hex(bits_of(expected[i]), 8))
            .print();
    }
}

// What a unit's sums are equal to; all of them, and by group.
class Report {
  public:
    Report(const char* dtype, Unit unit) : dtype_(dtype), unit_(name_of(unit)) {}

    void compare(const char* with, const std::vector<float>& x, const std::vector<float>& y) const {
        const Counts counts = differing(x, y);
        Row row = begin("sums");
        row.add("against", with).add("sums", x.size()).add("differ", counts.total());
        for (int group = 0; group < kNumGroups; ++group)
            if (counts.of[group] > 0) row.add(kGroupNames[group], counts.of[group]);
        row.print();
    }
    void zero_products(const Operands& operands, const std::vector<float>& found) const {
        long sums = 0, differ = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            if (group_of(i) != kZeroProducts) continue;
            ++sums;
            differ += bits_of(found[i]) != bits_of(operands.c[i]);
        }
        begin("zero products").add("sums", sums).add("differ", differ).print();
    }
    Row begin(const char* check) const {
        Row row("p1");
        row.add("check", check).add("dtype", dtype_).add("unit", unit_);
        return row;
    }

  private:
    const char *dtype_, *unit_;
};

// A wrong fragment or descriptor must not pass for a fact about arithmetic.
void require_exact_integers(Unit unit, const std::vector<float>& found,
                            const std::vector<float>& exact) {
    const long wrong = differing(found, exact).of[kIntegers];
    require(wrong == 0, std::string(name_of(unit)) + ": " + std::to_string(wrong) +
                            " sums of small integers are wrong: the probe's operands are not "
                            "where the instruction reads them");
}

// Other sums of a power of two products and other precisions, for the case that neither model
// holds.
template <typename T>
void try_models(const Report& report, const Operands& operands, const std::vector<float>& mma,
                T type) {
    // Not a multiple of anything: the subset has sums of all groups, rows and columns.
    constexpr int kStride = 31;
    for (int width : {4, 8, 16}) {
        for (int bits = 23; bits <= 27; ++bits) {
            const Model model{width, bits};
            const auto expected = by_model(operands, model, type, kStride);
            long differ = 0;
            for (size_t i = 0; i < expected.size(); ++i)
                differ += bits_of(expected[i]) != bits_of(mma[i * kStride]);
            report.begin("model")
                .add("model", model.name())
                .add("sums", expected.size())
                .add("differ", differ)
                .print();
        }
    }
}

template <Unit kUnit, typename T>
void probe_wgmma(const char* dtype, const Operands& operands, const std::vector<float>& mma,
                 const std::vector<float>& model, T type) {
    const auto found = on_gpu<kUnit>(operands, type);
    require_exact_integers(kUnit, found, model);
    const Report report(dtype, kUnit);
    report.compare("mma", found, mma);
    report.compare(kHopper.name().c_str(), found, model);
    report.zero_products(operands, found);
    print_examples(dtype, name_of(kUnit), "mma", operands, found, mma);
}

template <typename T>
void probe_type(const char* dtype, const Device& device, T type) {
    const Operands operands = make_operands(type);
    const auto mma = on_gpu<Unit::kMma>(operands, type);
    const auto hopper = by_model(operands, kHopper, type);
    const auto ampere = by_model(operands, kAmpere, type);
    require_exact_integers(Unit::kMma, mma, hopper);
    const Report report(dtype, Unit::kMma);
    report.compare(kHopper.name().c_str(), mma, hopper);
    report.compare(kAmpere.name().c_str(), mma, ampere);
    report.compare("permuted within 16", mma, on_gpu<Unit::kMma>(permuted(operands, 16), type));
    report.compare("permuted within 8", mma, on_gpu<Unit::kMma>(permuted(operands, 8), type));
    report.zero_products(operands, mma);
    const bool is_ampere = differing(mma, ampere).total() < differing(mma, hopper).total();
    print_examples(dtype, name_of(Unit::kMma), (is_ampere ? kAmpere : kHopper).name().c_str(),
                   operands, mma, is_ampere ? ampere : hopper);
    try_models(report, operands, mma, type);
    if (!device.has_hopper) return;
    probe_wgmma<Unit::kWgmma>(dtype, operands, mma, hopper, type);
    probe_wgmma<Unit::kWgmmaRegisters>(dtype, operands, mma, hopper, type);
}

}  // namespace

void probe_p1(const Device& device) {
    probe_type("bf16", device, bf16_t{});
    probe_type("f16", device, f16_t{});
}

}  // namespace probes
