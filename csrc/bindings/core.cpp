// gut_fast._core: reads a step's tensors, releases the GIL, calls the CPU kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/code_tensors.h"
#include "bindings/tensor_step.h"
#include "cpu/kernel.h"
#include "cpu/plan.h"
#include "cpu/stream.h"

namespace py = pybind11;
using gut_fast::bindings::EncodingTensors;
using gut_fast::bindings::NotPlain;
using gut_fast::bindings::RowTensors;
using gut_fast::bindings::TensorReader;
using gut_fast::bindings::TensorStep;
using gut_fast::cpu::CodeLayout;
using gut_fast::cpu::Fetch;
using gut_fast::cpu::Plan;

namespace {

void check_cpu(const TensorStep& step) {
  if (!step.is_on_cpu()) throw py::type_error("the CPU kernel was given tensors of another device");
}

template <void (*run)(const gut_fast::StepArgs&, int num_threads)>
void whole(const TensorStep& step, int num_threads) {
  check_cpu(step);
  const py::gil_scoped_release release;
  run(step.args(), num_threads);
}

// False, and nothing is done, if the rows are not such that the kernel can be called on them as they are.
template <void (*run)(const gut_fast::StepArgs&, const gut_fast::Rows&, int num_threads), bool writes_rows>
bool half(const TensorStep& step, const TensorReader& reader, const py::list& rows, int num_threads) {
  check_cpu(step);
  try {
    const RowTensors tensors(reader, step, rows, writes_rows);
    const py::gil_scoped_release release;
    run(step.args(), tensors.rows_of_step, num_threads);
    return true;
  } catch (const NotPlain&) {
    return false;
  }
}

// False, and nothing is done, as in half().
bool encode(const TensorStep& step, const TensorReader& reader, const CodeLayout& layout, const py::list& coded,
            const py::list& copies, const py::list& widths,
            const std::vector<std::pair<std::uint32_t, std::uint32_t>>& keys, std::uint32_t position, int num_threads) {
  check_cpu(step);
  try {
    const EncodingTensors tensors(reader, step, layout, coded, copies, widths, keys, position);
    const py::gil_scoped_release release;
    gut_fast::cpu::encode(step.args(), tensors.encoding, num_threads);
    return true;
  } catch (const NotPlain&) {
    return false;
  }
}

bool decode(const CodeLayout& layout, const TensorReader& reader, py::handle coded, py::handle copy, py::handle own,
            py::handle widths, py::handle distance, int num_threads) {
  try {
    const auto decoding = gut_fast::bindings::read_decoding(reader, layout, coded, copy, own, widths, distance);
    const py::gil_scoped_release release;
    gut_fast::cpu::decode(decoding, num_threads);
    return true;
  } catch (const NotPlain&) {
    return false;
  }
}

Plan make_plan(std::int64_t block, std::int64_t ahead, Fetch fetch, std::int32_t threads) {
  constexpr std::int64_t kMost = 1 << 20;
  if (block < 1 || block > kMost || ahead < 0 || ahead > kMost || threads < 1) {
    throw std::invalid_argument("a plan needs 1 <= block <= 2**20, 0 <= ahead <= 2**20 columns and threads >= 1");
  }
  return Plan{block, ahead, fetch, threads};
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  module.doc() = "The compiled CPU kernel of gut_fast; use gut_fast.kernels.ops.";
  module.attr("TRIED_STEPS") = gut_fast::cpu::kTriedSteps;
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
      .def(py::init(&make_plan), py::arg("block"), py::arg("ahead"), py::arg("fetch"), py::arg("threads"))
      .def_readonly("block", &Plan::block)
      .def_readonly("ahead", &Plan::ahead)
      .def_readonly("fetch", &Plan::fetch)
      .def_readonly("threads", &Plan::threads);
  module.def("force_plan", &gut_fast::cpu::force_plan, py::arg("plan"));
  module.def("last_plan", &gut_fast::cpu::last_plan);
  py::class_<CodeLayout>(module, "CodeLayout")
      .def(py::init<int, bool, std::vector<std::int64_t>, int>(), py::arg("bits"), py::arg("is_modulo"),
           py::arg("columns"), py::arg("num_messages"))
      .def("decode", &decode, py::arg("reader"), py::arg("coded"), py::arg("copy"), py::arg("own"), py::arg("widths"),
           py::arg("distance"), py::arg("num_threads"));
  py::class_<TensorReader>(module, "TensorReader", py::module_local())
      .def(py::init<py::module_, bool>(), py::arg("torch"), py::arg("through_dlpack") = true)
      .def_property_readonly("reads_dlpack", &TensorReader::reads_dlpack)
      .def("read", &gut_fast::bindings::read_step, py::arg("step"));
  py::class_<TensorStep>(module, "TensorStep", py::module_local())
      .def_property_readonly(
          "is_served", [](const TensorStep& step) { return step.is_on_cpu() && gut_fast::cpu::serves(step.args()); })
      .def("run", &whole<gut_fast::cpu::gossip_step>, py::arg("num_threads"))
      .def("stream", &whole<gut_fast::cpu::stream_step>, py::arg("num_threads"))
      .def("message", &half<gut_fast::cpu::message, true>, py::arg("reader"), py::arg("rows"), py::arg("num_threads"))
      .def("combine", &half<gut_fast::cpu::combine, false>, py::arg("reader"), py::arg("rows"), py::arg("num_threads"))
      .def("encode", &encode, py::arg("reader"), py::arg("layout"), py::arg("coded"), py::arg("copies"),
           py::arg("widths"), py::arg("keys"), py::arg("position"), py::arg("num_threads"));
}
