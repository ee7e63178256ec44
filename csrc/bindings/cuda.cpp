// gut_fast._cuda: unpacks addresses that Python has checked, releases the GIL, queues the CUDA kernels.
//
// Links the CUDA runtime statically and asks the driver for nothing when imported. Its types are its own
// (module_local): the tests import it a second time, compiled for the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernel.h"

namespace py = pybind11;
using gut_fast::DType;
using gut_fast::Rows;
using gut_fast::Segment;
using gut_fast::StepArgs;
using gut_fast::cuda::Place;
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

// The arguments of a step, and the tables that they point to.
struct Step {
  std::vector<Segment> segments;
  std::vector<void*> state;
  StepArgs args;
  Place place;
};

std::unique_ptr<Step> make_step(int device, Address stream, DType dtype, DType state_dtype, std::int64_t num_agents,
                                const std::vector<Address>& parameters, const std::vector<Address>& gradients,
                                const std::vector<std::int64_t>& columns, const std::vector<Address>& state,
                                Address coefficients, bool coefficients_on_device, int num_messages,
                                std::int64_t num_edges, Address row_start, Address neighbor, Address weight,
                                Address gradient_scale) {
  if (gradients.size() != parameters.size() || columns.size() != parameters.size()) {
    throw std::invalid_argument("parameters, gradients and columns must have one entry per segment");
  }
  if (state.size() > gut_fast::cuda::kMaxStates || num_messages < 1 || num_messages > gut_fast::cuda::kMaxMessages) {
    throw std::invalid_argument("no compiled instance for " + std::to_string(state.size()) + " states and " +
                                std::to_string(num_messages) + " messages");
  }
  auto step = std::make_unique<Step>();
  std::int64_t offset = 0;
  for (std::size_t k = 0; k < parameters.size(); offset += num_agents * columns[k++]) {
    step->segments.push_back({pointer<void>(parameters[k]), pointer<const void>(gradients[k]), columns[k], offset});
  }
  step->state = pointers(state);
  step->args = {dtype,
                state_dtype,
                static_cast<int>(state.size()),
                num_messages,
                pointer<const double>(coefficients),
                {num_agents, num_edges, pointer<const std::int64_t>(row_start), pointer<const std::int64_t>(neighbor),
                 pointer<const double>(weight)},
                pointer<const double>(gradient_scale),
                step->state.data(),
                step->segments.data(),
                static_cast<std::int64_t>(step->segments.size())};
  step->place = {device, pointer<void>(stream), coefficients_on_device};
  return step;
}

using Half = void (*)(const StepArgs&, const Rows&, const Place&, void**);

template <Half half>
void run_half(const Step& step, DType row_dtype, std::int64_t num_rows, const std::vector<Address>& addresses,
              Address table) {
  if (num_rows < step.args.mixing.num_agents) throw std::invalid_argument("every agent must have a row of messages");
  const bool few = num_rows <= gut_fast::cuda::kFewRows && !addresses.empty();
  if ((!addresses.empty() && addresses.size() != static_cast<std::size_t>(num_rows)) || (!few && table == 0)) {
    throw std::invalid_argument("rows must have an address each, and more than a few a table on the device");
  }
  const auto rows = pointers(addresses);
  std::int64_t length = 0;
  for (const Segment& segment : step.segments) length += segment.columns;
  const py::gil_scoped_release release;
  half(step.args, {row_dtype, rows.empty() ? nullptr : rows.data(), num_rows, length}, step.place,
       pointer<void*>(table));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "The compiled CUDA kernels of gut_fast. Addresses are not checked here; use gut_fast.kernels.ops.";
  module.attr("MAX_STATES") = gut_fast::cuda::kMaxStates;
  module.attr("MAX_MESSAGES") = gut_fast::cuda::kMaxMessages;
  module.attr("FEW_ROWS") = gut_fast::cuda::kFewRows;
  py::enum_<DType>(module, "DType", py::module_local())
      .value("float32", DType::float32)
      .value("float64", DType::float64)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);
  py::class_<Step>(module, "Step", py::module_local())
      .def(py::init(&make_step), py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("state_dtype"),
           py::arg("num_agents"), py::arg("parameters"), py::arg("gradients"), py::arg("columns"), py::arg("state"),
           py::arg("coefficients"), py::arg("coefficients_on_device"), py::arg("num_messages"), py::arg("num_edges"),
           py::arg("row_start"), py::arg("neighbor"), py::arg("weight"), py::arg("gradient_scale"));
  module.def("refusal", &gut_fast::cuda::refusal, py::arg("device"));
  module.def("fits", &gut_fast::cuda::fits, py::arg("device"), py::arg("dtype"), py::arg("num_messages"),
             py::arg("num_agents"));
  module.def(
      "gossip_step", [](const Step& step) { gut_fast::cuda::gossip_step(step.args, step.place); }, py::arg("step"),
      py::call_guard<py::gil_scoped_release>());
  const auto def_half = [&](const char* name, auto function) {
    module.def(name, function, py::arg("step"), py::arg("row_dtype"), py::arg("num_rows"), py::arg("addresses"),
               py::arg("table"));
  };
  def_half("message", &run_half<gut_fast::cuda::message>);
  def_half("combine", &run_half<gut_fast::cuda::combine>);
}
