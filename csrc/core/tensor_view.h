// A borrowed tensor: pointer, type, shape and strides (in elements). Owns nothing.
#pragma once
#include <cstdint>
#include <string>

#include "core/check.h"

namespace specrt {

enum class DType : uint8_t {
    kFloat32,
    kBFloat16,
    kFloat16,
    kInt32,
    kInt64,
    kFloat64,
    kE4M3,
    kUInt8
};

inline const char* name_of(DType dtype) {
    constexpr const char* kNames[] = {"float32", "bfloat16", "float16",       "int32",
                                      "int64",   "float64",  "float8_e4m3fn", "uint8"};
    return kNames[static_cast<int>(dtype)];
}

inline int64_t size_of(DType dtype) {
    constexpr int64_t kSizes[] = {4, 2, 2, 4, 8, 8, 1, 1};
    return kSizes[static_cast<int>(dtype)];
}

constexpr int kCpu = -1;  // a device: the CPU, or the index of a CUDA GPU

inline std::string name_of_device(int device) {
    return device == kCpu ? "cpu" : "cuda:" + std::to_string(device);
}

struct TensorView {
    static constexpr int kMaxDim = 6;
    void* data = nullptr;  // nullptr: the argument was None
    int64_t shape[kMaxDim] = {};
    int64_t stride[kMaxDim] = {};
    int ndim = 0;
    DType dtype = DType::kFloat32;
    int device = kCpu;
    const char* name = "";  // the argument's name, for errors

    explicit operator bool() const { return data != nullptr; }
    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
    std::string describe() const {
        std::string text = "[";
        for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
        return text + "] " + name_of(dtype);
    }
};

// Expect a type and a shape; -1 accepts any size. The last dimension must be contiguous.
template <typename... Sizes>
inline void expect(const TensorView& t, DType dtype, const char* wanted, Sizes... sizes) {
    const int64_t want[] = {static_cast<int64_t>(sizes)...};
    constexpr int ndim = sizeof...(sizes);
    bool fits = t.ndim == ndim && t.dtype == dtype;
    for (int i = 0; fits && i < ndim; ++i) fits = want[i] < 0 || want[i] == t.shape[i];
    if (!fits) {
        std::string sized;
        for (int i = 0; i < ndim; ++i)
            sized += (i ? ", " : "") + (want[i] < 0 ? std::string("*") : std::to_string(want[i]));
        fail(t.name, ": expected ", wanted, " = [", sized, "] ", name_of(dtype), ", got ",
             t.describe());
    }
    SPECRT_CHECK(ndim == 0 || t.stride[ndim - 1] == 1 || t.shape[ndim - 1] <= 1, t.name,
                 ": the last dimension must be contiguous, got stride ", t.stride[ndim - 1]);
}

// All on one device, which is returned; arguments that were None do not count.
template <typename... Views>
inline int common_device(const TensorView& first, const Views&... others) {
    const TensorView* views[] = {&first, &others...};
    for (const TensorView* view : views)
        SPECRT_CHECK(!*view || view->device == first.device, view->name, ": expected a tensor on ",
                     name_of_device(first.device), " as ", first.name, " is, got one on ",
                     name_of_device(view->device));
    return first.device;
}

// A type that kernels read as float32.
inline void expect_float(const TensorView& t) {
    const DType type = t.dtype;
    SPECRT_CHECK(type == DType::kFloat32 || type == DType::kBFloat16 || type == DType::kFloat16,
                 t.name, ": expected float32, bfloat16 or float16, got ", t.describe());
}

inline void expect_dtype_of(const TensorView& first, const TensorView& t) {
    SPECRT_CHECK(t.dtype == first.dtype, t.name, ": expected ", name_of(first.dtype), " like ",
                 first.name, ", got ", t.describe());
}

inline void expect_contiguous(const TensorView& t) {
    int64_t run = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
        SPECRT_CHECK(t.shape[i] <= 1 || t.stride[i] == run, t.name, ": must be contiguous");
        run *= t.shape[i];
    }
}

inline void expect_aligned(const TensorView& t, int64_t bytes) {
    SPECRT_CHECK(reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes) == 0, t.name,
                 ": expected to start at a multiple of ", bytes, " bytes");
}

// That no element of one lies in the stretch of memory that the other spans, from its first to its
// last element. Views that interleave are refused too: what lies between is not worth telling.
inline void expect_apart(const TensorView& t, const TensorView& other) {
    const auto begin = [](const TensorView& v) { return reinterpret_cast<uintptr_t>(v.data); };
    const auto end = [&](const TensorView& v) {
        int64_t last = 0;
        for (int i = 0; i < v.ndim; ++i) {
            if (v.shape[i] == 0) return uintptr_t{0};
            last += (v.shape[i] - 1) * v.stride[i];
        }
        return begin(v) + static_cast<uintptr_t>((last + 1) * size_of(v.dtype));
    };
    SPECRT_CHECK(begin(t) >= end(other) || begin(other) >= end(t), t.name,
                 ": expected memory that is not ", other.name, "'s, which is written");
}

}  // namespace specrt
