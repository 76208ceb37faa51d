#include "bindings/tensor.h"

#include <algorithm>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/dlpack_abi.h"

namespace specrt::bindings {
namespace {

struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* device = PyUnicode_InternFromString("device");
    PyObject* type = PyUnicode_InternFromString("type");
    PyObject* index = PyUnicode_InternFromString("index");
};

const Names& names() {
    static const Names interned;
    return interned;
}

PyObject*& thread_source() {
    static PyObject* source = nullptr;  // held for the life of the process
    return source;
}

PyObject*& stream_source() {
    static PyObject* source = nullptr;  // likewise
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
                        DType::kInt64, DType::kFloat64, DType::kE4M3, DType::kUInt8}) {
        if (text != std::string("torch.") + name_of(value)) continue;
        Py_INCREF(dtype);
        known.emplace_back(dtype, value);
        return value;
    }
    fail(name, ": unsupported dtype ", text);
}

int read_device(const py::object& device, const char* name) {
    const std::string type = py::str(checked(PyObject_GetAttr(device.ptr(), names().type)));
    if (type == "cpu") return kCpu;
    SPECRT_CHECK(type == "cuda", name, ": expected a CPU or CUDA tensor, got one on ", type);
    return checked(PyObject_GetAttr(device.ptr(), names().index)).cast<int>();
}

void read_sizes(PyObject* tuple, int64_t* out, int* ndim, const char* name) {
    const Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    SPECRT_CHECK(n <= TensorView::kMaxDim, name, ": at most 6 dimensions, got ", n);
    for (Py_ssize_t i = 0; i < n; ++i) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    *ndim = static_cast<int>(n);
}

using KnownApis = std::vector<std::pair<PyTypeObject*, const dlpack::ExchangeApi*>>;

KnownApis& known_apis() {
    static KnownApis known;
    return known;
}

// The exchange table of an object's type, or nullptr; each type is asked once.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
    KnownApis& known = known_apis();
    for (const auto& [object, api] : known)
        if (object == type) return api;
    const dlpack::ExchangeApi* api = nullptr;
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), dlpack::kTypeAttribute);
    if (capsule) {
        api = static_cast<const dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
        Py_DECREF(capsule);
        if (api && api->major != dlpack::kMajorVersion) api = nullptr;
    }
    PyErr_Clear();
    Py_INCREF(type);
    known.emplace_back(type, api);
    return api;
}

bool read_dtype(const dlpack::Tensor& t, DType* dtype) {
    if (t.type_lanes != 1) return false;
    switch (t.type_code * 100 + t.type_bits) {
        case dlpack::kFloat * 100 + 32:
            *dtype = DType::kFloat32;
            return true;
        case dlpack::kFloat * 100 + 16:
            *dtype = DType::kFloat16;
            return true;
        case dlpack::kFloat * 100 + 64:
            *dtype = DType::kFloat64;
            return true;
        case dlpack::kBFloat * 100 + 16:
            *dtype = DType::kBFloat16;
            return true;
        case dlpack::kFloat8E4M3 * 100 + 8:
            *dtype = DType::kE4M3;
            return true;
        case dlpack::kInt * 100 + 32:
            *dtype = DType::kInt32;
            return true;
        case dlpack::kInt * 100 + 64:
            *dtype = DType::kInt64;
            return true;
        case dlpack::kUInt * 100 + 8:
            *dtype = DType::kUInt8;
            return true;
        default:
            return false;
    }
}

// The quick way; false (and no Python error) sends the caller the slow way, which explains itself.
bool read_by_exchange(PyObject* self, TensorView* view) {
    const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(self));
    if (!api) return false;
    dlpack::Tensor t;
    if (api->tensor_from_object(self, &t) != 0) {
        PyErr_Clear();
        return false;
    }
    if (t.device_type != dlpack::kCpu && t.device_type != dlpack::kCuda) return false;
    if (t.ndim > TensorView::kMaxDim) return false;
    if (!read_dtype(t, &view->dtype)) return false;
    view->device = t.device_type == dlpack::kCpu ? kCpu : t.device_id;
    view->ndim = t.ndim;
    std::copy(t.shape, t.shape + t.ndim, view->shape);
    std::copy(t.strides, t.strides + t.ndim, view->stride);
    view->data = static_cast<unsigned char*>(t.data) + t.byte_offset;
    return true;
}

// A dimension of one element may have any stride: a view's is left over from what it was cut from,
// and a producer of DLPack may write 1. As 0 it passes every check of alignment.
void forget_unused_strides(TensorView* view) {
    for (int i = 0; i < view->ndim; ++i)
        if (view->shape[i] == 1) view->stride[i] = 0;
}

}  // namespace

TensorView device_view_of(py::handle tensor, const char* name, bool is_optional) {
    TensorView view;
    view.name = name;
    if (tensor.is_none()) {
        if (!is_optional) throw py::type_error(std::string(name) + ": expected a tensor, got None");
        return view;
    }
    // An empty tensor's pointer is null; it is still an argument that was given.
    static unsigned char nothing;
    PyObject* self = tensor.ptr();
    if (read_by_exchange(self, &view)) {
        if (!view.data) view.data = &nothing;
        forget_unused_strides(&view);
        return view;
    }
    PyObject* device = PyObject_GetAttr(self, names().device);
    if (!device) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + ": expected a tensor, got " +
                             Py_TYPE(self)->tp_name);
    }
    view.device = read_device(py::reinterpret_steal<py::object>(device), name);
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
    if (!view.data) view.data = &nothing;
    forget_unused_strides(&view);
    return view;
}

int num_threads() {
    if (!thread_source()) return static_cast<int>(std::thread::hardware_concurrency());
    const py::object value = checked(PyObject_CallNoArgs(thread_source()));
    return static_cast<int>(PyLong_AsLong(value.ptr()));
}

CudaStream current_stream(int device) {
    CudaStream stream = nullptr;
    for (const auto& known : known_apis()) {
        const dlpack::ExchangeApi* api = known.second;
        if (api && api->current_stream(dlpack::kCuda, device, &stream) == 0) return stream;
        PyErr_Clear();
    }
    if (!stream_source()) return nullptr;
    const py::object value = checked(PyObject_CallFunction(stream_source(), "i", device));
    return PyLong_AsVoidPtr(value.ptr());
}

void set_stream_source(py::object get_stream) {
    stream_source() = get_stream.release().ptr();
}

void set_thread_source(py::object get_num_threads) {
    thread_source() = get_num_threads.release().ptr();
}

}  // namespace specrt::bindings
