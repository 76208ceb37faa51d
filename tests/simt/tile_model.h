// core/tile_unit.h's registers in memory. A register that was not loaded or zeroed holds NaN (as
// integers: large numbers), and what lies there after a unit has gone is not another's.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tile_model {

// a b + c rounded to nearest once; where that is tiny, zero. For a and b of bfloat16.
inline float fused(float a, float b, float c) {
    const float sum = std::fmaf(a, b, c);
    if (!(std::fabs(sum) <= 0x1p-126f)) return sum;
    // Tiny is told after rounding to 24 bits. Near the bound a double holds the sum exactly.
    const double exact = static_cast<double>(a) * b + c;
    return std::fabs(exact) < 0x1p-126 - 0x1p-151 ? std::copysign(0.0f, sum) : sum;
}

inline float flushed(float x) {
    return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

class TileUnit {
  public:
    TileUnit() { std::memset(registers_, 0x7f, sizeof registers_); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;

    template <int T>
    void zero() {
        std::memset(at<T>(), 0, kBytes);
    }
    template <int T>
    void load(const void* rows, int64_t stride = 64) {
        for (int i = 0; i < 16; ++i)
            std::memcpy(at<T>() + i * 64, static_cast<const char*>(rows) + i * stride, 64);
    }
    template <int T>
    void store(void* rows, int64_t stride = 64) const {
        for (int i = 0; i < 16; ++i)
            std::memcpy(static_cast<char*>(rows) + i * stride, at<T>() + i * 64, 64);
    }

    template <int C, int A, int B>
    void multiply_bf16() {
        static_assert(C != A && C != B && A != B, "an instruction that faults");
        for (int row = 0; row < 16; ++row) {
            for (int n = 0; n < 16; ++n) {
                float chain[2] = {};
                for (int p = 0; p < 16; ++p)
                    for (int i = 0; i < 2; ++i)
                        chain[i] = fused(bf16_of<A>(row * 32 + 2 * p + i),
                                         bf16_of<B>(p * 32 + 2 * n + i), chain[i]);
                float c;
                std::memcpy(&c, at<C>() + row * 64 + n * 4, 4);
                c = flushed(flushed(c) + flushed(chain[0] + chain[1]));
                std::memcpy(at<C>() + row * 64 + n * 4, &c, 4);
            }
        }
    }

    template <int C, int A, int B>
    void multiply_s8_u8() {
        static_assert(C != A && C != B && A != B, "an instruction that faults");
        for (int row = 0; row < 16; ++row) {
            for (int n = 0; n < 16; ++n) {
                uint32_t c;
                std::memcpy(&c, at<C>() + row * 64 + n * 4, 4);
                for (int k = 0; k < 64; ++k) {
                    const int a = static_cast<int8_t>(at<A>()[row * 64 + k]);
                    const int b = static_cast<uint8_t>(at<B>()[k / 4 * 64 + n * 4 + k % 4]);
                    c += static_cast<uint32_t>(a * b);
                }
                std::memcpy(at<C>() + row * 64 + n * 4, &c, 4);
            }
        }
    }

  private:
    static constexpr int kBytes = 1024;

    template <int T>
    char* at() {
        static_assert(T >= 0 && T < 8);
        return registers_[T];
    }
    template <int T>
    const char* at() const {
        static_assert(T >= 0 && T < 8);
        return registers_[T];
    }
    template <int T>
    float bf16_of(int i) const {
        uint16_t half;
        std::memcpy(&half, at<T>() + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return flushed(value);
    }

    alignas(64) char registers_[8][kBytes];
};

}  // namespace tile_model
