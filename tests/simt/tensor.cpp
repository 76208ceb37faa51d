// Tensors on the CPU that claim to be on GPU 0, so that the host code takes the CUDA way; what says
// that it is on another one stays there. Their memory is a guarded copy for the length of the call;
// what is captured runs later, and so on their own.
#include "bindings/tensor.h"

#include "device.h"
#include "guarded_copies.h"

namespace specrt::bindings {

// What csrc/bindings/tensor.cpp calls device_view_of; CMakeLists.txt renames it there, and its
// current_stream, which asks torch.
TensorView host_view_of(py::handle tensor, const char* name, bool is_optional);

TensorView device_view_of(py::handle tensor, const char* name, bool is_optional) {
    TensorView view = host_view_of(tensor, name, is_optional);
    if (!view) return view;
    SPECRT_CHECK(view.device < simt::kNumDevices, name, ": the shim has two GPUs, got a tensor on ",
                 name_of_device(view.device));
    if (view.device == kCpu) view.device = 0;
    if (capturing().device != kCpu) return view;
    const py::object storage = tensor.attr("untyped_storage")();
    auto* begin = reinterpret_cast<unsigned char*>(storage.attr("data_ptr")().cast<uintptr_t>());
    const auto bytes = storage.attr("nbytes")().cast<size_t>();
    unsigned char* copy = simt::GuardedCopies::current().copy_of(begin, bytes, name);
    view.data = bytes ? copy + (view.as<unsigned char>() - begin) : copy;
    return view;
}

CudaStream current_stream(int device) {
    return simt::stream_of(device);
}

}  // namespace specrt::bindings
