// The test module: the bindings of every kernel that has a CUDA source, unchanged, and the shim's
// settings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bindings/tensor.h"
#include "device.h"
#include "graph.h"
#include "guarded_copies.h"
#include "host_call.h"
#include "launch.h"
#include "probes/probe.h"

namespace specrt::bindings {

#define SIMT_KERNEL(name) void register_##name(py::module_& m);
#include "simt_kernels.inc"
#undef SIMT_KERNEL

void register_tile_product(py::module_& m);

namespace {

// As `function`, with copies of its tensors that live as long as a call.
py::cpp_function with_guarded_copies(const py::object& function) {
    return py::cpp_function([function](const py::args& args, const py::kwargs& kwargs) {
        simt::GuardedCopies copies;
        py::object result = function(*args, **kwargs);
        copies.write_back();
        return result;
    });
}

void guard_kernels(py::module_& m) {
    const auto members = m.attr("__dict__").cast<std::map<std::string, py::object>>();
    for (const auto& [name, member] : members)
        if (PyCFunction_Check(member.ptr())) m.attr(name.c_str()) = with_guarded_copies(member);
}

using Tensors = std::map<std::string, py::object>;

void run_probe(const std::string& name, const Tensors& tensors, const std::vector<int>& numbers,
               const std::vector<unsigned>& grid, const std::vector<unsigned>& block,
               size_t shared_bytes, bool overlaps) {
    const auto sizes = [](std::vector<unsigned> d) {
        d.resize(3, 1);
        return dim3(d[0], d[1], d[2]);
    };
    probes::Probe probe{{sizes(grid), sizes(block), shared_bytes, overlaps}, {}, numbers};
    for (const auto& [argument, tensor] : tensors)
        probe.tensors[argument] = device_view_of(tensor, argument.c_str()).data;
    const probes::ProbeFn run = probes::find(name);
    py::gil_scoped_release release;
    run(probe);
}

// Calls `function` in the order of this thread's launches: at once, or as part of a graph. It is
// kept and dropped by threads that do not hold Python's lock.
void call_host(const py::function& function) {
    const auto drop = [](py::function* kept) {
        py::gil_scoped_acquire held;
        delete kept;
    };
    const std::shared_ptr<py::function> kept(new py::function(function), drop);
    simt::call_host(capturing().stream, [kept] {
        py::gil_scoped_acquire held;
        (*kept)();
    });
}

void set_schedule(uint64_t seed, unsigned resident_blocks, bool strict) {
    SPECRT_CHECK(resident_blocks >= 1 && resident_blocks <= 64,
                 "resident_blocks: expected 1 to 64, got ", resident_blocks);
    simt::Settings settings = simt::settings();
    settings.seed = seed;
    settings.resident_blocks = resident_blocks;
    settings.is_strict = strict;
    simt::set_settings(settings);
}

void set_device(int num_sms, size_t shared_bytes) {
    SPECRT_CHECK(num_sms >= 1, "num_sms: expected at least 1, got ", num_sms);
    simt::Settings settings = simt::settings();
    settings.num_sms = num_sms;
    settings.shared_bytes = shared_bytes;
    settings.num_good = UINT64_MAX;
    simt::set_settings(settings);
}

void break_device(uint64_t num_good, const std::string& fault) {
    simt::Settings settings = simt::settings();
    settings.num_good = num_good;
    settings.fault = fault;
    simt::set_settings(settings);
}

void set_current_device(int device) {
    SPECRT_CHECK(cudaSetDevice(device) == cudaSuccess, "device: expected 0 or 1, got ", device);
}

int current_device() {
    int device = 0;
    (void)cudaGetDevice(&device);
    return device;
}

void set_arithmetic(const std::string& name) {
    static const std::map<std::string, simt::Arithmetic> kinds{
        {"ieee", simt::Arithmetic::kIeee},
        {"sm_80", simt::Arithmetic::kSm80},
        {"sm_90", simt::Arithmetic::kSm90},
    };
    const auto kind = kinds.find(name);
    SPECRT_CHECK(kind != kinds.end(), "arithmetic: expected ieee, sm_80 or sm_90, got ", name);
    simt::Settings settings = simt::settings();
    settings.arithmetic = kind->second;
    simt::set_settings(settings);
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
    m.doc() = "CUDA sources on the CPU: see tests/simt/README.md";
#define SIMT_KERNEL(name) register_##name(m);
#include "simt_kernels.inc"
#undef SIMT_KERNEL
    register_tile_product(m);
    m.def("run_probe", &run_probe, py::arg("name"), py::arg("tensors"),
          py::arg("numbers") = std::vector<int>{}, py::arg("grid") = std::vector<unsigned>{1},
          py::arg("block") = std::vector<unsigned>{32}, py::arg("shared_bytes") = 0,
          py::arg("overlaps") = false);
    guard_kernels(m);
    m.def("set_schedule", &set_schedule, py::arg("seed"), py::arg("resident_blocks") = 3,
          py::arg("strict") = true);
    m.def("set_device", &set_device, py::arg("num_sms") = 8, py::arg("shared_bytes") = 232448);
    m.def("set_arithmetic", &set_arithmetic, py::arg("name") = "ieee");
    m.def("break_device", &break_device, py::arg("num_good") = 0,
          py::arg("fault") = "an illegal memory access was encountered");
    m.def("fail_next", &simt::fail_next, py::arg("call"));
    m.def("call_host", &call_host, py::arg("function"));
    m.def("synchronize", &simt::synchronize);
    m.def("num_graph_objects", &simt::num_graph_objects);
    m.def("set_current_device", &set_current_device, py::arg("device"));
    m.def("current_device", &current_device);
    m.def("num_launches", &simt::num_launches);
    m.def("num_overlapping", &simt::num_overlapping);
    m.def("last_device", &simt::last_device);
}

}  // namespace specrt::bindings
