#include <memory>

#include "bindings/tensor.h"
#include "graph/cpu_graph.h"
#include "graph/cuda_graph.h"

namespace specrt::bindings {
namespace {

void register_cpu_graph(py::module_& m) {
    py::class_<CpuGraph>(m, "CpuGraph", py::module_local())
        .def(py::init<>())
        .def("begin", &CpuGraph::begin)
        .def("end", &CpuGraph::end)
        .def("replay",
             [](const CpuGraph& graph) {
                 const int threads = num_threads();
                 py::gil_scoped_release release;
                 graph.replay(threads);
             })
        .def_property_readonly("num_launches", &CpuGraph::num_launches);
}

void register_cuda_graph(py::module_& m) {
    py::class_<CudaGraph>(m, "CudaGraph", py::module_local())
        .def(py::init([](const py::function& launch, int device) {
            py::gil_scoped_release release;
            return std::make_unique<CudaGraph>(device, [&] {
                py::gil_scoped_acquire held;
                launch();
            });
        }))
        .def("replay",
             [](const CudaGraph& graph) {
                 const CudaStream stream = current_stream(graph.device());
                 py::gil_scoped_release release;
                 graph.replay(stream);
             })
        .def_property_readonly("num_launches", &CudaGraph::num_launches)
        .def_property_readonly("num_bytes", &CudaGraph::num_bytes);
}

}  // namespace

// Classes of one module: the tests' shim has some of these names in the same process.
void register_graph(py::module_& m) {
    register_cpu_graph(m);
    register_cuda_graph(m);
}

}  // namespace specrt::bindings
