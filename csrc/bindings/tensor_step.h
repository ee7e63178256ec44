// The tensors of a step, read and checked: the one way into the kernels, of the CPU and of CUDA.
//
// Everything is read anew for every step, so nothing can have changed unseen since the last one. Nothing here says what
// is wrong with a tensor: Python does, more slowly, where it is told that a step cannot be read.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
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

constexpr DataType kInt64{0, 64, 1}, kUInt8{1, 8, 1}, kFloat16{2, 16, 1}, kFloat32{2, 32, 1}, kFloat64{2, 64, 1},
    kBfloat16{4, 16, 1};

struct Device {
  std::int32_t type, id;

  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

constexpr Device kCpu{1, 0};
constexpr std::int32_t kCuda = 2;

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

// Thrown for tensors that the caller has to look at more closely; never leaves a binding.
struct NotPlain {};

inline void require(bool condition) {
  if (!condition) throw NotPlain{};
}

inline DType storage(dlpack::DataType dtype) {
  if (dtype == dlpack::kFloat32) return DType::float32;
  if (dtype == dlpack::kFloat64) return DType::float64;
  if (dtype == dlpack::kFloat16) return DType::float16;
  require(dtype == dlpack::kBfloat16);
  return DType::bfloat16;
}

// A dense, contiguous tensor whose numbers are what lies in memory.
struct PlainTensor {
  char* data;
  dlpack::Device device;
  dlpack::DataType dtype;
  std::int32_t ndim;
  const std::int64_t* shape;
  std::vector<std::int64_t> own_shape;  // where `shape` points, if it is not into the tensor

  std::int64_t numel() const { return std::accumulate(shape, shape + ndim, std::int64_t{1}, std::multiplies<>{}); }
  std::int64_t num_bytes() const { return numel() * dtype.bits / 8; }
  bool is_row(std::int64_t length) const { return ndim == 1 && shape[0] == length; }
  bool has_shape_of(const PlainTensor& other) const {
    return ndim == other.ndim && std::equal(shape, shape + ndim, other.shape);
  }
};

// Reads tensors: through DLPack's C exchange API, without libtorch and in 30 ns, or through their Python attributes.
class TensorReader {
 public:
  // `torch` is the package. PyTorch has the exchange API since 2.10.
  TensorReader(const py::module_& torch, bool through_dlpack)
      : tensor_(torch.attr("Tensor")),
        parameter_(torch.attr("nn").attr("Parameter")),
        is_neg_(tensor_.attr("is_neg")),
        storage_(tensor_.attr("untyped_storage")),
        offset_(tensor_.attr("storage_offset")),
        is_inference_(tensor_.attr("is_inference")),
        in_inference_mode_(torch.attr("is_inference_mode_enabled")) {
    const char* name = "__dlpack_c_exchange_api__";
    if (through_dlpack && py::hasattr(tensor_, name)) {
      const auto* api = py::capsule(tensor_.attr(name)).get_pointer<dlpack::ExchangeApi>();
      if (api->major == 1) borrow_ = api->borrow;
    }
    for (const auto& [type, dtype] : {std::pair{"float32", dlpack::kFloat32},
                                      {"float64", dlpack::kFloat64},
                                      {"bfloat16", dlpack::kBfloat16},
                                      {"float16", dlpack::kFloat16},
                                      {"int64", dlpack::kInt64},
                                      {"uint8", dlpack::kUInt8}}) {
      dtypes_.emplace_back(torch.attr(type), dtype);
    }
  }

  bool reads_dlpack() const { return borrow_ != nullptr; }

  // A subclass may compute elsewhere, a lazily negated tensor has other numbers than its memory, and one that is
  // wrapped, all zero or freed has no memory.
  PlainTensor read(py::handle object) const {
    require(is_tensor(object));
    PlainTensor tensor = borrow_ != nullptr ? borrowed(object) : described(object);
    require(call(is_neg_, object).is(py::handle(Py_False)));
    if (tensor.numel() > 0) {
      const auto before = PyLong_AsLongLong(call(offset_, object).ptr()) * (tensor.dtype.bits / 8);
      const auto there = PyObject_Size(call(storage_, object).ptr());
      if (there < 0) throw py::error_already_set();
      require(tensor.data != nullptr && there >= before + tensor.num_bytes());
    }
    return tensor;
  }

  // A tensor that will be changed: autograd allows it for one made in inference mode only there.
  PlainTensor read_changed(py::handle object) const {
    require(is_tensor(object));
    require(call(is_inference_, object).is(py::handle(Py_False)) || in_inference_mode_().cast<bool>());
    return read(object);
  }

  // The data of a tensor of one dimension.
  template <typename T>
  T* row(py::handle object, dlpack::DataType dtype, std::int64_t length, dlpack::Device device) const {
    const PlainTensor tensor = read(object);
    require(tensor.dtype == dtype && tensor.device == device && tensor.is_row(length));
    return reinterpret_cast<T*>(tensor.data);
  }

 private:
  bool is_tensor(py::handle object) const {
    const auto type = py::type::handle_of(object);
    return type.is(parameter_) || type.is(tensor_);
  }

  PlainTensor borrowed(py::handle object) const {
    dlpack::Tensor tensor;
    if (borrow_(object.ptr(), &tensor) != 0) {
      PyErr_Clear();
      throw NotPlain{};
    }
    std::int64_t length = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      require(tensor.shape[d] == 1 || tensor.strides[d] == length);
      length *= std::max<std::int64_t>(tensor.shape[d], 1);
    }
    return {tensor.data + tensor.byte_offset, tensor.device, tensor.dtype, tensor.ndim, tensor.shape, {}};
  }

  PlainTensor described(py::handle object) const {
    const auto dtype = object.attr("dtype");
    const auto known =
        std::find_if(dtypes_.begin(), dtypes_.end(), [&](const auto& each) { return each.first.is(dtype); });
    require(known != dtypes_.end() && object.attr("is_contiguous")().cast<bool>());
    const bool on_cpu = object.attr("is_cpu").cast<bool>();
    require(on_cpu || object.attr("is_cuda").cast<bool>());
    const auto device =
        on_cpu ? dlpack::kCpu : dlpack::Device{dlpack::kCuda, object.attr("get_device")().cast<std::int32_t>()};
    PlainTensor tensor{reinterpret_cast<char*>(object.attr("data_ptr")().cast<std::uintptr_t>()),
                       device,
                       known->second,
                       0,
                       nullptr,
                       {}};
    for (const auto& size : object.attr("shape")) tensor.own_shape.push_back(size.cast<std::int64_t>());
    tensor.ndim = static_cast<std::int32_t>(tensor.own_shape.size());
    tensor.shape = tensor.own_shape.data();
    return tensor;
  }

  static py::object call(const py::object& method, py::handle object) {
    auto result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(method.ptr(), object.ptr()));
    if (!result) throw py::error_already_set();
    return result;
  }

  py::object tensor_, parameter_, is_neg_, storage_, offset_, is_inference_, in_inference_mode_;
  int (*borrow_)(void*, dlpack::Tensor*) = nullptr;
  std::vector<std::pair<py::object, dlpack::DataType>> dtypes_;
};

// The memory of a step's tensors: what is changed may not also be another's.
class Memory {
 public:
  void reads(const PlainTensor& tensor) { add(tensor, false); }
  void changes(const PlainTensor& tensor) { add(tensor, true); }

  bool is_apart() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const char *any = nullptr, *changed = nullptr;  // where those before end
    for (const Range& range : ranges_) {
      if (range.begin < (range.is_changed ? any : changed)) return false;
      any = std::max(any, range.end);
      if (range.is_changed) changed = std::max(changed, range.end);
    }
    return true;
  }

 private:
  struct Range {
    const char *begin, *end;
    bool is_changed;
  };

  void add(const PlainTensor& tensor, bool is_changed) {
    if (const auto bytes = tensor.num_bytes()) ranges_.push_back({tensor.data, tensor.data + bytes, is_changed});
  }

  std::vector<Range> ranges_;
};

// The arguments of one step, from a GossipStep of gut_fast.kernels.step, which it keeps alive: parameters [N, ...], or
// of one agent [...], of one type and device; a gradient of its parameter's shape, empty or None for each; flat buffers
// of state. The tensors must stay as they are until the step has run.
class TensorStep {
 public:
  TensorStep(const TensorReader& reader, const py::tuple& step) : step_(step) {
    require(step.size() == 9 && py::isinstance<py::int_>(step[4]));
    const auto num_messages = step[4].cast<int>();
    require(num_messages > 0);
    read_segments(reader, step[0], step[2], read_mixing(reader, step[5], step[6], step[7]));
    read_state(reader, step[1]);
    const std::int64_t q = static_cast<std::int64_t>(state_.size());
    const std::int64_t numbers = num_messages * (q + 2) + (q + 1) * (q + 2) + 2 * (q + 1) * num_messages;
    const auto coefficients = reader.read(step[3]);
    require(coefficients.dtype == dlpack::kFloat64 && coefficients.is_row(numbers));
    coefficients_on_device_ = !(coefficients.device == dlpack::kCpu);
    require(!coefficients_on_device_ || coefficients.device == device_);
    const bool is_scaled = !step[8].is_none();
    args_.num_messages = num_messages;
    args_.coefficients = reinterpret_cast<const double*>(coefficients.data);
    args_.gradient_scale =
        is_scaled ? reader.row<double>(step[8], dlpack::kFloat64, args_.mixing.num_agents, device_) : nullptr;
    require(memory_.is_apart());
  }
  TensorStep(const TensorStep&) = delete;

  const StepArgs& args() const { return args_; }
  bool is_on_cpu() const { return device_ == dlpack::kCpu; }
  dlpack::Device device() const { return device_; }
  bool coefficients_on_device() const { return coefficients_on_device_; }
  const Memory& memory() const { return memory_; }

 private:
  std::int64_t read_mixing(const TensorReader& reader, py::handle row_start, py::handle neighbor, py::handle weight) {
    const auto starts = reader.read(row_start), neighbors = reader.read(neighbor);
    require(starts.dtype == dlpack::kInt64 && starts.ndim == 1 && starts.shape[0] >= 2);
    require(neighbors.dtype == dlpack::kInt64 && neighbors.ndim == 1 && neighbors.device == starts.device);
    device_ = starts.device;
    const auto num_agents = starts.shape[0] - 1, num_edges = neighbors.shape[0];
    const auto* row_start_data = reinterpret_cast<const std::int64_t*>(starts.data);
    require(!is_on_cpu() || row_start_data[num_agents] == num_edges);
    args_.mixing = {num_agents, num_edges, row_start_data, reinterpret_cast<const std::int64_t*>(neighbors.data),
                    reader.row<double>(weight, dlpack::kFloat64, num_edges, device_)};
    return num_agents;
  }

  void read_segments(const TensorReader& reader, const py::list& parameters, const py::list& gradients,
                     std::int64_t num_agents) {
    require(!parameters.empty() && parameters.size() == gradients.size());
    segments_.reserve(parameters.size());
    auto gradient = gradients.begin();
    for (const auto& object : parameters) {
      const auto parameter = reader.read_changed(object);
      if (segments_.empty()) dtype_ = parameter.dtype;
      require(parameter.dtype == dtype_ && parameter.device == device_);
      require(num_agents == 1 || (parameter.ndim > 0 && parameter.shape[0] == num_agents));
      memory_.changes(parameter);
      const auto numbers = parameter.numel();
      segments_.push_back(
          {parameter.data, read_gradient(reader, parameter, *gradient++), numbers / num_agents, num_elements_});
      num_elements_ += numbers;
    }
    args_.dtype = args_.state_dtype = storage(dtype_);
    args_.segments = segments_.data();
    args_.num_segments = static_cast<std::int64_t>(segments_.size());
  }

  const void* read_gradient(const TensorReader& reader, const PlainTensor& parameter, py::handle object) {
    if (object.is_none()) return nullptr;
    const auto gradient = reader.read(object);
    require(gradient.dtype == parameter.dtype && gradient.device == parameter.device);
    if (gradient.is_row(0)) return nullptr;
    require(gradient.has_shape_of(parameter));
    memory_.reads(gradient);
    return gradient.data;
  }

  void read_state(const TensorReader& reader, const py::list& state) {
    for (const auto& object : state) {
      const auto buffer = reader.read_changed(object);
      if (state_.empty()) args_.state_dtype = storage(buffer.dtype);
      require(storage(buffer.dtype) == args_.state_dtype && buffer.device == device_ && buffer.is_row(num_elements_));
      memory_.changes(buffer);
      state_.push_back(buffer.data);
    }
    args_.num_states = static_cast<int>(state_.size());
    args_.state = state_.data();
  }

  py::tuple step_;
  dlpack::Device device_;
  dlpack::DataType dtype_;
  bool coefficients_on_device_ = false;
  std::int64_t num_elements_ = 0;
  std::vector<Segment> segments_;
  std::vector<void*> state_;
  Memory memory_;
  StepArgs args_{};
};

// Rows of messages for the split form of a step, None for agents that send nothing.
class RowTensors {
 public:
  RowTensors(const TensorReader& reader, const TensorStep& step, const py::list& rows, bool are_changed) {
    const StepArgs& args = step.args();
    const auto* end = args.segments + args.num_segments;
    const auto length = std::accumulate(args.segments, end, std::int64_t{0},
                                        [](auto sum, const Segment& segment) { return sum + segment.columns; });
    Memory memory = step.memory();
    bool has_dtype = false;
    const DType exact = args.dtype == DType::float64 ? DType::float64 : DType::float32;
    auto dtype = exact;
    const auto data = [&](py::handle object) -> void* {
      if (object.is_none()) return nullptr;
      const auto row = are_changed ? reader.read_changed(object) : reader.read(object);
      const auto own = storage(row.dtype);
      if (!std::exchange(has_dtype, true)) dtype = own;
      require(own == dtype && row.device == step.device());
      require(row.is_row(args.num_messages * length));
      are_changed ? memory.changes(row) : memory.reads(row);
      return row.data;
    };
    const auto num_agents = static_cast<std::size_t>(args.mixing.num_agents);
    for (const auto& row : rows) {
      require(rows_.size() < num_agents || !row.is_none());
      rows_.push_back(data(row));
    }
    require(rows_.size() >= num_agents);
    const bool is_rounded = dtype != exact && dtype != DType::float64 && exact == DType::float32;
    require(dtype == exact || is_rounded);
    require(memory.is_apart());
    rows_of_step = {dtype, rows_.data(), static_cast<std::int64_t>(rows_.size()), length};
  }

  Rows rows_of_step;

 private:
  std::vector<void*> rows_;
};

// The step as a Python object, or None if its tensors are not such that a kernel can be called on them as they are.
inline py::object read_step(const TensorReader& reader, const py::tuple& step) {
  try {
    return py::cast(new TensorStep(reader, step), py::return_value_policy::take_ownership);
  } catch (const NotPlain&) {
  } catch (const py::cast_error&) {
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
  }
  return py::none();
}

}  // namespace gut_fast::bindings
