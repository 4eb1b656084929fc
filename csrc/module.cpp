static constexpr unsigned long long kTarget = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION  // torch 2.11 refuses its own pybind11 headers beside it; nothing of torch is used here
// The module kdcore._C: what was built, and the choice of instruction set. Loading it registers the ops of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/problem.h"
#include "cuda/plan.h"

namespace py = pybind11;
namespace cpu = kdcore::cpu;

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto isa : {cpu::Isa::generic, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (isa <= cpu::best_isa()) names.emplace_back(cpu::isa_name(isa));
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  cpu::Isa isa{};
  if (!cpu::parse_isa(name.c_str(), &isa)) throw py::value_error("kdcore: '" + name + "' is no instruction set");
  if (!cpu::set_isa(isa)) throw py::value_error("kdcore: this machine does not have " + name);
}

py::dict build_info() {
  py::dict info;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["flags"] = KDCORE_FLAGS;
  info["torch"] = KDCORE_TORCH;
  info["oldest_torch"] = std::to_string(kTarget >> 56) + "." + std::to_string(kTarget >> 48 & 255);
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  return info;
}

py::dict cuda_plan(int64_t rows, int64_t classes, int itemsize, int alignment, bool by_class, bool bounded, bool sums,
                   bool whole) {
  using namespace py::literals;
  const kdcore::cuda::Plan p =
      kdcore::cuda::make_plan({rows, classes, itemsize, alignment, by_class, bounded, sums, whole});
  return py::dict("vector"_a = p.vector, "wide"_a = p.wide, "tiles"_a = p.tiles, "chunk"_a = p.chunk,
                  "chunks"_a = p.chunks, "tiled"_a = p.tiled, "row_vector"_a = p.row_vector, "row_wide"_a = p.row_wide,
                  "across"_a = p.across, "groups"_a = p.groups, "batch"_a = p.batch, "row_chunk"_a = p.row_chunk,
                  "row_chunks"_a = p.row_chunks, "splits"_a = p.splits, "segment"_a = p.segment, "padded"_a = p.padded);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this module was built.");
  m.def("available_isas", &available_isas, "The instruction sets of this machine that it has kernels for.");
  m.def("cpu_isa", [] { return cpu::isa_name(cpu::current_isa()); }, "The one that calls use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Makes calls use this one.");
  m.def("cuda_plan", &cuda_plan, py::arg("rows"), py::arg("classes"), py::kw_only(), py::arg("itemsize") = 4,
        py::arg("alignment") = 16, py::arg("by_class") = true, py::arg("bounded") = true, py::arg("sums") = true,
        py::arg("whole") = false, "How the CUDA kernels cut a call into blocks (csrc/cuda/plan.h).");
}
