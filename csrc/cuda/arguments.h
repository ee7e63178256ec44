// What one launch of a kernel is given, by value: nothing is copied from host memory, so a step never waits for the
// host and can be captured into a CUDA graph as it is.
#pragma once

#include <cstdint>

#include "gossip_step.h"

namespace gut_fast::cuda {

constexpr int kMaxStates = 3, kMaxMessages = 2;  // rules with more states or messages have no compiled instance
constexpr int kMaxCoefficients =
    kMaxMessages * (kMaxStates + 2) + (kMaxStates + 1) * (kMaxStates + 2 + 2 * kMaxMessages);
constexpr int kFewRows = 64;
constexpr int kMaxSegments = 128;  // of one launch, which costs time by the size of what it is given

// The work of a launch: a step, or one of the halves of a step cut in two.
enum class Work : std::int32_t { step, message, combine };

// A segment that a launch works on. Where the next one begins tells how many columns it has.
struct Entry {
  void* parameters;
  const void* gradients;      // null counts as zero
  std::int64_t state_offset;  // as in Segment
  std::int64_t first_column;  // in one agent's whole model
  std::int64_t first_tile;    // of this launch
};

// Where a block keeps what in its shared memory, in bytes; kNowhere for what it does not keep. The coefficients begin.
constexpr std::int32_t kNowhere = -1;
struct Layout {
  std::int32_t row_start, edges;  // W in CSR form
  std::int32_t tile[2];           // messages [rows, M, columns of a tile], of even and odd tiles
};

struct Arguments {
  Work work;
  DType dtype, state_dtype, row_dtype;
  Mixing mixing;
  std::int64_t num_rows;      // of messages: one for each agent, and in `combine` those of agents elsewhere
  std::int64_t model_length;  // of one agent's whole model
  std::int64_t num_tiles;
  const double* gradient_scale;           // [num_agents], or null for ones
  const double* device_coefficients;      // or null for the next
  double coefficients[kMaxCoefficients];  // A [M, q+2], B [q+1, q+2], C [q+1, M], E [q+1, M]
  void* state[kMaxStates];
  void* const* rows;  // [num_rows] of M x model_length numbers each, or null for the next
  void* few_rows[kFewRows];
  std::int32_t num_entries;
  std::int32_t tile_columns;  // a power of two, in whole vectors
  Layout layout;
};

struct Launch {
  Arguments arguments;
  Entry entries[kMaxSegments + 1];  // the last one marks where the others end
};
static_assert(sizeof(Launch) <= 32764, "more than a kernel's arguments may hold");

// A thread has 64 registers in a block of 1024, 128 in one of 512; what does not fit them would spill to memory.
constexpr int kTileThreads = 512;
constexpr int max_threads(int num_states, int num_messages) { return num_states + 2 * num_messages < 5 ? 1024 : 512; }

}  // namespace gut_fast::cuda
