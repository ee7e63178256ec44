// Launches: a step's segments become tables, one launch for each table.
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

std::int64_t arithmetic_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

const Instances& instances_of(const StepArgs& step, const Rows* rows) {
  if (step.dtype == DType::float64) return kFloat64Instances;
  const bool plain = step.dtype == DType::float32 && step.state_dtype == DType::float32 &&
                     (rows == nullptr || rows->dtype == DType::float32);
  return plain ? kFloat32Instances : kMixedInstances;
}

bool needs_table(const Rows& rows) { return rows.row == nullptr || rows.count > kFewRows; }

Arguments arguments_of(Work work, const StepArgs& step, const Rows* rows, const Place& place, void** table) {
  Arguments args{};
  args.work = work;
  args.dtype = step.dtype;
  args.state_dtype = step.state_dtype;
  args.mixing = step.mixing;
  args.num_rows = work == Work::combine ? rows->count : step.mixing.num_agents;
  args.gradient_scale = step.gradient_scale;
  if (place.coefficients_on_device) {
    args.device_coefficients = step.coefficients;
  } else {
    const auto K = step.num_states + 2, L = step.num_states + 1, M = step.num_messages;
    std::copy_n(step.coefficients, M * K + L * K + 2 * L * M, args.coefficients);
  }
  std::copy_n(step.state, step.num_states, args.state);
  if (rows != nullptr) {
    args.row_dtype = rows->dtype;
    args.model_length = rows->length;
    if (needs_table(*rows)) {
      args.rows = table;
    } else {
      std::copy_n(rows->row, rows->count, args.few_rows);
    }
  }
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

void fill_table(const Rows& rows, void** table, cudaStream_t stream) {
  for (std::int64_t first = 0; first < rows.count; first += kUpload) {
    Addresses addresses;
    int count = static_cast<int>(std::min<std::int64_t>(kUpload, rows.count - first));
    std::copy_n(rows.row + first, count, addresses.at);
    void** part = table + first;
    void* arguments[] = {&addresses, &count, &part};
    check(cudaLaunchKernel(store_addresses, dim3(1), dim3(256), arguments, 0, stream), "to store addresses of rows");
  }
}

struct Launcher {
  Kernel kernel;
  const Plan& plan;
  const Device& device;
  cudaStream_t stream;
  Launch launch;

  // As many segments as the table holds, up to `end`, in one launch; where the next table begins.
  const Segment* run(const Segment* segment, const Segment* end, std::int64_t& column) {
    Arguments& args = launch.arguments;
    args.num_tiles = args.num_entries = 0;
    for (; segment != end && args.num_entries < kMaxSegments; ++segment) {
      if (segment->columns == 0) continue;
      launch.entries[args.num_entries++] = {segment->parameters, segment->gradients, segment->state_offset, column,
                                            args.num_tiles};
      args.num_tiles += (segment->columns + plan.tile_columns - 1) / plan.tile_columns;
      column += segment->columns;
    }
    launch.entries[args.num_entries] = {nullptr, nullptr, 0, column, args.num_tiles};
    if (args.num_tiles > 0) start();
    return segment;
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

void run(Work work, const StepArgs& step, const Rows* rows, const Place& place, void** table) {
  const DeviceGuard guard(place.device);
  const Device device = describe(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  Arguments args = arguments_of(work, step, rows, place, table);
  const Plan plan = make_plan({work, step.num_states, step.num_messages, arithmetic_size(step.dtype),
                               step.mixing.num_agents, args.num_rows, step.mixing.num_edges},
                              device);
  args.tile_columns = plan.tile_columns;
  args.layout = plan.layout;
  const Kernel kernel = instances_of(step, rows).of[step.num_states][step.num_messages - 1][plan.kind];
  if (rows != nullptr && rows->row != nullptr && needs_table(*rows)) fill_table(*rows, table, stream);
  Launcher launcher{kernel, plan, device, stream, {args, {}}};
  const Segment *segment = step.segments, *end = segment + step.num_segments;
  for (std::int64_t column = 0; segment != end;) segment = launcher.run(segment, end, column);
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

bool fits(int device, DType dtype, int num_messages, std::int64_t num_agents) {
  return has_tile({Work::step, 0, num_messages, arithmetic_size(dtype), num_agents, num_agents, 0}, describe(device));
}

void gossip_step(const StepArgs& step, const Place& place) { run(Work::step, step, nullptr, place, nullptr); }

void message(const StepArgs& step, const Rows& rows, const Place& place, void** table) {
  run(Work::message, step, &rows, place, table);
}

void combine(const StepArgs& step, const Rows& rows, const Place& place, void** table) {
  run(Work::combine, step, &rows, place, table);
}

}  // namespace gut_fast::cuda
