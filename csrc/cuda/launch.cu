// Launches: a step's tensors become tables of segments, one launch for each table.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/instances.h"
#include "cuda/kernel.h"
#include "cuda/plan.h"

namespace gut_fast::cuda {

namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("CUDA refused " + what + ": " + cudaGetErrorString(error));
}

// Makes a device current, and puts back the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "to tell the current device");
    check(cudaSetDevice(device), "device " + std::to_string(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "to describe device " + std::to_string(device));
  return value;
}

Device describe(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

std::int64_t arithmetic_size(Element element) { return element == Element::float64 ? 8 : 4; }

Problem problem_of(const StepArgs& step, Kind kind, std::int64_t num_rows) {
  return {kind,
          static_cast<int>(step.state.size()),
          step.num_messages,
          arithmetic_size(step.element),
          step.num_agents,
          num_rows,
          step.num_edges};
}

const Instances& instances_of(const StepArgs& step, const Rows* rows) {
  if (step.element == Element::float64) return kFloat64Instances;
  const bool plain = step.element == Element::float32 && step.state_element == Element::float32 &&
                     (rows == nullptr || rows->element == Element::float32);
  return plain ? kFloat32Instances : kMixedInstances;
}

std::int64_t num_coefficients(const StepArgs& step) {
  const std::int64_t K = step.state.size() + 2, L = step.state.size() + 1, M = step.num_messages;
  return M * K + L * K + 2 * L * M;
}

Arguments arguments_of(const StepArgs& step, const Rows* rows, const Plan& plan) {
  Arguments args{};
  args.num_agents = args.num_rows = step.num_agents;
  args.num_edges = step.num_edges;
  for (const Tensor& tensor : step.tensors) args.model_columns += tensor.columns;
  args.row_start = step.row_start;
  args.neighbor = step.neighbor;
  args.weight = step.weight;
  args.gradient_scale = step.gradient_scale;
  if (step.coefficients_on_device) {
    args.device_coefficients = step.coefficients;
  } else {
    std::copy_n(step.coefficients, num_coefficients(step), args.coefficients);
  }
  std::copy(step.state.begin(), step.state.end(), args.state);
  args.element = step.element;
  args.state_element = step.state_element;
  if (rows != nullptr) {
    args.num_rows = rows->num_rows;
    args.row_element = rows->element;
    args.rows = rows->table;
    if (rows->table == nullptr) std::copy(rows->addresses.begin(), rows->addresses.end(), args.few_rows);
    args.mixes_rows = plan.kind != kSend;
  }
  args.tile_columns = plan.tile_columns;
  args.may_be_uniform = plan.may_be_uniform;
  args.layout = plan.layout;
  return args;
}

constexpr int kUpload = 500;

struct Addresses {
  void* at[kUpload];
};

// Addresses travel as a kernel's arguments: a copy from host memory could not be captured, or would have to wait.
__global__ void store_addresses(const __grid_constant__ Addresses addresses, int count, void** table) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) table[i] = addresses.at[i];
}

void fill_table(const Rows& rows, cudaStream_t stream) {
  const auto total = static_cast<int>(rows.addresses.size());
  for (int first = 0; first < total; first += kUpload) {
    Addresses addresses;
    int count = std::min(kUpload, total - first);
    std::copy_n(rows.addresses.begin() + first, count, addresses.at);
    void** table = rows.table + first;
    void* arguments[] = {&addresses, &count, &table};
    check(cudaLaunchKernel(store_addresses, dim3(1), dim3(256), arguments, 0, stream), "to store addresses of rows");
  }
}

template <int capacity>
struct Launcher {
  Kernel<capacity> kernel;
  const Plan& plan;
  const Device& device;
  cudaStream_t stream;
  Launch<capacity> launch;

  // As many tensors as the table holds, from number `first` on; where the next table begins.
  std::size_t run(const std::vector<Tensor>& tensors, std::size_t first, std::int64_t& column) {
    Arguments& args = launch.arguments;
    args.num_tiles = args.num_segments = 0;
    for (; first < tensors.size() && args.num_segments < capacity; ++first) {
      const Tensor& tensor = tensors[first];
      if (tensor.columns == 0) continue;
      launch.segments[args.num_segments++] = {tensor.parameters, tensor.gradients, column, args.num_tiles};
      args.num_tiles += (tensor.columns + plan.tile_columns - 1) / plan.tile_columns;
      column += tensor.columns;
    }
    launch.segments[args.num_segments] = {nullptr, nullptr, column, args.num_tiles};
    if (args.num_tiles > 0) start();
    return first;
  }

  void start() {
    // Blocks that a multiprocessor has no room for wait their turn; more of them would only stage W more often.
    const auto blocks =
        std::min<std::int64_t>(launch.arguments.num_tiles, device.multiprocessors * (2048 / plan.threads));
    const auto check_start = [&](cudaError_t error) {
      if (error == cudaSuccess) return;
      check(error, "to start a step in " + std::to_string(blocks) + " blocks of " + std::to_string(plan.threads) +
                       " threads with " + std::to_string(plan.shared_bytes) + " bytes of shared memory");
    };
    if (plan.shared_bytes > 48 * 1024) {
      // All that there is: with what this step needs, another thread's larger one could come in between and be refused.
      const auto most = static_cast<int>(device.shared_bytes);
      check_start(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    }
    void* arguments[] = {&launch};
    check_start(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(plan.threads)),
                                 arguments, plan.shared_bytes, stream));
  }
};

template <int capacity>
void run(const Families<capacity>& families, const StepArgs& step, const Rows* rows, const Plan& plan,
         const Device& device) {
  Launcher<capacity> launcher{families.of[step.state.size()][step.num_messages - 1].of[plan.kind],
                              plan,
                              device,
                              static_cast<cudaStream_t>(step.stream),
                              {arguments_of(step, rows, plan), {}}};
  std::int64_t column = 0;
  for (std::size_t first = 0; first < step.tensors.size();) first = launcher.run(step.tensors, first, column);
}

void run(const StepArgs& step, const Rows* rows, Kind kind) {
  const DeviceGuard guard(step.device);
  const Device device = describe(step.device);
  if (rows != nullptr && rows->table != nullptr) fill_table(*rows, static_cast<cudaStream_t>(step.stream));
  const auto num_rows = kind == kTiles ? rows->num_rows : step.num_agents;
  const Plan plan = make_plan(problem_of(step, kind, num_rows), device);
  const Instances& instances = instances_of(step, rows);
  if (step.tensors.size() <= kFewSegments) {
    run(instances.few, step, rows, plan, device);
  } else {
    run(instances.many, step, rows, plan, device);
  }
}

}  // namespace

std::string refusal(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, store_addresses), "its kernels on device " + std::to_string(device));
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool fits(int device, Element element, int num_messages, std::int64_t num_agents) {
  return has_tile({kRegisters, 0, num_messages, arithmetic_size(element), num_agents, num_agents, 0}, describe(device));
}

void gossip_step(const StepArgs& step) { run(step, nullptr, kRegisters); }

void send(const StepArgs& step, const Rows& rows) { run(step, &rows, kSend); }

void combine(const StepArgs& step, const Rows& rows) { run(step, &rows, kTiles); }

}  // namespace gut_fast::cuda
