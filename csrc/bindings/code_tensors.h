// The tensors of codes, read and checked: see tensor_step.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/tensor_step.h"
#include "cpu/codes.h"

namespace gut_fast::bindings {

// A row on the CPU that may be read, or changed, and lies apart from the others of `memory`.
inline char* code_row(const TensorReader& reader, py::handle object, dlpack::DataType dtype, std::int64_t length,
                      Memory& memory, bool is_changed) {
  const auto row = is_changed ? reader.read_changed(object) : reader.read(object);
  require(row.dtype == dtype && row.device == dlpack::kCpu && row.is_row(length));
  is_changed ? memory.changes(row) : memory.reads(row);
  return row.data;
}

// What ops.encode changes.
class EncodingTensors {
 public:
  EncodingTensors(const TensorReader& reader, const TensorStep& step, const cpu::CodeLayout& layout,
                  const py::list& coded, const py::list& copies, const py::list& widths,
                  const std::vector<std::pair<std::uint32_t, std::uint32_t>>& keys, std::uint32_t position) {
    const StepArgs& args = step.args();
    const auto n = static_cast<std::size_t>(args.mixing.num_agents);
    require(args.dtype != DType::float64 && args.num_messages == layout.num_messages);
    require(args.num_segments == static_cast<std::int64_t>(layout.segments.size()));
    for (std::int64_t s = 0; s < args.num_segments; ++s)
      require(args.segments[s].columns == layout.segments[s].columns);
    require(coded.size() == n && copies.size() == n && widths.size() == (layout.is_modulo ? n : 0));
    require(keys.empty() || keys.size() == n * args.num_messages);
    Memory memory = step.memory();
    for (const auto& row : coded) {
      auto* data = row.is_none() ? nullptr : code_row(reader, row, dlpack::kUInt8, layout.num_bytes(), memory, true);
      coded_.push_back(reinterpret_cast<std::uint8_t*>(data));
    }
    const auto numbers = layout.num_messages * layout.length;
    for (const auto& row : copies) copies_.push_back(floats(reader, row, numbers, memory));
    for (const auto& row : widths) widths_.push_back(floats(reader, row, layout.num_blocks(), memory));
    require(memory.is_apart());
    for (const auto& [first, second] : keys) keys_.push_back({first, second});
    encoding = {&layout,
                coded_.data(),
                copies_.data(),
                widths_.empty() ? nullptr : widths_.data(),
                keys_.empty() ? nullptr : keys_.data(),
                position};
  }

  cpu::Encoding encoding;

 private:
  static float* floats(const TensorReader& reader, py::handle row, std::int64_t length, Memory& memory) {
    return reinterpret_cast<float*>(code_row(reader, row, dlpack::kFloat32, length, memory, true));
  }

  std::vector<std::uint8_t*> coded_;
  std::vector<float*> copies_, widths_;
  std::vector<cpu::CodeKeys> keys_;
};

// What ops.decode reads and changes; `own`, `widths` and `distance` are None but of a modulo code.
inline cpu::Decoding read_decoding(const TensorReader& reader, const cpu::CodeLayout& layout, py::handle coded,
                                   py::handle copy, py::handle own, py::handle widths, py::handle distance) {
  Memory memory;
  const auto numbers = layout.num_messages * layout.length;
  const auto floats = [&](py::handle row, std::int64_t length, bool is_changed) -> float* {
    require(row.is_none() == !layout.is_modulo);
    if (row.is_none()) return nullptr;
    return reinterpret_cast<float*>(code_row(reader, row, dlpack::kFloat32, length, memory, is_changed));
  };
  cpu::Decoding decoding{
      &layout,
      reinterpret_cast<const std::uint8_t*>(code_row(reader, coded, dlpack::kUInt8, layout.num_bytes(), memory, false)),
      reinterpret_cast<float*>(code_row(reader, copy, dlpack::kFloat32, numbers, memory, true)),
      floats(own, numbers, false),
      floats(widths, layout.num_blocks(), false),
      floats(distance, layout.num_blocks(), true)};
  require(memory.is_apart());
  return decoding;
}

}  // namespace gut_fast::bindings
