// Single rows of matrices in blocks: written from what files hold, and read as float32, to the bit
// as a file's own dequantisation would.
#pragma once
#include "core/block_scales.h"
#include "core/matrix.h"

namespace specrt::SPECRT_ISA {

// Output `lane` of a group: its 32 quants.
template <int kBits>
inline void write_group(const uint8_t (&w)[32], uint8_t* group, int lane) {
    uint8_t* at = group + 4 * lane;
    if constexpr (kBits == 8) {
        for (int i = 0; i < 8; ++i) std::memcpy(at + i * kPlaneBytes, w + 4 * i, 4);
        return;
    }
    uint8_t planes[24];
    for (int i = 0; i < 16; ++i) planes[i] = static_cast<uint8_t>((w[i] & 15) | w[16 + i] << 4);
    for (int i = 0; i < 8; ++i)
        planes[16 + i] = static_cast<uint8_t>(w[i] >> 4 | w[8 + i] >> 4 << 2 | w[16 + i] >> 4 << 4 |
                                              w[24 + i] >> 4 << 6);
    for (int i = 0; i < kBits; ++i) std::memcpy(at + i * kPlaneBytes, planes + 4 * i, 4);
}

template <int kBits>
inline void read_group(const uint8_t* group, int lane, uint8_t (&w)[32]) {
    const uint8_t* at = group + 4 * lane;
    for (int i = 0; i < 32; ++i) {
        if constexpr (kBits == 8) {
            w[i] = at[i / 4 * kPlaneBytes + i % 4];
        } else {
            const uint8_t nibbles = at[i % 16 / 4 * kPlaneBytes + i % 4];
            w[i] = i < 16 ? nibbles & 15 : nibbles >> 4;
        }
        if constexpr (kBits == 6) {
            const uint8_t upper = at[(4 + i / 4 % 2) * kPlaneBytes + i % 4];
            w[i] = static_cast<uint8_t>(w[i] | (upper >> i / 8 * 2 & 3) << 4);
        }
    }
}

// A float16 of a record's; whether it is finite.
inline bool write_half(const uint8_t* from, uint8_t* halves, int lane) {
    std::memcpy(halves + 2 * lane, from, 2);
    return (from[1] & 0x7c) != 0x7c;
}

// A file's block into group `g` and the following of a record; whether its scales are finite.
template <MatrixFormat F>
inline bool write_block(const uint8_t* block, uint8_t* record, int g, int lane) {
    constexpr BlockFormat f = block_format(F);
    const bool has_min = F == MatrixFormat::kQ4_1;
    const uint8_t* quants = block + (has_min ? 4 : 2);
    uint8_t w[32];
    for (int i = 0; i < 32; ++i) {
        if constexpr (f.quant_bits == 8) {
            w[i] = quants[i] ^ 0x80;
        } else {
            w[i] = i < 16 ? quants[i] & 15 : quants[i - 16] >> 4;
        }
    }
    write_group<f.quant_bits>(w, record + f.scale_bytes + g * f.group_bytes(), lane);
    const bool is_finite = write_half(block, record + 32 * g, lane);
    return has_min ? write_half(block + 2, record + 32, lane) && is_finite : is_finite;
}

template <>
inline bool write_block<MatrixFormat::kQ4_K>(const uint8_t* block, uint8_t* record, int, int lane) {
    constexpr BlockFormat f = kQ4_KBlocks;
    const uint8_t *packed = block + 4, *quants = block + 16;
    for (int g = 0; g < 8; ++g) {
        // Six bits each: of the first four in bytes of their own, which lend their upper two bits
        // to the last four.
        const uint8_t *low = packed + g % 4, *both = packed + 8 + g % 4;
        const int scale = g < 4 ? low[0] & 63 : (*both & 15) | (low[0] >> 6) << 4;
        const int min = g < 4 ? low[4] & 63 : *both >> 4 | (low[4] >> 6) << 4;
        record[64 + 16 * g + lane] = static_cast<uint8_t>(scale);
        record[192 + 16 * g + lane] = static_cast<uint8_t>(min);
        uint8_t w[32];
        for (int i = 0; i < 32; ++i) w[i] = quants[g / 2 * 32 + i] >> g % 2 * 4 & 15;
        write_group<4>(w, record + f.scale_bytes + g * f.group_bytes(), lane);
    }
    const bool is_finite = write_half(block, record, lane);
    return write_half(block + 2, record + 32, lane) && is_finite;
}

template <>
inline bool write_block<MatrixFormat::kQ6_K>(const uint8_t* block, uint8_t* record, int, int lane) {
    constexpr BlockFormat f = kQ6_KBlocks;
    for (int g = 0; g < 8; ++g) {
        const uint8_t* lower = block + g / 4 * 64 + g % 2 * 32;
        const uint8_t* upper = block + 128 + g / 4 * 32;
        uint8_t w[32];
        for (int i = 0; i < 32; ++i)
            w[i] = static_cast<uint8_t>((lower[i] >> g % 4 / 2 * 4 & 15) |
                                        (upper[i] >> g % 4 * 2 & 3) << 4);
        write_group<6>(w, record + f.scale_bytes + g * f.group_bytes(), lane);
    }
    for (int i = 0; i < 16; ++i) record[32 + 16 * i + lane] = block[192 + i];
    return write_half(block + 208, record, lane);
}

// A row as a file has it; whether its scales are finite.
template <MatrixFormat F>
inline bool write_row(const uint8_t* source, int64_t depth, uint8_t* strip, int lane) {
    constexpr BlockFormat f = block_format(F);
    constexpr int kGroups = f.block_depth / static_cast<int>(kGroupDepth);
    constexpr uint8_t kNoScale[2] = {};
    const int64_t num_groups = divide_up(depth, f.record_depth()) * f.num_groups;
    bool is_finite = true;
    for (int64_t group = 0; group < num_groups; group += kGroups, source += f.block_bytes) {
        uint8_t* record = strip + group / f.num_groups * f.record_bytes();
        const int g = static_cast<int>(group % f.num_groups);
        if (group * kGroupDepth < depth) {
            is_finite &= write_block<F>(source, record, g, lane);
        } else {
            write_half(kNoScale, record + 32 * g, lane);
        }
    }
    return is_finite;
}

// A row of floats as int8: of the largest's 127 equal steps to either side the nearest, ties to
// even. Whether all are finite.
template <typename T>
inline bool write_row_int8(const T* source, int64_t depth, uint8_t* strip, int lane) {
    uint32_t largest_bits = 0;
    for (int64_t k = 0; k < depth; ++k) {
        const uint32_t magnitude = to_bits(to_float(source[k])) & 0x7fffffffu;
        largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    const float largest = from_bits(largest_bits), scale = largest / 127.0f;
    std::memcpy(strip + 4 * lane, &scale, 4);
    const double steps = largest > 0.0f ? 127.0 / static_cast<double>(largest) : 0.0;
    uint8_t* group = strip + kInt8Blocks.head_bytes;
    for (int64_t k = 0; k < depth; k += kGroupDepth, group += kInt8Blocks.group_bytes()) {
        T last[32] = {};
        const bool is_last = depth - k < kGroupDepth;
        for (int64_t i = 0; is_last && i < depth - k; ++i) last[i] = source[k + i];
        const T* values = is_last ? last : source + k;
        uint8_t w[32];
        for (int i = 0; i < 32; ++i) {
            // Adding 1.5 * 2^52 leaves no room for a fraction.
            const double value = to_float(values[i]);
            const double rounded = value * steps + 0x1.8p52;
            uint64_t bits;
            std::memcpy(&bits, &rounded, 8);
            w[i] = static_cast<uint8_t>(bits ^ 0x80);
        }
        write_group<8>(w, group, lane);
    }
    return largest_bits < 0x7f800000u;
}

// Group `g` of a record as floats.
template <MatrixFormat F>
inline void read_floats(const uint8_t* strip, const uint8_t* record, int g, int lane,
                        float (&out)[32]) {
    using S = Scales<F>;
    constexpr BlockFormat f = block_format(F);
    uint8_t w[32];
    read_group<f.quant_bits>(record + f.scale_bytes + g * f.group_bytes(), lane, w);
    float scale[S::kPerGroup][16], offset[16];
    for (int h = 0; h < S::kPerGroup; ++h) {
        if constexpr (F == MatrixFormat::kInt8) {
            std::memcpy(scale[h], strip, 64);
        } else {
            store(S::scale(record, g * S::kPerGroup + h), scale[h]);
        }
    }
    if constexpr (S::kHasMins) store(S::offset(record, g), offset);
    for (int i = 0; i < 32; ++i) {
        const float quant = static_cast<float>(w[i] - f.zero_point);
        out[i] = quant * scale[i * S::kPerGroup / 32][lane];
        if constexpr (S::kHasMins) out[i] += offset[lane];
    }
}

template <MatrixFormat F>
inline void read_row(const uint8_t* strip, int64_t depth, int lane, float* out) {
    constexpr BlockFormat f = block_format(F);
    for (int64_t group = 0; group * kGroupDepth < depth; ++group) {
        float floats[32];
        const uint8_t* record = strip + f.head_bytes + group / f.num_groups * f.record_bytes();
        read_floats<F>(strip, record, static_cast<int>(group % f.num_groups), lane, floats);
        const int64_t left = depth - group * kGroupDepth;
        const int64_t count = left < kGroupDepth ? left : kGroupDepth;
        std::memcpy(out + group * kGroupDepth, floats, static_cast<size_t>(count) * 4);
    }
}

}  // namespace specrt::SPECRT_ISA
