// depass_kernels._build_info: what the compiled library was built with. Needs no torch to import.
#include <pybind11/pybind11.h>

#include <string>

#include "build_config.h"  // written by setup.py

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["cxx"] = "clang " __clang_version__;
#else
  info["cxx"] = "g++ " __VERSION__;
#endif
  const std::string nvcc = DEPASS_NVCC, missing = DEPASS_NO_CUDA;
  info["nvcc"] = nvcc.empty() ? py::object(py::none()) : py::str(nvcc);
  info["cuda_architectures"] = py::str(DEPASS_ARCHITECTURES).attr("split")();
  info["cuda_missing"] = missing.empty() ? py::object(py::none()) : py::str(missing);
  info["cuda_failed"] = DEPASS_CUDA_FAILED;
  return info;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What csrc was built with.";
  m.def("build_info", &build_info,
        "cxx: the C++ compiler; nvcc: the CUDA compiler's version, or "
        "None; cuda_architectures: what the CUDA kernels were compiled for; cuda_missing: why they were left out, or "
        "None; cuda_failed: whether an nvcc was found and could not be used.");
}
