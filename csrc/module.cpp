// The Python module dnkd_ext._C: importing it registers the operators with torch; build_info()
// tells how they were built.
#include <ATen/Config.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "common/buffer_pool.h"
#include "common/isa.h"

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["threads"] = at::get_num_threads();
  py::list isas;
  for (dnkd::Isa isa : dnkd::available_isas()) {
    isas.append(dnkd::isa_name(isa));
  }
  info["cpu_isas"] = isas;
  info["cpu_isa"] = dnkd::isa_name(dnkd::active_isa());
#ifdef DNKD_WITH_CUDA
  info["cuda"] = DNKD_CUDA_VERSION;
  info["cuda_architectures"] = DNKD_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of dnkd_ext; importing it registers torch.ops.dnkd_ext.";
  m.def("build_info", &build_info, "How this library was built, and what it chose on this CPU.");
  m.def(
      "empty_cache", [] { return dnkd::BufferPool::gradients().clear(); },
      "Frees the CPU memory kept for gradients; returns how many bytes that was.");
}
