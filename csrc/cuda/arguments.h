// What one launch of a kernel is given, by value: nothing is copied from host memory, so a step never waits for the
// host and can be captured into a CUDA graph as it is.
#pragma once

#include <cstdint>

namespace gut_fast::cuda {

// How numbers are stored. The half-width ones are computed in float32.
enum class Element : std::int32_t { float32, float64, bfloat16, float16 };

constexpr int kMaxStates = 3, kMaxMessages = 2;  // rules with more states or messages have no compiled instance
constexpr int kMaxCoefficients =
    kMaxMessages * (kMaxStates + 2) + (kMaxStates + 1) * (kMaxStates + 2 + 2 * kMaxMessages);
constexpr int kFewRows = 64;

// One parameter tensor of all agents, [N, columns]. Where the next one begins tells how many columns it has.
struct Segment {
  void* parameters;
  const void* gradients;      // null counts as zero
  std::int64_t first_column;  // in one agent's whole model
  std::int64_t first_tile;    // of this launch
};

// Where a block keeps what in its shared memory, in bytes; kNowhere for what it does not keep. The coefficients begin.
constexpr std::int32_t kNowhere = -1;
struct Layout {
  std::int32_t row_start, edges;  // W in CSR form
  std::int32_t dense;             // W as [rows, agents], for dense graphs
  std::int32_t partial;           // sums over groups of agents, for complete graphs
  std::int32_t tile[2];           // messages [rows, M, columns of a tile], of even and odd tiles
};

struct Arguments {
  std::int64_t num_agents;     // N
  std::int64_t num_rows;       // of messages: N, and in `combine` those of agents elsewhere
  std::int64_t num_edges;      // off-diagonal non-zeros of W
  std::int64_t model_columns;  // of one agent's whole model
  std::int64_t num_tiles;
  const std::int64_t* row_start;
  const std::int64_t* neighbor;
  const double* weight;
  const double* gradient_scale;           // [N], or null for ones
  const double* device_coefficients;      // or null for the next
  double coefficients[kMaxCoefficients];  // A [M, q+2], B [q+1, q+2], C [q+1, M], E [q+1, M]
  void* state[kMaxStates];
  void* const* rows;  // [num_rows] of M x model_columns numbers each, or null for the next
  void* few_rows[kFewRows];
  Element element, state_element, row_element;
  std::int32_t num_segments;
  std::int32_t tile_columns;  // a power of two, in whole vectors
  bool mixes_rows;            // the drift is of `rows`, not of messages computed in this launch
  bool may_be_uniform;        // there are as many edges as in the complete graph
  Layout layout;
};

// A thread has 64 registers in a block of 1024, 128 in one of 512; what does not fit them would spill to memory.
constexpr int kTileThreads = 512;
constexpr int max_threads(int num_states, int num_messages) { return num_states + 2 * num_messages < 5 ? 1024 : 512; }
constexpr int kGroups = 8;  // of agents whose messages are summed side by side in a complete graph

template <int capacity>
struct Launch {
  Arguments arguments;
  Segment segments[capacity + 1];  // the last one marks where the others end
};

// A launch costs time by the size of what it is given, so most models get the small table.
constexpr int kFewSegments = 128, kManySegments = 960;
static_assert(sizeof(Launch<kManySegments>) <= 32764, "more than a kernel's arguments may hold");

// The number of agents and messages whose drift one thread computes at once in a dense graph; a row of the dense W has
// room for whole groups.
constexpr int dense_group(int num_messages) { return num_messages == 1 ? 4 : 2; }

}  // namespace gut_fast::cuda
