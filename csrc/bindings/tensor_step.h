// The tensors of a step, read through DLPack's C exchange API: no libtorch, 30 ns a tensor.
//
// Everything is read and checked anew for every step, so nothing can have changed unseen since the last one.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "gossip_step.h"

namespace gut_fast::bindings {

namespace py = pybind11;

// The part of DLPack's binary interface (version 1.3) that is used here.
namespace dlpack {

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;

  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

constexpr DataType kInt64{0, 64, 1}, kFloat32{2, 32, 1}, kFloat64{2, 64, 1}, kBfloat16{4, 16, 1};

struct Device {
  std::int32_t type, id;

  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

constexpr Device kCpu{1, 0};

struct Tensor {
  char* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major, minor;
  const void* previous;
  void* owning_functions[3];
  int (*borrow)(void* object, Tensor* out);  // 0, or -1 with a Python error set
};

}  // namespace dlpack

// Thrown for tensors that the caller has to look at more closely; never leaves this file.
struct NotPlain {};

inline void require(bool condition) {
  if (!condition) throw NotPlain{};
}

// Reads dense, contiguous tensors of the given Python types (subclasses may compute elsewhere).
class TensorReader {
 public:
  // None where the interface is of another version.
  static std::optional<TensorReader> make(const py::capsule& exchange_api, std::vector<py::type> types) {
    const auto* api = exchange_api.get_pointer<dlpack::ExchangeApi>();
    if (api->major != 1 || api->borrow == nullptr) return std::nullopt;
    return TensorReader(api, std::move(types));
  }

  dlpack::Tensor read(py::handle object) const {
    const auto type = py::type::handle_of(object);
    require(std::any_of(types_.begin(), types_.end(), [&](const py::type& known) { return known.is(type); }));
    dlpack::Tensor tensor;
    if (api_->borrow(object.ptr(), &tensor) != 0) {
      PyErr_Clear();
      throw NotPlain{};
    }
    std::int64_t length = 1;
    bool empty = false;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      require(tensor.shape[d] == 1 || tensor.strides[d] == length);
      length *= std::max<std::int64_t>(tensor.shape[d], 1);
      empty = empty || tensor.shape[d] == 0;
    }
    require(empty || tensor.data != nullptr);  // null where the storage has been freed
    tensor.data += tensor.byte_offset;
    return tensor;
  }

  // The data of a tensor of one dimension.
  template <typename T>
  T* row(py::handle object, dlpack::DataType dtype, std::int64_t length, dlpack::Device device) const {
    const auto tensor = read(object);
    require(tensor.dtype == dtype && tensor.device == device && tensor.ndim == 1 && tensor.shape[0] == length);
    return reinterpret_cast<T*>(tensor.data);
  }

 private:
  TensorReader(const dlpack::ExchangeApi* api, std::vector<py::type> types) : api_(api), types_(std::move(types)) {}

  const dlpack::ExchangeApi* api_;
  std::vector<py::type> types_;
};

// Parameters [N, ...], or of one agent [...], of one type and device, each with a gradient of its shape or None, and
// flat buffers of state.
class SegmentTensors {
 public:
  SegmentTensors(const TensorReader& reader, std::int64_t num_agents, const py::list& parameters, const py::list& state,
                 const py::list& gradients) {
    require(!parameters.empty() && parameters.size() == gradients.size());
    const auto first = reader.read(*parameters.begin());
    device = first.device;
    dtype = state_dtype = first.dtype;
    segments.reserve(parameters.size());
    auto gradient = gradients.begin();
    std::int64_t num_elements = 0;
    for (const auto& object : parameters) {
      const auto parameter = reader.read(object);
      require(parameter.dtype == dtype && parameter.device == device);
      require(num_agents == 1 || (parameter.ndim > 0 && parameter.shape[0] == num_agents));
      const auto* end = parameter.shape + parameter.ndim;
      const auto numbers = std::accumulate(parameter.shape, end, std::int64_t{1}, std::multiplies<>{});
      const auto* data = gradient_like(reader, parameter, *gradient++);
      segments.push_back({parameter.data, data, numbers / num_agents, num_elements});
      num_elements += numbers;
    }
    if (!state.empty()) state_dtype = reader.read(*state.begin()).dtype;
    for (const auto& buffer : state) {
      buffers.push_back(reader.row<void>(buffer, state_dtype, num_elements, device));
    }
  }

  dlpack::Device device;
  dlpack::DataType dtype, state_dtype;
  std::vector<Segment> segments;
  std::vector<void*> buffers;

 private:
  static const void* gradient_like(const TensorReader& reader, const dlpack::Tensor& parameter, py::handle object) {
    if (object.is_none()) return nullptr;
    const auto gradient = reader.read(object);
    require(gradient.dtype == parameter.dtype && gradient.device == parameter.device);
    require(gradient.ndim == parameter.ndim);
    require(std::equal(parameter.shape, parameter.shape + parameter.ndim, gradient.shape));
    return gradient.data;
  }
};

// The arguments of one step on the CPU. The tensors must stay alive and as they are until it has run.
class TensorStep {
 public:
  TensorStep(const TensorReader& reader, const py::list& parameters, const py::list& state, const py::list& gradients,
             py::handle coefficients, int num_messages, py::handle row_start, py::handle neighbor, py::handle weight,
             py::handle grad_scale)
      : mixing_(mixing_of(reader, row_start, neighbor, weight)),
        tensors_(reader, mixing_.num_agents, parameters, state, gradients) {
    require(num_messages > 0 && tensors_.device == dlpack::kCpu);
    const std::int64_t q = static_cast<std::int64_t>(state.size());
    const std::int64_t numbers = num_messages * (q + 2) + (q + 1) * (q + 2) + 2 * (q + 1) * num_messages;
    args_ = {storage(tensors_.dtype),
             storage(tensors_.state_dtype),
             static_cast<int>(q),
             num_messages,
             reader.row<double>(coefficients, dlpack::kFloat64, numbers, dlpack::kCpu),
             mixing_,
             grad_scale.is_none() ? nullptr
                                  : reader.row<double>(grad_scale, dlpack::kFloat64, mixing_.num_agents, dlpack::kCpu),
             tensors_.buffers.data(),
             tensors_.segments.data(),
             static_cast<std::int64_t>(tensors_.segments.size())};
  }
  TensorStep(const TensorStep&) = delete;

  const StepArgs& args() const { return args_; }

  static DType storage(dlpack::DataType dtype) {
    if (dtype == dlpack::kFloat64) return DType::float64;
    if (dtype == dlpack::kBfloat16) return DType::bfloat16;
    require(dtype == dlpack::kFloat32);
    return DType::float32;
  }

 private:
  static Mixing mixing_of(const TensorReader& reader, py::handle row_start, py::handle neighbor, py::handle weight) {
    const auto starts = reader.read(row_start);
    require(starts.dtype == dlpack::kInt64 && starts.device == dlpack::kCpu);
    require(starts.ndim == 1 && starts.shape[0] >= 2);
    const auto num_agents = starts.shape[0] - 1;
    const auto* first = reinterpret_cast<const std::int64_t*>(starts.data);
    const auto num_edges = first[num_agents];
    return {num_agents, num_edges, first, reader.row<std::int64_t>(neighbor, dlpack::kInt64, num_edges, dlpack::kCpu),
            reader.row<double>(weight, dlpack::kFloat64, num_edges, dlpack::kCpu)};
  }

  Mixing mixing_;
  SegmentTensors tensors_;
  StepArgs args_{};
};

// Rows of messages for the split form of a step, None for agents that send nothing, and of residuals, if there are any.
class RowTensors {
 public:
  RowTensors(const TensorReader& reader, const StepArgs& args, const py::list& rows, const py::list& residuals) {
    const auto* end = args.segments + args.num_segments;
    const auto length = std::accumulate(args.segments, end, std::int64_t{0},
                                        [](auto sum, const Segment& segment) { return sum + segment.columns; });
    const auto exact = args.dtype == DType::float64 ? dlpack::kFloat64 : dlpack::kFloat32;
    const auto numbers = args.num_messages * length, num_agents = args.mixing.num_agents;
    auto dtype = exact;
    for (const auto& row : rows) {
      if (!row.is_none()) dtype = reader.read(row).dtype;
    }
    for (const auto& row : rows) rows_.push_back(data(reader, row, dtype, numbers));
    const auto num_rows = static_cast<std::int64_t>(rows_.size());
    require(num_rows >= num_agents && std::count(rows_.begin() + num_agents, rows_.end(), nullptr) == 0);
    for (const auto& row : residuals) residuals_.push_back(data(reader, row, exact, numbers));
    const bool is_rounded = dtype == dlpack::kBfloat16 && exact == dlpack::kFloat32;
    require(dtype == exact || is_rounded);
    require(residuals_.empty() || (is_rounded && residuals_.size() == rows_.size()));
    for (std::size_t i = 0; i < residuals_.size(); ++i) require(rows_[i] == nullptr || residuals_[i] != nullptr);
    rows_of_step = {TensorStep::storage(dtype), rows_.data(), num_rows, length,
                    residuals_.empty() ? nullptr : residuals_.data()};
  }

  Rows rows_of_step;

 private:
  static void* data(const TensorReader& reader, py::handle row, dlpack::DataType dtype, std::int64_t numbers) {
    return row.is_none() ? nullptr : reader.row<void>(row, dtype, numbers, dlpack::kCpu);
  }

  std::vector<void*> rows_, residuals_;
};

}  // namespace gut_fast::bindings
