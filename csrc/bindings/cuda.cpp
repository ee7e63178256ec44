// gut_fast._cuda: unpacks addresses that Python has checked, releases the GIL, queues the CUDA kernels.
//
// Links the CUDA runtime statically and asks the driver for nothing when imported. Its types are its own
// (module_local): the tests import it a second time, compiled for the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernel.h"

namespace py = pybind11;
using gut_fast::cuda::Element;
using gut_fast::cuda::Rows;
using gut_fast::cuda::StepArgs;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> all;
  for (const auto address : addresses) all.push_back(pointer<void>(address));
  return all;
}

StepArgs make_step(int device, Address stream, Element dtype, Element state_dtype, std::int64_t num_agents,
                   const std::vector<Address>& parameters, const std::vector<Address>& gradients,
                   const std::vector<std::int64_t>& columns, const std::vector<Address>& state, Address coefficients,
                   bool coefficients_on_device, int num_messages, std::int64_t num_edges, Address row_start,
                   Address neighbor, Address weight, Address gradient_scale) {
  if (gradients.size() != parameters.size() || columns.size() != parameters.size()) {
    throw std::invalid_argument("parameters, gradients and columns must have one entry per segment");
  }
  if (state.size() > gut_fast::cuda::kMaxStates || num_messages < 1 || num_messages > gut_fast::cuda::kMaxMessages) {
    throw std::invalid_argument("no compiled instance for " + std::to_string(state.size()) + " states and " +
                                std::to_string(num_messages) + " messages");
  }
  StepArgs step{device,
                pointer<void>(stream),
                dtype,
                state_dtype,
                num_messages,
                pointer<const double>(coefficients),
                coefficients_on_device,
                num_agents,
                num_edges,
                pointer<const std::int64_t>(row_start),
                pointer<const std::int64_t>(neighbor),
                pointer<const double>(weight),
                pointer<const double>(gradient_scale),
                pointers(state),
                {}};
  for (std::size_t k = 0; k < parameters.size(); ++k) {
    step.tensors.push_back({pointer<void>(parameters[k]), pointer<const void>(gradients[k]), columns[k]});
  }
  return step;
}

Rows make_rows(const StepArgs& step, Element dtype, std::int64_t num_rows, const std::vector<Address>& addresses,
               Address table) {
  if (num_rows < step.num_agents) throw std::invalid_argument("every agent must have a row of messages");
  const bool few = num_rows <= gut_fast::cuda::kFewRows && !addresses.empty();
  if ((!addresses.empty() && addresses.size() != static_cast<std::size_t>(num_rows)) || (!few && table == 0)) {
    throw std::invalid_argument("rows must have an address each, and more than a few a table on the device");
  }
  return {dtype, num_rows, pointers(addresses), few ? nullptr : pointer<void*>(table)};
}

using Half = void (*)(const StepArgs&, const Rows&);

template <Half half>
void run_half(const StepArgs& step, Element row_dtype, std::int64_t num_rows, const std::vector<Address>& addresses,
              Address table) {
  const Rows made = make_rows(step, row_dtype, num_rows, addresses, table);
  const py::gil_scoped_release release;
  half(step, made);
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "The compiled CUDA kernels of gut_fast. Addresses are not checked here; use gut_fast.kernels.ops.";
  module.attr("MAX_STATES") = gut_fast::cuda::kMaxStates;
  module.attr("MAX_MESSAGES") = gut_fast::cuda::kMaxMessages;
  module.attr("FEW_ROWS") = gut_fast::cuda::kFewRows;
  py::enum_<Element>(module, "DType", py::module_local())
      .value("float32", Element::float32)
      .value("float64", Element::float64)
      .value("bfloat16", Element::bfloat16)
      .value("float16", Element::float16);
  py::class_<StepArgs>(module, "Step", py::module_local())
      .def(py::init(&make_step), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("state_dtype"),
           py::arg("num_agents"), py::arg("parameters"), py::arg("gradients"), py::arg("columns"), py::arg("state"),
           py::arg("coefficients"), py::arg("coefficients_on_device"), py::arg("num_messages"), py::arg("num_edges"),
           py::arg("row_start"), py::arg("neighbor"), py::arg("weight"), py::arg("gradient_scale"));
  module.def("refusal", &gut_fast::cuda::refusal, py::arg("device"));
  module.def("fits", &gut_fast::cuda::fits, py::arg("device"), py::arg("dtype"), py::arg("num_messages"),
             py::arg("num_agents"));
  module.def("gossip_step", &gut_fast::cuda::gossip_step, py::arg("step"), py::call_guard<py::gil_scoped_release>());
  const auto def_half = [&](const char* name, auto function) {
    module.def(name, function, py::arg("step"), py::arg("row_dtype"), py::arg("num_rows"), py::arg("addresses"),
               py::arg("table"));
  };
  def_half("message", &run_half<gut_fast::cuda::send>);
  def_half("combine", &run_half<gut_fast::cuda::combine>);
}
