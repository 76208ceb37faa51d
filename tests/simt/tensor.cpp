// Tensors on the CPU that claim to be on GPU 0, so that the host code takes the CUDA way. Their
// memory is a guarded copy for the length of the call.
#include "bindings/tensor.h"

#include "guarded_copies.h"

namespace specrt::bindings {

// What csrc/bindings/tensor.cpp calls device_view_of; CMakeLists.txt renames it there.
TensorView host_view_of(py::handle tensor, const char* name, bool is_optional);

TensorView device_view_of(py::handle tensor, const char* name, bool is_optional) {
    TensorView view = host_view_of(tensor, name, is_optional);
    if (!view) return view;
    SPECRT_CHECK(view.device == kCpu, name, ": the shim runs tensors on the CPU, got one on ",
                 name_of_device(view.device));
    const py::object storage = tensor.attr("untyped_storage")();
    auto* begin = reinterpret_cast<unsigned char*>(storage.attr("data_ptr")().cast<uintptr_t>());
    const auto bytes = storage.attr("nbytes")().cast<size_t>();
    unsigned char* copy = simt::GuardedCopies::current().copy_of(begin, bytes, name);
    view.data = bytes ? copy + (view.as<unsigned char>() - begin) : copy;
    view.device = 0;
    return view;
}

}  // namespace specrt::bindings
