// Atomics, fences, and what addresses of whole packs must be. All fibers share one OS thread, so
// plain operations are atomic; before each the fiber may be switched out. Fences order nothing
// here: see README.md.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "scheduler.h"

namespace simt {

// For a load or a store of several values at once.
inline void require_aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
        fail("misaligned address, must be a multiple of " + std::to_string(bytes) + " bytes");
}

// One of the types in CUDA's table for an operation; the operand takes the pointer's type.
template <typename T>
struct Operand {
    using type = T;
};
template <typename T>
using operand_t = typename Operand<T>::type;

template <typename T, typename Change>
inline T change_atomically(T* p, const char* what, Change change) {
    preempt();
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
        fail(std::string(what) + ": misaligned address");
    volatile T* at = p;
    const T old = *at;
    *at = change(old);
    return old;
}

}  // namespace simt

#define SIMT_ATOMIC(name, Type, expression)                                                       \
    inline Type name(Type* p, Type value) {                                                       \
        return ::simt::change_atomically(p, #name, [&](Type old) -> Type { return expression; }); \
    }
#define SIMT_INTEGER_ATOMICS(Type)                                                            \
    SIMT_ATOMIC(atomicMin, Type, std::min(old, value))                                        \
    SIMT_ATOMIC(atomicMax, Type, std::max(old, value))                                        \
    SIMT_ATOMIC(atomicAnd, Type, old& value)                                                  \
    SIMT_ATOMIC(atomicOr, Type, old | value)                                                  \
    SIMT_ATOMIC(atomicXor, Type, old ^ value)                                                 \
    SIMT_ATOMIC(atomicExch, Type, ((void)old, value))                                         \
    inline Type atomicCAS(Type* p, Type expected, Type value) {                               \
        return ::simt::change_atomically(                                                     \
            p, "atomicCAS", [&](Type old) -> Type { return old == expected ? value : old; }); \
    }

SIMT_INTEGER_ATOMICS(int)
SIMT_INTEGER_ATOMICS(unsigned)
SIMT_INTEGER_ATOMICS(unsigned long long)
SIMT_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + value))
SIMT_ATOMIC(atomicAdd, unsigned, old + value)
SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
SIMT_ATOMIC(atomicAdd, float, old + value)
SIMT_ATOMIC(atomicAdd, double, old + value)
SIMT_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - value))
SIMT_ATOMIC(atomicSub, unsigned, old - value)
SIMT_ATOMIC(atomicMin, long long, std::min(old, value))
SIMT_ATOMIC(atomicMax, long long, std::max(old, value))
SIMT_ATOMIC(atomicExch, float, ((void)old, value))
SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef SIMT_INTEGER_ATOMICS
#undef SIMT_ATOMIC

inline void __threadfence() {
    ::simt::preempt();
}
inline void __threadfence_block() {
    ::simt::preempt();
}
inline void __threadfence_system() {
    ::simt::preempt();
}
inline void __nanosleep(unsigned) {
    ::simt::preempt();
}
