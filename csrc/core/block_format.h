// Matrices of quantised weights: groups of k with a scale each, of a GGUF file's formats, and int8
// with one scale an output.
//
// A strip of sixteen outputs (core/matrix.h) is records one after another, each of the scales of
// some groups, then their quants, group by group. A group here is 32 k; its quants are planes of
// 64 bytes, of which dword n belongs to output n:
//
//     8 bits: plane i                    = k 4i .. 4i+3
//     4 bits: plane i < 4, low nibbles   = k 4i .. 4i+3,  high nibbles = k 16+4i .. 16+4i+3
//     6 bits: four planes as of 4 bits, then two of the upper two bits:
//             plane v, bits 2f and 2f+1  = k 4j .. 4j+3, j = 2f + v
//
// So a plane of bytes is sixteen times the four neighbours that dot-product instructions take.
// Quants are unsigned: what stands for zero is `zero_point`.
#pragma once
#include <cstdint>

namespace specrt {

constexpr int64_t kGroupDepth = 32, kPlaneBytes = 64;

struct BlockFormat {
    int32_t block_depth, block_bytes;  // of a file's block; 0 bytes: no file has it
    int32_t num_groups, scale_bytes;   // of a record
    int32_t quant_bits, zero_point;
    int32_t head_bytes;  // of a strip, in front of its records

    constexpr int64_t record_depth() const { return num_groups * kGroupDepth; }
    constexpr int64_t group_bytes() const { return 8 * kPlaneBytes * quant_bits / 8; }
    constexpr int64_t record_bytes() const { return scale_bytes + num_groups * group_bytes(); }
    constexpr int64_t strip_bytes(int64_t depth) const {
        return head_bytes + (depth + record_depth() - 1) / record_depth() * record_bytes();
    }
};

// Scales of a record, each for sixteen outputs:
//     int8   none; the strip begins with 16 float32
//     Q8_0   d (float16) of two groups                    Q4_0  as Q8_0
//     Q4_1   d, m (float16)
//     Q4_K   d, dmin (float16), 8 scales and 8 mins (a byte each)
//     Q6_K   d (float16), 16 scales (int8, of 16 k each), 32 bytes of nothing
constexpr BlockFormat kInt8Blocks = {1, 0, 1, 0, 8, 128, 64};
constexpr BlockFormat kQ8_0Blocks = {32, 34, 2, 64, 8, 128, 0};
constexpr BlockFormat kQ4_0Blocks = {32, 18, 2, 64, 4, 8, 0};
constexpr BlockFormat kQ4_1Blocks = {32, 20, 1, 64, 4, 0, 0};
constexpr BlockFormat kQ4_KBlocks = {256, 144, 8, 320, 4, 0, 0};
constexpr BlockFormat kQ6_KBlocks = {256, 210, 8, 320, 6, 32, 0};

static_assert(kQ8_0Blocks.record_bytes() % 64 == 0 && kQ4_0Blocks.record_bytes() % 64 == 0 &&
              kQ4_1Blocks.record_bytes() % 64 == 0 && kQ4_KBlocks.record_bytes() % 64 == 0 &&
              kQ6_KBlocks.record_bytes() % 64 == 0);

}  // namespace specrt
