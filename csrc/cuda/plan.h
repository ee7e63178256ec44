// How a launch is cut: threads and columns of a tile, and what lies in shared memory.
#pragma once

#include <cstddef>

#include "cuda/instances.h"

namespace gut_fast::cuda {

// What a device has.
struct Device {
  int multiprocessors;
  std::int64_t shared_bytes;  // that one block can have
};

struct Problem {
  Work work;
  int num_states, num_messages;
  std::int64_t item_size;  // of the type of arithmetic
  std::int64_t num_agents, num_rows, num_edges;
};

struct Plan {
  Kind kind;
  int threads;
  int tile_columns;
  Layout layout;
  std::size_t shared_bytes;
};

// Whether a tile's messages have room in shared memory.
bool has_tile(const Problem& problem, const Device& device);

Plan make_plan(const Problem& problem, const Device& device);

}  // namespace gut_fast::cuda
