// Products by packed bfloat16 on vector units. For each 32 of k, and each part of x, a chain of
// fused multiplications over the even k and one over the odd k are summed, then added to the sum:
// the order of matrix units, in which every instruction set gives the same bits. Blocking decides
// how often weights and inputs are loaded, never the order.
#include "core/matmul_tiles.h"

namespace specrt::SPECRT_ISA {
namespace {

// A panel is two vectors of outputs: two strips, or with AVX2 the halves of one.
//
// A part of a row of x is a virtual row. A block has up to six of them by a panel, so with AVX-512
//
//                    even k          odd k
//                  w[0]  w[1]     w[0]  w[1]      of 16 outputs each
//     x[0] of k    fma   fma      fma   fma
//     ...                                         24 chains, 2 weights, 1 input: 27 of 32 registers
//     x[5] of k    fma   fma      fma   fma
//
// A panel's weights come from memory for the first block of rows; the later ones find them cached.
constexpr int kLanes = sizeof(Part) / sizeof(float);
constexpr int64_t kPanelStrips = 2 * kLanes / 16;
constexpr int kMostRows = 6;    // virtual ones
constexpr int kLoneSteps = 64;  // of a lone row, which is split where it is multiplied

#if defined(__AVX512F__)

inline Part broadcast(const float* p) {
    return splat(*p);
}
inline Part take(const float* p) {
    return load(p);
}
inline void put(Part a, float* p) {
    store(a, p);
}
inline __m512i line_at(const char* line) {
    return _mm512_loadu_si512(line);
}

#if defined(SPECRT_BF16_PAIRS)

// VDPBF16PS: two steps of a chain at once, first the upper half of a lane, each rounded to nearest
// and flushed. So a lane holds w[k] above w[k + 2], of two rows of a tile.
struct Arithmetic {
    static constexpr int kUnits = 8;  // a step of 32 k: multiplications of each chain
    static constexpr int kAhead = 0;  // bytes; fetching ahead only costs where this is taken

    static Part even(const char* line) {
        const __m512i upper = _mm512_slli_epi32(line_at(line), 16), lower = line_at(line + 64);
        return pick(upper, lower);
    }
    static Part odd(const char* line) {
        return pick(line_at(line), _mm512_srli_epi32(line_at(line + 64), 16));
    }
    static Part multiply(Part x, Part w, Part sum) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v));
        return sum;
    }
    // A word for each multiplication: of k, k + 2 even, then odd.
    static void place(const bf16 (&part)[kTileDepth], float* words) {
        const __m512i order = _mm512_broadcast_i32x4(
            _mm_setr_epi8(4, 5, 0, 1, 6, 7, 2, 3, 12, 13, 8, 9, 14, 15, 10, 11));
        _mm512_storeu_si512(words, _mm512_shuffle_epi8(_mm512_loadu_si512(part), order));
    }

  private:
    static Part pick(__m512i upper, __m512i lower) {
        constexpr int kSecondUnderMask = 0xca;  // a ? b : c, bit by bit
        const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        return {
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mask, upper, lower, kSecondUnderMask))};
    }
};

#else

inline Part even_of(const char* line) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(line_at(line), 16))};
}
inline Part odd_of(const char* line) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(line_at(line), mask))};
}
inline Part chain(Part x, Part w, Part sum) {
    return fma(x, w, sum);
}
constexpr int kFetchedAhead = 4096;

#endif
#elif defined(__AVX2__)

inline Part broadcast(const float* p) {
    return {_mm256_broadcast_ss(p)};
}
inline Part take(const float* p) {
    return {_mm256_loadu_ps(p)};
}
inline void put(Part a, float* p) {
    _mm256_storeu_ps(p, a.v);
}
inline Part add(Part a, Part b) {
    return {_mm256_add_ps(a.v, b.v)};
}
inline __m256i line_at(const char* line) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
}
inline Part even_of(const char* line) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(line_at(line), 16))};
}
inline Part odd_of(const char* line) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(line_at(line), mask))};
}
inline Part chain(Part x, Part w, Part sum) {
    return fma(x, w, sum);
}
inline Part flushed(Part a) {
    return a;
}
constexpr int kFetchedAhead = 0;

#else

inline Part broadcast(const float* p) {
    return splat(*p);
}
inline Part take(const float* p) {
    return load(p);
}
inline void put(Part a, float* p) {
    store(a, p);
}
inline Part half_of(const char* line, int half) {
    const auto* pairs = reinterpret_cast<const bf16*>(line);
    return lanes([&](int n) { return specrt::SPECRT_ISA::flushed(to_float(pairs[2 * n + half])); });
}
inline Part even_of(const char* line) {
    return half_of(line, 0);
}
inline Part odd_of(const char* line) {
    return half_of(line, 1);
}
inline Part chain(Part x, Part w, Part sum) {
    return lanes([&](int n) { return flushed_fma(x.v[n], w.v[n], sum.v[n]); });
}
constexpr int kFetchedAhead = 0;

#endif

#if !defined(SPECRT_BF16_PAIRS)

struct Arithmetic {
    static constexpr int kUnits = 16;  // a step of 32 k: multiplications of each chain
    static constexpr int kAhead = kFetchedAhead;

    static Part even(const char* line) { return even_of(line); }
    static Part odd(const char* line) { return odd_of(line); }
    static Part multiply(Part x, Part w, Part sum) { return chain(x, w, sum); }
    // A word for each multiplication: of k even, then of the next.
    static void place(const bf16 (&part)[kTileDepth], float* words) {
        for (int i = 0; i < kTileDepth; i += 16) store(load(part + i), words + i);
    }
};

#endif

constexpr int kWords = 2 * Arithmetic::kUnits;  // of a virtual row's step
constexpr int64_t kUnitBytes = kTileBytes / Arithmetic::kUnits;

// A block: its weights, whose vectors lie `stride` bytes apart; its rows [step][virtual row][word];
// its sums [row][2 * kLanes].
struct Block {
    const char* weights;
    int64_t stride, num_steps;
    const float* x;
    float* sums;
};

template <int R, int V>
inline __attribute__((always_inline)) void chains(const Block& b, const char* line, const float* x,
                                                  Part (&even)[R][V], Part (&odd)[R][V]) {
    for (int unit = 0; unit < Arithmetic::kUnits; ++unit, line += kUnitBytes, x += 2) {
        Part w[V];
        if constexpr (Arithmetic::kAhead > 0)
            each<V>([&](auto v) { prefetch(line + v * b.stride + Arithmetic::kAhead); });
        each<V>([&](auto v) { w[v] = Arithmetic::even(line + v * b.stride); });
        each<R>([&](auto r) {
            const Part value = broadcast(x + r * kWords);
            each<V>([&](auto v) { even[r][v] = Arithmetic::multiply(value, w[v], even[r][v]); });
        });
        each<V>([&](auto v) { w[v] = Arithmetic::odd(line + v * b.stride); });
        each<R>([&](auto r) {
            const Part value = broadcast(x + r * kWords + 1);
            each<V>([&](auto v) { odd[r][v] = Arithmetic::multiply(value, w[v], odd[r][v]); });
        });
    }
}

// N rows of P parts by V vectors: adds all steps to the sums.
template <int N, int P, int V>
__attribute__((noinline)) void accumulate(const Block& b) {
    constexpr int R = N * P;
    const char* tile = b.weights;
    const float* x = b.x;
    for (int64_t k = 0; k < b.num_steps; ++k, tile += kTileBytes, x += R * kWords) {
        Part even[R][V], odd[R][V];
        each<R>([&](auto r) { each<V>([&](auto v) { clear(even[r][v]), clear(odd[r][v]); }); });
        chains<R, V>(b, tile, x, even, odd);
        each<N>([&](auto n) {
            each<V>([&](auto v) {
                float* at = b.sums + (n * 2 + v) * kLanes;
                Part sum = take(at);
                each<P>([&](auto part) {
                    constexpr int r = n * P + part;
                    sum = flushed(add(sum, flushed(add(even[r][v], odd[r][v]))));
                });
                put(sum, at);
            });
        });
    }
}

template <int P, int N = kMostRows / P>
void accumulate_rows(const Block& b, int64_t num_rows, bool is_whole) {
    if constexpr (N > 1) {
        if (num_rows < N) return accumulate_rows<P, N - 1>(b, num_rows, is_whole);
    }
    if constexpr (kLanes == 16) {
        is_whole ? accumulate<N, P, 2>(b) : accumulate<N, P, 1>(b);
    } else if constexpr (N * P <= 3) {
        accumulate<N, P, 2>(b);
    } else {  // vector by vector: sixteen registers hold no more chains
        accumulate<N, P, 1>(b);
        accumulate<N, P, 1>({b.weights + b.stride, b.stride, b.num_steps, b.x, b.sums + kLanes});
    }
}

// How rows fall into blocks, evenly: 7 = 2 + 2 + 3.
struct Rows {
    int64_t num_rows, num_blocks, num_steps;
    int num_parts;

    explicit Rows(const MatmulParams& p)
        : num_rows(p.num_rows),
          num_blocks(divide_up(p.num_rows * num_parts_of(p.format), kMostRows)),
          num_steps(divide_up(p.depth, kTileDepth)),
          num_parts(num_parts_of(p.format)) {}

    bool is_lone() const { return num_rows == 1; }
    int64_t begin(int64_t block) const { return num_rows * block / num_blocks; }
    int64_t block_of(int64_t row) const { return ((row + 1) * num_blocks - 1) / num_rows; }
    // Words of the rows in front of a block's step, in [block][step][row][part][word].
    int64_t offset(int64_t block, int64_t step) const {
        const int64_t first = begin(block), size = begin(block + 1) - first;
        return (first * num_steps + step * size) * num_parts * kWords;
    }
};

float* words_of(const MatmulParams& p) {
    return static_cast<float*>(p.workspace);
}

// One step of one row, as words of all its parts.
void place_step(const MatmulParams& p, int64_t row, int64_t step, float* words) {
    bf16 high[kTileDepth], low[kTileDepth];
    const int64_t k = step * kTileDepth;
    split_step(p.x + row * p.x_stride + k, p.depth - k, high, low);
    Arithmetic::place(high, words);
    if (num_parts_of(p.format) == 2) Arithmetic::place(low, words + kWords);
}

// Some steps of a lone row as words, which are made where they are used: that costs less than a
// launch for them.
struct LoneWords {
    alignas(64) float words[kLoneSteps * 2 * kWords];

    void place(const MatmulParams& p, int64_t first, int64_t count) {
        const int stride = num_parts_of(p.format) * kWords;
        for (int64_t i = 0; i < count; ++i) place_step(p, 0, first + i, words + i * stride);
    }
};

// A row too long to be kept as words while a piece lasts.
template <int P>
void accumulate_long(const MatmulParams& p, Block b, LoneWords& lone, bool is_whole) {
    b.x = lone.words;
    for (int64_t left = b.num_steps, step = 0; left > 0; left -= kLoneSteps) {
        b.num_steps = left < kLoneSteps ? left : kLoneSteps;
        lone.place(p, step, b.num_steps);
        accumulate_rows<P, 1>(b, 1, is_whole);
        b.weights += b.num_steps * kTileBytes;
        step += b.num_steps;
    }
}

template <int P>
void panel(const MatmulParams& p, const Rows& rows, LoneWords& lone, int64_t first_strip,
           int64_t num_strips) {
    const int64_t bytes = strip_bytes(p.format, p.depth);
    const bool is_whole = num_strips == kPanelStrips;
    for (int64_t i = 0; i < rows.num_blocks; ++i) {
        const int64_t begin = rows.begin(i), count = rows.begin(i + 1) - begin;
        alignas(64) float sums[kMostRows / P * 2 * kLanes] = {};
        const Block b = {static_cast<const char*>(p.weight) + first_strip * bytes,
                         kLanes == 16 ? bytes : kLanes * 4, rows.num_steps,
                         rows.is_lone() ? lone.words : words_of(p) + rows.offset(i, 0), sums};
        if (rows.is_lone() && rows.num_steps > kLoneSteps) {
            accumulate_long<P>(p, b, lone, is_whole);
        } else {
            accumulate_rows<P>(b, count, is_whole);
        }
        for (int64_t r = 0; r < count; ++r)
            for (int64_t s = 0; s < num_strips; ++s)
                finish_outputs(p, begin + r, (first_strip + s) * kStripOutputs,
                               sums + r * 2 * kLanes + s * kStripOutputs);
    }
}

}  // namespace

#if defined(SPECRT_BF16_PAIRS)

// Whether the CPU's products of pairs are chains of two fused multiplications, over numbers of all
// sizes, denormals and infinities among them.
bool has_chained_pairs() {
    const FlushDenormals guard;
    const auto upper = [](__m512i v) {
        const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        return Part{_mm512_castsi512_ps(_mm512_and_si512(v, mask))};
    };
    const auto lower = [](__m512i v) {
        return Part{_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))};
    };
    __m512i bits = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    const auto next = [&] {
        bits = _mm512_add_epi32(_mm512_mullo_epi32(bits, _mm512_set1_epi32(1664525)),
                                _mm512_set1_epi32(1013904223));
        return _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 15));
    };
    for (int i = 0; i < 1024; ++i) {
        const __m512i x = next(), w = next();
        // Every other sum cancels the first product but for its rounding.
        const Part sum =
            i % 2 ? Part{_mm512_castsi512_ps(next())} : sub(zero(), mul(upper(x), upper(w)));
        const Part found =
            Arithmetic::multiply({_mm512_castsi512_ps(x)}, {_mm512_castsi512_ps(w)}, sum);
        const Part wanted = fma(lower(x), lower(w), fma(upper(x), upper(w), sum));
        const __mmask16 equal =
            _mm512_cmpeq_epi32_mask(_mm512_castps_si512(found.v), _mm512_castps_si512(wanted.v));
        const __mmask16 both_nan = _mm512_cmp_ps_mask(found.v, found.v, _CMP_UNORD_Q) &
                                   _mm512_cmp_ps_mask(wanted.v, wanted.v, _CMP_UNORD_Q);
        if ((equal | both_nan) != 0xffff) return false;
    }
    return true;
}

#endif

void matmul_tiles_split(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (p.num_rows == 0 || !is_any_open(p.openness)) return;
    const FlushDenormals guard;
    const Rows rows(p);
    const int64_t total = p.num_rows * rows.num_steps;
    for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i) {
        const int64_t row = i / rows.num_steps, step = i % rows.num_steps;
        const int64_t block = rows.block_of(row);
        float* words = words_of(p) + rows.offset(block, step);
        place_step(p, row, step, words + (row - rows.begin(block)) * rows.num_parts * kWords);
    }
}

void matmul_tiles_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const MatmulParams*>(params);
    if (p.num_rows == 0 || !is_any_open(p.openness)) return;
    const FlushDenormals guard;
    const Rows rows(p);
    LoneWords lone;
    if (rows.is_lone() && rows.num_steps <= kLoneSteps) lone.place(p, 0, rows.num_steps);
    const int64_t strips = divide_up(p.num_outputs, kStripOutputs);
    const int64_t panels = divide_up(strips, kPanelStrips);
    for (int64_t i = panels * part / num_parts; i < panels * (part + 1) / num_parts; ++i) {
        const int64_t first = i * kPanelStrips, left = strips - first;
        const int64_t count = left < kPanelStrips ? left : kPanelStrips;
        rows.num_parts == 2 ? panel<2>(p, rows, lone, first, count)
                            : panel<1>(p, rows, lone, first, count);
    }
}

}  // namespace specrt::SPECRT_ISA
