// The CUDA kernels as the binding calls them: the steps of gossip_step.h, on tensors that have been checked. Everything
// is only queued on the caller's stream: no call waits for the device, allocates on it, or copies to it, so all of them
// can be captured into a CUDA graph.
//
// Every row of messages must be there (Rows::row holds no null); the binding's caller rounds.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/arguments.h"

namespace gut_fast::cuda {

// Where a step runs.
struct Place {
  int device;
  void* stream;
  bool coefficients_on_device;  // StepArgs::coefficients is the device's, not the host's
};

// Why the kernels cannot run on a device, or nothing: it is older than those they were compiled for, or its driver is.
std::string refusal(int device);

// Whether a step of such agents can be done by `gossip_step`. For others, thousands of them, `message` and `combine` do
// it.
bool fits(int device, DType dtype, int num_messages, std::int64_t num_agents);

// Each throws std::runtime_error where CUDA refuses, with the reason; nothing has been changed then.
//
// `table`, in device memory, takes the addresses of more than kFewRows rows, and is not used for fewer. Where Rows::row
// is null it holds the addresses already.
void gossip_step(const StepArgs& step, const Place& place);
void message(const StepArgs& step, const Rows& rows, const Place& place, void** table);
void combine(const StepArgs& step, const Rows& rows, const Place& place, void** table);

}  // namespace gut_fast::cuda
