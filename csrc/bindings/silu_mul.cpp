#include "bindings/tensor.h"

namespace specrt::bindings {

void register_silu_mul(py::module_&) {}

}  // namespace specrt::bindings
