// Eight tile registers of 16 rows x 64 bytes, and products of them (x86's AMX).
//
// Instructions are written out: gcc 12 declares _tile_loadconfig to read 8 of its 64 bytes, and
// _tile_loadd to touch no memory, so stores to what they read may vanish. The compiler itself never
// uses these registers.
//
// Hazard: a thread may make a TileUnit only where cpu_has(Isa::kAmx) said yes, which asked the
// kernel for permission; without it the first instruction ends the process.
//
// With SPECRT_TILE_MODEL the registers are memory and the instructions functions of the tests'
// model: the same kernels then run on any machine.
#pragma once
#include <cstdint>

#if !defined(SPECRT_ISA)
#error "core/tile_unit.h is for sources that are compiled for one instruction set"
#endif
#if defined(SPECRT_TILE_MODEL)
#include "tile_model.h"
#endif

namespace specrt::SPECRT_ISA {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64;

#if defined(SPECRT_TILE_MODEL)

using TileUnit = tile_model::TileUnit;

#else

// Configured while it lives. T, C, A, B are numbers of registers, 0 to 7.
//
// A is 16 rows of values, B holds its values as rows of 4-byte lanes: row p of B has, for each of
// 16 outputs, the values that meet lane p of a row of A. C is 16 x 16 numbers of 4 bytes.
class TileUnit {
  public:
    TileUnit() {
        Config config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileUnit() { asm volatile("tilerelease"); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;

    template <int T>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    // Rows that lie `stride` bytes apart.
    template <int T>
    void load(const void* rows, int64_t stride = kTileRowBytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void store(void* rows, int64_t stride = kTileRowBytes) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(T) : "memory");
    }

    // C += A B of bfloat16, float32: for each element a chain of fused multiplications over the
    // even values from +0 and one over the odd, both summed, then added to C. Rounded to nearest,
    // denormals taken and given as zeros, whatever the thread's modes.
    template <int C, int A, int B>
    void multiply_bf16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    // C += A B of signed bytes by unsigned ones: exact integers of 32 bits, which wrap.
    template <int C, int A, int B>
    void multiply_s8_u8() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }

  private:
    struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
};

#endif

}  // namespace specrt::SPECRT_ISA
