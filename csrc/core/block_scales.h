// Scales of a record (core/block_format.h) as factors of sums over its groups: for float32 sums the
// very products that a file's dequantisation multiplies by.
#pragma once
#include "core/block_lanes.h"
#include "core/matrix.h"

namespace specrt::SPECRT_ISA {

inline V16 load_half(const uint8_t* p) {
    return load(reinterpret_cast<const f16*>(p));
}

// Calls f with a value that names the format by its type.
template <MatrixFormat F>
struct Named {
    static constexpr MatrixFormat kFormat = F;
};
template <typename F>
inline void with_blocks(MatrixFormat format, F&& f) {
    switch (format) {
        case MatrixFormat::kQ8_0:
            return f(Named<MatrixFormat::kQ8_0>{});
        case MatrixFormat::kQ4_0:
            return f(Named<MatrixFormat::kQ4_0>{});
        case MatrixFormat::kQ4_1:
            return f(Named<MatrixFormat::kQ4_1>{});
        case MatrixFormat::kQ4_K:
            return f(Named<MatrixFormat::kQ4_K>{});
        case MatrixFormat::kQ6_K:
            return f(Named<MatrixFormat::kQ6_K>{});
        default:
            return f(Named<MatrixFormat::kInt8>{});
    }
}

// kPerGroup scales a group; where kHasMins, what is added of a group for each unit of x besides.
template <MatrixFormat>
struct Scales;

template <>
struct Scales<MatrixFormat::kInt8> {
    static constexpr int kPerGroup = 1;
    static constexpr bool kHasMins = false;
};

template <>
struct Scales<MatrixFormat::kQ8_0> {
    static constexpr int kPerGroup = 1;
    static constexpr bool kHasMins = false;
    static V16 scale(const uint8_t* record, int i) { return load_half(record + 32 * i); }
};

template <>
struct Scales<MatrixFormat::kQ4_0> : Scales<MatrixFormat::kQ8_0> {};

template <>
struct Scales<MatrixFormat::kQ4_1> {
    static constexpr int kPerGroup = 1;
    static constexpr bool kHasMins = true;
    static V16 scale(const uint8_t* record, int) { return load_half(record); }
    static V16 offset(const uint8_t* record, int) { return load_half(record + 32); }
};

template <>
struct Scales<MatrixFormat::kQ4_K> {
    static constexpr int kPerGroup = 1;
    static constexpr bool kHasMins = true;
    static V16 scale(const uint8_t* record, int i) {
        return mul(load_half(record), load_bytes(record + 64 + 16 * i));
    }
    static V16 offset(const uint8_t* record, int i) {
        return sub(splat(-0.0f), mul(load_half(record + 32), load_bytes(record + 192 + 16 * i)));
    }
};

template <>
struct Scales<MatrixFormat::kQ6_K> {
    static constexpr int kPerGroup = 2;
    static constexpr bool kHasMins = false;
    static V16 scale(const uint8_t* record, int i) {
        const auto* factors = reinterpret_cast<const int8_t*>(record + 32 + 16 * i);
        return mul(load_half(record), load_bytes(factors));
    }
};

}  // namespace specrt::SPECRT_ISA
