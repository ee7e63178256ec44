// The CUDA kernels as the binding calls them. Everything is only queued on the caller's stream: no call waits for the
// device, allocates on it, or copies to it, so all of them can be captured into a CUDA graph.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/arguments.h"

namespace gut_fast::cuda {

// One parameter tensor of all agents, and its gradient or null.
struct Tensor {
  void* parameters;
  const void* gradients;
  std::int64_t columns;
};

// One step, in place; sizes, types and addresses have been checked. All pointers are the device's, but `coefficients`
// may be the host's: see gossip_step.h for the equations.
struct StepArgs {
  int device;
  void* stream;
  Element element, state_element;
  int num_messages;
  const double* coefficients;
  bool coefficients_on_device;
  std::int64_t num_agents, num_edges;
  const std::int64_t* row_start;
  const std::int64_t* neighbor;
  const double* weight;
  const double* gradient_scale;
  std::vector<void*> state;
  std::vector<Tensor> tensors;
};

// Messages of agents, here and elsewhere, each M x (columns of the whole model) numbers.
struct Rows {
  Element element;
  std::int64_t num_rows;
  std::vector<void*> addresses;  // empty if the table holds them already
  void** table;                  // device memory for the addresses if there are more than kFewRows, else null
};

// Why the kernels cannot run on a device, or nothing: it is older than those they were compiled for, or its driver is.
std::string refusal(int device);

// Whether a step of such agents can be done by `gossip_step`. For others, thousands of them, `send` and `combine` do
// it.
bool fits(int device, Element element, int num_messages, std::int64_t num_agents);

// Each throws std::runtime_error where CUDA refuses, with the reason; nothing has been changed then.
void gossip_step(const StepArgs& step);
void send(const StepArgs& step, const Rows& rows);
void combine(const StepArgs& step, const Rows& rows);

}  // namespace gut_fast::cuda
