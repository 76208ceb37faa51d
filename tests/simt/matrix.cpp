#include "matrix.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "fused_sum.h"
#include "scheduler.h"

namespace simt {
namespace {

constexpr uint32_t kFullWarp = 0xffffffffu;

void require_full_warp(const char* what) {
    if (running.thread->warp->alive != kFullWarp)
        fail(std::string(what) + ": needs all 32 lanes of the warp");
}

struct Loaded {
    const void* row;
    unsigned count;
    bool is_transposed;
};

void check_row(const Warp& warp, unsigned lane) {
    const Thread& thread = warp.threads[lane];
    const void* row = warp.in<Loaded>(lane).row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        scheduler->fail(thread, "ldmatrix: misaligned row, must be a multiple of 16 bytes");
    if (!thread.block->shared->contains(row, 16))
        scheduler->fail(
            thread, "ldmatrix: out-of-bounds read, the row is not in the block's shared memory");
}

// Lane l gets elements 2 (l % 4) and the next of row l / 4 or, transposed, of column l / 4.
void combine_load(Warp& warp, uint32_t) {
    const auto [ignored, count, is_transposed] = warp.in<Loaded>(0);
    for (unsigned matrix = 0; matrix < count; ++matrix) {
        uint16_t rows[8][8];
        for (unsigned i = 0; i < 8; ++i) {
            check_row(warp, 8 * matrix + i);
            std::memcpy(rows[i], warp.in<Loaded>(8 * matrix + i).row, 16);
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
            const unsigned i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = is_transposed ? rows[j][i] : rows[i][j];
            const uint32_t high = is_transposed ? rows[j + 1][i] : rows[i][j + 1];
            (&warp.out<uint32_t>(lane))[matrix] = low | high << 16;
        }
    }
}

struct Fragments {
    const uint32_t *a, *b;
};

template <typename T>
float element(uint32_t pair, unsigned i) {
    return widen(T{static_cast<uint16_t>(pair >> 16 * i)});
}

struct Operands {
    float a[16][16], b[16][8];
};

template <typename T>
Operands gather(const Warp& warp) {
    Operands all;
    for (unsigned lane = 0; lane < 32; ++lane) {
        const Fragments& in = warp.in<Fragments>(lane);
        const unsigned group = lane / 4, pair = lane % 4 * 2;
        for (unsigned i = 0; i < 2; ++i) {
            for (unsigned r = 0; r < 4; ++r)
                all.a[group + r % 2 * 8][pair + r / 2 * 8 + i] = element<T>(in.a[r], i);
            for (unsigned r = 0; r < 2; ++r)
                all.b[pair + r * 8 + i][group] = element<T>(in.b[r], i);
        }
    }
    return all;
}

float& element_of_c(Warp& warp, unsigned row, unsigned column) {
    return (&warp.out<float>(row % 8 * 4 + column / 2))[row / 8 * 2 + column % 2];
}

void add_in_index_order(Warp& warp, const Operands& in) {
    for (unsigned row = 0; row < 16; ++row) {
        float sum[8] = {};
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned column = 0; column < 8; ++column)
                sum[column] += in.a[row][k] * in.b[k][column];
        for (unsigned column = 0; column < 8; ++column)
            if (sum[column] != 0) element_of_c(warp, row, column) += sum[column];
    }
}

// Sums of `depth` terms, one after another.
void add_fused(Warp& warp, const Operands& in, int depth, int bits, int min_exponent) {
    Unpacked a[16][16], b[8][16];  // b transposed: a sum's terms lie side by side
    for (unsigned k = 0; k < 16; ++k) {
        for (unsigned row = 0; row < 16; ++row) a[row][k] = unpack(in.a[row][k], min_exponent);
        for (unsigned column = 0; column < 8; ++column)
            b[column][k] = unpack(in.b[k][column], min_exponent);
    }
    for (unsigned row = 0; row < 16; ++row)
        for (unsigned column = 0; column < 8; ++column) {
            float& c = element_of_c(warp, row, column);
            for (int k = 0; k < 16; k += depth)
                c = fused_sum(a[row] + k, b[column] + k, depth, c, bits);
        }
}

template <typename T>
void combine_mma(Warp& warp, uint32_t) {
    constexpr int kMin = std::is_same_v<T, half> ? kMinExponentHalf : kMinExponent;
    const Operands in = gather<T>(warp);
    switch (scheduler->arithmetic()) {
        case Arithmetic::kIeee:
            return add_in_index_order(warp, in);
        case Arithmetic::kSm80:
            return add_fused(warp, in, 8, 24, kMin);
        case Arithmetic::kSm90:
            return add_fused(warp, in, 16, 25, kMin);
    }
}

template <typename T>
void multiply(const char* what, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    require_full_warp(what);
    const Fragments in{a, b};
    scheduler->meet(what, kFullWarp, combine_mma<T>, &in, c);
}

}  // namespace

void load_matrices(uint32_t* r, unsigned count, const void* row, bool is_transposed) {
    require_full_warp("ldmatrix");
    const char* what = is_transposed ? "ldmatrix.trans" : "ldmatrix";
    const Loaded in{row, count, is_transposed};
    scheduler->meet(what, kFullWarp, combine_load, &in, r);
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
    multiply<bfloat16>("mma.m16n8k16 of bfloat16", c, a, b);
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
    multiply<half>("mma.m16n8k16 of half", c, a, b);
}

}  // namespace simt
