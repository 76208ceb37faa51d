#include "bindings/tensor.h"

namespace specrt::bindings {

void register_tree_attention(py::module_&) {}

}  // namespace specrt::bindings
