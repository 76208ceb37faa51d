#include "bindings/tensor.h"

#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace specrt::bindings {
namespace {

struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
};

const Names& names() {
    static const Names interned;
    return interned;
}

PyObject*& thread_source() {
    static PyObject* source = nullptr;  // held for the life of the process
    return source;
}

py::object checked(PyObject* object) {
    if (!object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

// dtype objects are singletons, so their addresses identify them; each is read as text once.
DType dtype_of(PyObject* dtype, const char* name) {
    static std::vector<std::pair<PyObject*, DType>> known;
    for (const auto& [object, value] : known)
        if (object == dtype) return value;
    const std::string text = py::str(dtype);
    for (DType value : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt32,
                        DType::kInt64, DType::kFloat64}) {
        if (text != std::string("torch.") + name_of(value)) continue;
        Py_INCREF(dtype);
        known.emplace_back(dtype, value);
        return value;
    }
    fail(name, ": unsupported dtype ", text);
}

void read_sizes(PyObject* tuple, int64_t* out, int* ndim, const char* name) {
    const Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    SPECRT_CHECK(n <= TensorView::kMaxDim, name, ": at most 6 dimensions, got ", n);
    for (Py_ssize_t i = 0; i < n; ++i) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    *ndim = static_cast<int>(n);
}

}  // namespace

TensorView view_of(py::handle tensor, const char* name, bool is_optional) {
    TensorView view;
    view.name = name;
    if (tensor.is_none()) {
        if (!is_optional) throw py::type_error(std::string(name) + ": expected a tensor, got None");
        return view;
    }
    PyObject* self = tensor.ptr();
    PyObject* is_cpu = PyObject_GetAttr(self, names().is_cpu);
    if (!is_cpu) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + ": expected a tensor, got " +
                             Py_TYPE(self)->tp_name);
    }
    const bool on_cpu = is_cpu == Py_True;
    Py_DECREF(is_cpu);
    SPECRT_CHECK(on_cpu, name, ": expected a CPU tensor");
    const py::object shape = checked(PyObject_GetAttr(self, names().shape));
    const py::object stride = checked(PyObject_CallMethodNoArgs(self, names().stride));
    const py::object dtype = checked(PyObject_GetAttr(self, names().dtype));
    const py::object pointer = checked(PyObject_CallMethodNoArgs(self, names().data_ptr));
    int num_strides = 0;
    read_sizes(shape.ptr(), view.shape, &view.ndim, name);
    read_sizes(stride.ptr(), view.stride, &num_strides, name);
    view.dtype = dtype_of(dtype.ptr(), name);
    view.data = PyLong_AsVoidPtr(pointer.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    // An empty tensor's pointer is null; it is still an argument that was given.
    static unsigned char nothing;
    if (!view.data) view.data = &nothing;
    return view;
}

int num_threads() {
    if (!thread_source()) return static_cast<int>(std::thread::hardware_concurrency());
    const py::object value = checked(PyObject_CallNoArgs(thread_source()));
    return static_cast<int>(PyLong_AsLong(value.ptr()));
}

void set_thread_source(py::object get_num_threads) {
    thread_source() = get_num_threads.release().ptr();
}

}  // namespace specrt::bindings
