#include "bindings/tensor.h"

namespace specrt::bindings {

void register_rope_append(py::module_&) {}

}  // namespace specrt::bindings
