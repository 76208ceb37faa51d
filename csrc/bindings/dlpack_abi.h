// The part of DLPack 1.x's C ABI that reading a tensor needs (dmlc/dlpack, dlpack.h): the layout of
// a borrowed tensor and the table of functions that a tensor's type offers to C callers. It costs a
// tenth of asking the Python object for its attributes one by one.
#pragma once
#include <cstdint>

namespace specrt::bindings::dlpack {

constexpr const char* kTypeAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kFloat8E4M3 = 10 };

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);  // borrows; 0 on success
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);  // 0 on success
};

}  // namespace specrt::bindings::dlpack
