// Loops whose index is a constant, so that the arrays it goes over are registers.
#pragma once

#if !defined(SPECRT_ISA)
#error "core/each.h is for *_cpu.cpp files, which the build compiles once per instruction set"
#endif

namespace specrt::SPECRT_ISA {

template <int I>
struct Index {
    constexpr operator int() const { return I; }
};
// f(0), f(1), ... with constants, so that arrays so indexed are registers.
template <int N, int I = 0, typename F>
__attribute__((always_inline)) inline void each(F&& f) {
    if constexpr (I < N) {
        f(Index<I>{});
        each<N, I + 1>(f);
    }
}

}  // namespace specrt::SPECRT_ISA
