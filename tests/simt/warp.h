// Operations of a warp: shuffles, votes, reductions.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "float16.h"
#include "scheduler.h"

namespace simt {

template <typename T>
struct Shuffled {
    T value;
    unsigned source;  // the lane to read from
};

// Throws unless `source`, which `lane` reads from, is one of the lanes that met.
void check_source(const Warp& warp, uint32_t lanes, unsigned lane, unsigned source);

template <typename T>
void combine_shuffle(Warp& warp, uint32_t lanes) {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        const auto lane = static_cast<unsigned>(__builtin_ctz(rest));
        const unsigned source = warp.in<Shuffled<T>>(lane).source;
        if (!(lanes >> source & 1)) check_source(warp, lanes, lane, source);
        warp.out<T>(lane) = warp.in<Shuffled<T>>(source).value;
    }
}

void check_width(const char* what, int width);

template <typename T>
T shuffle(const char* what, uint32_t mask, T value, unsigned source, int width) {
    static_assert(
        sizeof(T) == 4 || sizeof(T) == 8 || std::is_same_v<T, half> || std::is_same_v<T, bfloat16>,
        "CUDA shuffles types of 4 and 8 bytes, and the 16-bit floats");
    check_width(what, width);
    const Shuffled<T> in{value, source};
    T out;
    scheduler->meet(what, mask, combine_shuffle<T>, &in, &out);
    return out;
}

inline unsigned lane_id() {
    return running.thread->lane;
}

uint32_t ballot(const char* what, uint32_t mask, bool vote);

template <typename T, typename Op>
void combine_reduce(Warp& warp, uint32_t lanes) {
    T total = warp.in<T>(static_cast<unsigned>(__builtin_ctz(lanes)));
    for (uint32_t rest = lanes & (lanes - 1); rest; rest &= rest - 1)
        total = Op()(total, warp.in<T>(static_cast<unsigned>(__builtin_ctz(rest))));
    for (uint32_t rest = lanes; rest; rest &= rest - 1)
        warp.out<T>(static_cast<unsigned>(__builtin_ctz(rest))) = total;
}

template <typename T, typename Op>
T reduce(const char* what, uint32_t mask, T value, Op) {
    T out{};
    scheduler->meet(what, mask, combine_reduce<T, Op>, &value, &out);
    return out;
}

}  // namespace simt

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const auto last = static_cast<unsigned>(width) - 1, lane = ::simt::lane_id();
    const unsigned from = (lane & ~last) | (static_cast<unsigned>(source) & last);
    return ::simt::shuffle("__shfl_sync", mask, value, from, width);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    const auto last = static_cast<unsigned>(width) - 1, lane = ::simt::lane_id();
    const unsigned from = lane ^ static_cast<unsigned>(lane_mask);
    // Earlier segments may be read, later ones not.
    const unsigned source = from > (lane | last) || from > 31 ? lane : from;
    return ::simt::shuffle("__shfl_xor_sync", mask, value, source, width);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const auto last = static_cast<unsigned>(width) - 1, lane = ::simt::lane_id();
    const unsigned source = (lane & last) >= delta ? lane - delta : lane;
    return ::simt::shuffle("__shfl_up_sync", mask, value, source, width);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const auto last = static_cast<unsigned>(width) - 1, lane = ::simt::lane_id();
    const unsigned source = delta <= last && (lane & last) + delta <= last ? lane + delta : lane;
    return ::simt::shuffle("__shfl_down_sync", mask, value, source, width);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
    return ::simt::ballot("__ballot_sync", mask, vote != 0);
}
inline int __any_sync(unsigned mask, int vote) {
    return ::simt::ballot("__any_sync", mask, vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote) {
    return ::simt::ballot("__all_sync", mask, vote == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    ::simt::ballot("__syncwarp", mask, false);
}

#define SIMT_REDUCE(name, Type, expression)                                                 \
    inline Type name(unsigned mask, Type value) {                                           \
        struct Op {                                                                         \
            Type operator()(Type a, Type b) const { return static_cast<Type>(expression); } \
        };                                                                                  \
        return ::simt::reduce(#name, mask, value, Op());                                    \
    }
SIMT_REDUCE(__reduce_add_sync, int, static_cast<unsigned>(a) + static_cast<unsigned>(b))
SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
SIMT_REDUCE(__reduce_min_sync, int, std::min(a, b))
SIMT_REDUCE(__reduce_min_sync, unsigned, std::min(a, b))
SIMT_REDUCE(__reduce_max_sync, int, std::max(a, b))
SIMT_REDUCE(__reduce_max_sync, unsigned, std::max(a, b))
SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SIMT_REDUCE
