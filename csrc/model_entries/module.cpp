// What Python builds for the attention kernels on the host model: the arguments, with the very structs of attention/launch.h, and
// calls into a library of forward.cpp or backward.cpp that tests/sm90/hopper_host.py has built, of sound sources or with a fault planted.
// Compiled on demand for tests and development; no package holds it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/launch.h"
#include "primitives/model/launch.h"

namespace py = pybind11;
using namespace aadkern;

namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// The entry of that name in the library, which is loaded once and stays.
void* entry(const std::string& library, const char* name) {
    void* loaded = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* found = loaded ? dlsym(loaded, name) : nullptr;
    if (!found) throw std::runtime_error(dlerror());
    return found;
}

// Runs call(buffer, size), which writes a report, without Python's lock; the report's text.
template <class Call> std::string report(Call call) {
    std::vector<char> text(16384);
    {
        py::gil_scoped_release unlocked;
        call(text.data(), int(text.size()));
    }
    return text.data();
}

std::string forward(const std::string& library, const ForwardArguments& arguments, int kernel, int range_count, uintptr_t options) {
    using Entry = int (*)(const ForwardArguments*, int, int, const host_model::Options*, char*, int);
    auto call = reinterpret_cast<Entry>(entry(library, "forward"));
    return report([&](char* text, int size) {
        call(&arguments, kernel, range_count, pointer<host_model::Options>(options), text, size);
    });
}

std::string backward(const std::string& library, const BackwardArguments& arguments, uintptr_t options) {
    using Entry = int (*)(const BackwardArguments*, const host_model::Options*, char*, int);
    auto call = reinterpret_cast<Entry>(entry(library, "backward"));
    return report([&](char* text, int size) { call(&arguments, pointer<host_model::Options>(options), text, size); });
}

int64_t workspace_bytes(const std::string& library, const BackwardArguments& arguments) {
    using Entry = int64_t (*)(const BackwardArguments*);
    return reinterpret_cast<Entry>(entry(library, "workspace_bytes"))(&arguments);
}

}  // namespace

// Memory is given by its address, Tensor.data_ptr(), 0 for none; whoever calls keeps it alive.
PYBIND11_MODULE(hopper_model, module) {
    module.doc() = "The attention kernels of csrc on the host model of Hopper.";
    py::class_<TensorView>(module, "TensorView").def(py::init([](uintptr_t data, int64_t batch, int64_t length, int64_t head) {
        return TensorView{pointer<void>(data), batch, length, head};
    }));
    py::class_<Shape>(module, "Shape")
        .def(py::init([](int batch, int heads, int q_len, int k_len, int head_dim, int type) {
            return Shape{batch, heads, q_len, k_len, head_dim, DataType(type)};
        }));
    py::class_<Tables>(module, "Tables").def(py::init([](uintptr_t tiles, uintptr_t ranges, int tile_count) {
        return Tables{pointer<int32_t>(tiles), pointer<int32_t>(ranges), tile_count};
    }));
    py::class_<BackwardTables>(module, "BackwardTables")
        .def(py::init([](uintptr_t query_tiles, uintptr_t key_tiles, uintptr_t spans, int query_tile_count, int key_tile_count) {
            return BackwardTables{pointer<int32_t>(query_tiles), pointer<int32_t>(key_tiles), pointer<int32_t>(spans),
                                  query_tile_count, key_tile_count};
        }));
    py::class_<ForwardArguments>(module, "ForwardArguments")
        .def(py::init([](const Shape& shape, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                         uintptr_t lse, const Tables& tables, float scale, int head_group, int persistent_ctas) {
                 return ForwardArguments{shape, q, k, v, out, pointer<float>(lse), tables, scale, head_group, persistent_ctas};
             }),
             py::kw_only(), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
             py::arg("tables"), py::arg("scale"), py::arg("head_group"), py::arg("persistent_ctas") = 0);
    py::class_<BackwardArguments>(module, "BackwardArguments")
        .def(py::init([](const Shape& shape, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                         const TensorView& dout, const TensorView& dq, const TensorView& dk, const TensorView& dv, uintptr_t lse,
                         uintptr_t dlse, const BackwardTables& tables, int query_rows, float scale, int head_group, bool deterministic) {
                 return BackwardArguments{shape, q, k, v, out, dout, dq, dk, dv, pointer<float>(lse), pointer<float>(dlse), tables,
                                          query_rows, scale, head_group, deterministic, nullptr};
             }),
             py::kw_only(), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("dout"),
             py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("lse"), py::arg("dlse"), py::arg("tables"), py::arg("query_rows"), py::arg("scale"),
             py::arg("head_group"), py::arg("deterministic"))
        .def_property(
            "workspace", [](const BackwardArguments& arguments) { return reinterpret_cast<uintptr_t>(arguments.workspace); },
            [](BackwardArguments& arguments, uintptr_t address) { arguments.workspace = pointer<void>(address); });
    module.def("forward", &forward);
    module.def("backward", &backward);
    module.def("workspace_bytes", &workspace_bytes);
}
