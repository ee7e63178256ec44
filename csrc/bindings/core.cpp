// gut_fast._core: unpacks addresses that Python has checked, releases the GIL, calls the CPU kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/stream.h"

namespace py = pybind11;
using gut_fast::DType;
using gut_fast::Segment;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls gossip_step or stream_step: the same arguments, the same streams.
using Run = void (*)(const gut_fast::StepArgs&, int num_threads);

template <Run run>
void step(DType dtype, DType state_dtype, std::int64_t num_agents, const std::vector<Address>& parameters,
                 const std::vector<Address>& gradients, const std::vector<std::int64_t>& columns,
                 const std::vector<Address>& state, Address coefficients, int num_messages, Address row_start,
                 Address neighbor, Address weight, Address gradient_scale, int num_threads) {
  if (gradients.size() != parameters.size() || columns.size() != parameters.size()) {
    throw std::invalid_argument("parameters, gradients and columns must have one entry per segment");
  }
  std::vector<Segment> segments;
  segments.reserve(parameters.size());
  std::int64_t offset = 0;
  for (std::size_t k = 0; k < parameters.size(); ++k) {
    segments.push_back({pointer<void>(parameters[k]), pointer<const void>(gradients[k]), columns[k], offset});
    offset += num_agents * columns[k];
  }
  std::vector<void*> buffers;
  for (const auto address : state) buffers.push_back(pointer<void>(address));
  const gut_fast::StepArgs args{
      dtype,
      state_dtype,
      static_cast<int>(state.size()),
      num_messages,
      pointer<const double>(coefficients),
      {num_agents, pointer<const std::int64_t>(row_start), pointer<const std::int64_t>(neighbor),
       pointer<const double>(weight)},
      pointer<const double>(gradient_scale),
      buffers.data(),
      segments.data(),
      static_cast<std::int64_t>(segments.size()),
  };
  const py::gil_scoped_release release;
  run(args, num_threads);
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  module.doc() = "The compiled CPU kernel of gut_fast. Addresses are not checked here; use gut_fast.ops.";
  module.attr("MAX_STATES") = gut_fast::cpu::kMaxStates;
  module.attr("MAX_MESSAGES") = gut_fast::cpu::kMaxMessages;
  module.attr("CUDA_OPTION") = GUT_FAST_CUDA;
  module.def("available_tiers", &gut_fast::cpu::available_tiers);
  module.def("tier", &gut_fast::cpu::tier);
  module.def("set_tier", &gut_fast::cpu::set_tier, py::arg("name"));
  py::enum_<DType>(module, "DType")
      .value("float32", DType::float32)
      .value("float64", DType::float64)
      .value("bfloat16", DType::bfloat16);
  const auto def_step = [&](const char* name, auto function) {
    module.def(name, function, py::arg("dtype"), py::arg("state_dtype"), py::arg("num_agents"), py::arg("parameters"),
               py::arg("gradients"), py::arg("columns"), py::arg("state"), py::arg("coefficients"),
               py::arg("num_messages"), py::arg("row_start"), py::arg("neighbor"), py::arg("weight"),
               py::arg("gradient_scale"), py::arg("num_threads"));
  };
  def_step("gossip_step", &step<gut_fast::cpu::gossip_step>);
  def_step("stream_step", &step<gut_fast::cpu::stream_step>);
}
