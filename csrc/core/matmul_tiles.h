// What products by packed bfloat16 share, whatever multiplies: float32 arithmetic that takes and
// gives denormals as zeros (as matrix units do), how a row of x is split, what follows the sums.
#pragma once
#include "core/each.h"
#include "core/matmul.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

#if defined(__AVX2__)

// While it lives the thread's instructions take and give denormals as zeros.
class FlushDenormals {
  public:
    FlushDenormals() {
        asm volatile("stmxcsr %0" : "=m"(before_)::"memory");
        set(before_ | kFlushToZero | kDenormalsAreZero);
    }
    ~FlushDenormals() { set(before_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

  private:
    static constexpr uint32_t kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
    static void set(uint32_t modes) { asm volatile("ldmxcsr %0" ::"m"(modes) : "memory"); }
    uint32_t before_;
};

inline V16 flushed(V16 a) {
    return a;
}

#else

class FlushDenormals {
  public:
    FlushDenormals() {}  // nothing to set: flushed() does it
};

inline float flushed(float x) {
    return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}
inline V16 flushed(V16 a) {
    return lanes([&](int i) { return flushed(a.v[i]); });
}

// A tiny sum of two floats is exact, so that flushing after rounding is all there is to do.
inline float flushed_fma(float a, float b, float c) {
    const float sum = __builtin_fmaf(a, b, c);
    if (!(__builtin_fabsf(sum) <= 0x1p-126f)) return sum;
    // What rounds up to the least normal number may be tiny at 24 bits, which is what decides. Of a
    // and b of bfloat16 a double holds such a sum exactly.
    const double exact = static_cast<double>(a) * b + c;
    return __builtin_fabs(exact) < 0x1p-126 - 0x1p-151 ? __builtin_copysignf(0.0f, sum) : sum;
}

#endif

inline V16 flushed_add(V16 a, V16 b) {
    return flushed(add(flushed(a), flushed(b)));
}

inline int num_parts_of(MatrixFormat format) {
    return format == MatrixFormat::kBf16Split ? 2 : 1;
}

// 32 values of a row, of which `count` are there: what rounds them to bfloat16, then what rounds
// the rest. Under FlushDenormals, so neither holds a denormal.
inline void split_step(const float* x, int64_t count, bf16 (&high)[kTileDepth],
                       bf16 (&low)[kTileDepth]) {
    for (int i = 0; i < kTileDepth; i += 16) {
        const int64_t left = count - i;
        const V16 all = left >= 16  ? load(x + i)
                        : left <= 0 ? zero()
                                    : load_first(x + i, static_cast<int>(left));
        const V16 value = flushed_add(all, zero());  // rounding bits alone would keep a denormal
        store(value, high + i);
        store(flushed(sub(value, load(high + i))), low + i);
    }
}

// Sums of sixteen outputs of a row, of which `count` are there, to results.
inline void finish_outputs(const MatmulParams& p, int64_t row, int64_t first, const float* sums) {
    const int64_t left = p.num_outputs - first;
    const int count = left < kStripOutputs ? static_cast<int>(left) : kStripOutputs;
    const auto some = [&](const float* from) {
        return count == kStripOutputs ? load(from) : load_first(from, count);
    };
    V16 y = load(sums);
    if (p.bias) y = flushed_add(y, some(p.bias + first));
    if (p.residual) y = flushed_add(y, some(p.residual + row * p.residual_stride + first));
    float* out = p.out + row * p.out_stride + first;
    if (count == kStripOutputs) {
        store(y, out);
    } else {
        store_first(y, out, count);
    }
}

}  // namespace specrt::SPECRT_ISA
