// The extension module: build facts, instruction set, and one register_* per file of this folder.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/tensor.h"
#include "core/cpu_topology.h"
#include "core/dispatch.h"

namespace specrt::bindings {

void register_layer_norm(py::module_& m);
void register_linear(py::module_& m);
void register_matrix_pack(py::module_& m);
void register_rms_norm(py::module_& m);
void register_rope_append(py::module_& m);
void register_activate(py::module_& m);
void register_scale_add(py::module_& m);
void register_time_stamp(py::module_& m);
void register_tree_attention(py::module_& m);
void register_tree_accept(py::module_& m);
void register_tree_build(py::module_& m);
void register_tree_settle(py::module_& m);
void register_token_recycle(py::module_& m);
void register_history_append(py::module_& m);
void register_history_tail(py::module_& m);
void register_kv_commit(py::module_& m);
void register_feature_sample(py::module_& m);
void register_draft_control(py::module_& m);
void register_draft_pairs(py::module_& m);
void register_graph(py::module_& m);
void register_embed(py::module_& m);
void register_prompt_lookup(py::module_& m);

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = SPECRT_VERSION;
    info["compiler"] = __VERSION__;
#if defined(SPECRT_CUDA_VERSION)
    info["cuda"] = SPECRT_CUDA_VERSION;
    info["cuda_archs"] = SPECRT_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = py::none();
#endif
    py::list isas;
    for (Isa isa : kAllIsas)
        if (cpu_has(isa)) isas.append(isa_name(isa));
    info["cpu_isas"] = isas;
    info["active_isa"] = isa_name(active_isa());
    const char* refused = refused_isa();
    info["refused_isa"] = refused ? py::object(py::str(refused)) : py::none();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "specrt's compiled kernels; use the typed wrappers in specrt.ops";
    m.def("build_info", &build_info);
    m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); });
    m.def("active_isa", [] { return isa_name(active_isa()); });
    m.def("set_thread_source", &set_thread_source);
    m.def("set_stream_source", &set_stream_source);
    m.def("pieces_by_thread", &pieces_by_thread);
    m.def("rest_workers", &rest_workers);
    m.def("worker_cpus", &worker_cpus);
    m.def("choose_cpus", [](const std::string& devices, const Cpus& allowed, int here, int count) {
        return choose_cpus(read_places(devices, allowed), here, count);
    });
    register_graph(m);
    register_layer_norm(m);
    register_linear(m);
    register_matrix_pack(m);
    register_rms_norm(m);
    register_rope_append(m);
    register_activate(m);
    register_scale_add(m);
    register_time_stamp(m);
    register_tree_attention(m);
    register_tree_accept(m);
    register_tree_build(m);
    register_tree_settle(m);
    register_token_recycle(m);
    register_history_append(m);
    register_history_tail(m);
    register_kv_commit(m);
    register_feature_sample(m);
    register_draft_control(m);
    register_draft_pairs(m);
    register_embed(m);
    register_prompt_lookup(m);
}

}  // namespace specrt::bindings
