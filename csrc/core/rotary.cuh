// The rotation of a pair of a head's elements, which every kernel that rotates must make alike.
#pragma once
#include "core/launch.cuh"

namespace specrt {

struct Rotated {
    float low, high;
};

// Products and sums are rounded one by one, as on the CPU.
__device__ __forceinline__ Rotated rotate(float low, float high, float cosine, float sine) {
    return {__fsub_rn(__fmul_rn(low, cosine), __fmul_rn(high, sine)),
            __fadd_rn(__fmul_rn(high, cosine), __fmul_rn(low, sine))};
}

}  // namespace specrt
