// Values of any of the three types as floats, and back.
#pragma once
#include <type_traits>

#include "core/launch.cuh"

namespace specrt {

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(bf16_t x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(f16_t x) {
    return __half2float(x);
}

// Round to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else if constexpr (std::is_same_v<T, bf16_t>) {
        return __float2bfloat16(x);
    } else {
        return __float2half(x);
    }
}

// Calls f with a value of the type that `dtype` names, for its type alone.
template <typename F>
void with_float_type(DType dtype, F&& f) {
    if (dtype == DType::kBFloat16) return f(bf16_t{});
    if (dtype == DType::kFloat16) return f(f16_t{});
    f(0.0f);
}

}  // namespace specrt
