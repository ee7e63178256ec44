// gut_fast._core: unpacks tensors, or addresses that Python has checked, releases the GIL, calls the CPU kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "bindings/tensor_step.h"
#include "cpu/kernel.h"
#include "cpu/plan.h"
#include "cpu/stream.h"

namespace py = pybind11;
using gut_fast::DType;
using gut_fast::Segment;
using gut_fast::bindings::NotPlain;
using gut_fast::bindings::RowTensors;
using gut_fast::bindings::SegmentTensors;
using gut_fast::bindings::TensorReader;
using gut_fast::bindings::TensorStep;
using gut_fast::cpu::Fetch;
using gut_fast::cpu::Plan;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls `run` with the step, without the GIL.
template <typename Run>
void with_step(Run run, DType dtype, DType state_dtype, std::int64_t num_agents, const std::vector<Address>& parameters,
               const std::vector<Address>& gradients, const std::vector<std::int64_t>& columns,
               const std::vector<Address>& state, Address coefficients, int num_messages, Address row_start,
               Address neighbor, Address weight, Address gradient_scale) {
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
      {num_agents, pointer<const std::int64_t>(row_start)[num_agents], pointer<const std::int64_t>(row_start),
       pointer<const std::int64_t>(neighbor), pointer<const double>(weight)},
      pointer<const double>(gradient_scale),
      buffers.data(),
      segments.data(),
      static_cast<std::int64_t>(segments.size()),
  };
  const py::gil_scoped_release release;
  run(args);
}

// Calls gossip_step or stream_step: the same arguments, the same streams.
using Step = void (*)(const gut_fast::StepArgs&, int num_threads);

template <Step run>
void step(DType dtype, DType state_dtype, std::int64_t num_agents, const std::vector<Address>& parameters,
          const std::vector<Address>& gradients, const std::vector<std::int64_t>& columns,
          const std::vector<Address>& state, Address coefficients, int num_messages, Address row_start,
          Address neighbor, Address weight, Address gradient_scale, int num_threads) {
  with_step([=](const gut_fast::StepArgs& args) { run(args, num_threads); }, dtype, state_dtype, num_agents, parameters,
            gradients, columns, state, coefficients, num_messages, row_start, neighbor, weight, gradient_scale);
}

// Calls message or combine.
using Half = void (*)(const gut_fast::StepArgs&, const gut_fast::Rows&, int num_threads);

template <Half run>
void half(DType dtype, DType state_dtype, std::int64_t num_agents, const std::vector<Address>& parameters,
          const std::vector<Address>& gradients, const std::vector<std::int64_t>& columns,
          const std::vector<Address>& state, Address coefficients, int num_messages, Address row_start,
          Address neighbor, Address weight, Address gradient_scale, DType row_dtype, const std::vector<Address>& rows,
          const std::vector<Address>& residuals, int num_threads) {
  std::vector<void*> row, residual;
  for (const auto address : rows) row.push_back(pointer<void>(address));
  for (const auto address : residuals) residual.push_back(pointer<void>(address));
  const auto length = std::accumulate(columns.begin(), columns.end(), std::int64_t{0});
  const gut_fast::Rows all{row_dtype, row.data(), static_cast<std::int64_t>(row.size()), length,
                           residual.empty() ? nullptr : residual.data()};
  with_step([&](const gut_fast::StepArgs& args) { run(args, all, num_threads); }, dtype, state_dtype, num_agents,
            parameters, gradients, columns, state, coefficients, num_messages, row_start, neighbor, weight,
            gradient_scale);
}

// Null unless all tensors are such that the kernel can be called on them as they are.
std::unique_ptr<TensorStep> tensor_step(const TensorReader& reader, const py::list& parameters, const py::list& state,
                                        const py::list& gradients, py::handle coefficients, int num_messages,
                                        py::handle row_start, py::handle neighbor, py::handle weight,
                                        py::handle grad_scale) {
  try {
    return std::make_unique<TensorStep>(reader, parameters, state, gradients, coefficients, num_messages, row_start,
                                        neighbor, weight, grad_scale);
  } catch (const NotPlain&) {
    return nullptr;
  }
}

// Whether parameters, state and gradients are as kernels take them, on whatever device.
bool are_plain(const TensorReader& reader, std::int64_t num_agents, const py::list& parameters, const py::list& state,
               const py::list& gradients) {
  try {
    SegmentTensors(reader, num_agents, parameters, state, gradients);
    return true;
  } catch (const NotPlain&) {
    return false;
  }
}

void run_tensors(const TensorStep& step, int num_threads) {
  const py::gil_scoped_release release;
  gut_fast::cpu::gossip_step(step.args(), num_threads);
}

// False, and nothing is done, if the rows are not such that the kernel can be called on them as they are.
template <Half run>
bool half_of_tensors(const TensorStep& step, const TensorReader& reader, const py::list& rows,
                     const py::list& residuals, int num_threads) {
  try {
    const RowTensors tensors(reader, step.args(), rows, residuals);
    const py::gil_scoped_release release;
    run(step.args(), tensors.rows_of_step, num_threads);
    return true;
  } catch (const NotPlain&) {
    return false;
  }
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  module.doc() = "The compiled CPU kernel of gut_fast. Addresses are not checked here; use gut_fast.kernels.ops.";
  module.attr("MAX_STATES") = gut_fast::cpu::kMaxStates;
  module.attr("MAX_MESSAGES") = gut_fast::cpu::kMaxMessages;
  module.attr("CUDA_OPTION") = GUT_FAST_CUDA;
  module.def("available_tiers", &gut_fast::cpu::available_tiers);
  module.def("tier", &gut_fast::cpu::tier);
  module.def("set_tier", &gut_fast::cpu::set_tier, py::arg("name"));
  py::enum_<Fetch>(module, "Fetch")
      .value("none", Fetch::none)
      .value("near", Fetch::near)
      .value("outer", Fetch::outer)
      .value("write", Fetch::write);
  py::class_<Plan>(module, "Plan")
      .def(py::init([](std::int64_t block, std::int64_t ahead, Fetch fetch) {
             constexpr std::int64_t kMost = 1 << 20;
             if (block < 1 || block > kMost || ahead < 0 || ahead > kMost) {
               throw std::invalid_argument("a plan needs 1 <= block <= 2**20 and 0 <= ahead <= 2**20 columns");
             }
             return Plan{block, ahead, fetch};
           }),
           py::arg("block"), py::arg("ahead"), py::arg("fetch"))
      .def_readonly("block", &Plan::block)
      .def_readonly("ahead", &Plan::ahead)
      .def_readonly("fetch", &Plan::fetch);
  module.def("force_plan", &gut_fast::cpu::force_plan, py::arg("plan"));
  module.def("last_plan", &gut_fast::cpu::last_plan);
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
  const auto def_half = [&](const char* name, auto function) {
    module.def(name, function, py::arg("dtype"), py::arg("state_dtype"), py::arg("num_agents"), py::arg("parameters"),
               py::arg("gradients"), py::arg("columns"), py::arg("state"), py::arg("coefficients"),
               py::arg("num_messages"), py::arg("row_start"), py::arg("neighbor"), py::arg("weight"),
               py::arg("gradient_scale"), py::arg("row_dtype"), py::arg("rows"), py::arg("residuals"),
               py::arg("num_threads"));
  };
  def_half("message", &half<gut_fast::cpu::message>);
  def_half("combine", &half<gut_fast::cpu::combine>);
  py::class_<TensorReader>(module, "TensorReader");
  module.def("tensor_reader", &TensorReader::make, py::arg("exchange_api"), py::arg("types"));
  module.def("are_plain", &are_plain, py::arg("reader"), py::arg("num_agents"), py::arg("parameters"), py::arg("state"),
             py::arg("gradients"));
  py::class_<TensorStep>(module, "TensorStep")
      .def("run", &run_tensors, py::arg("num_threads"))
      .def("message", &half_of_tensors<gut_fast::cpu::message>, py::arg("reader"), py::arg("rows"),
           py::arg("residuals"), py::arg("num_threads"))
      .def("combine", &half_of_tensors<gut_fast::cpu::combine>, py::arg("reader"), py::arg("rows"),
           py::arg("residuals"), py::arg("num_threads"));
  module.def("tensor_step", &tensor_step, py::arg("reader"), py::arg("parameters"), py::arg("state"),
             py::arg("gradients"), py::arg("coefficients"), py::arg("num_messages"), py::arg("row_start"),
             py::arg("neighbor"), py::arg("weight"), py::arg("grad_scale"));
}
