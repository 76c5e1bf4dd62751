// aadkern._host: what this build is made of, for `aad info`.

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

py::object text_or_none(const std::string& text) {
    return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

// "9.0a;10.0" -> ("9.0a", "10.0"); empty when no CUDA kernel was built.
py::tuple split_list(const std::string& joined) {
    py::list items;
    for (std::size_t begin = 0; begin < joined.size();) {
        const std::size_t end = std::min(joined.find(';', begin), joined.size());
        items.append(joined.substr(begin, end - begin));
        begin = end + 1;
    }
    return py::tuple(items);
}

py::dict build_info() {
    py::dict info;
    info["version"] = AADKERN_VERSION;
    info["compiler"] = AADKERN_COMPILER;
    info["cxx_standard"] = (__cplusplus / 100) % 100;
    info["build_type"] = AADKERN_BUILD_TYPE;
    info["cuda_compiler"] = text_or_none(AADKERN_CUDA_COMPILER);
    info["cuda_architectures"] = split_list(AADKERN_CUDA_ARCHITECTURES);
    info["no_cuda"] = text_or_none(AADKERN_NO_CUDA);
    return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
    module.doc() = "Facts about this build of aadkern.";
    module.def("build_info", &build_info,
               "Build facts: version, compiler, cxx_standard (17), build_type, cuda_compiler (None: not found or not "
               "looked for), cuda_architectures (empty: no CUDA kernel in this build), no_cuda (why it has none, or None).");
}
