// How a step is cut up: the order of rows within a tile, the size of tiles, and the chunks that threads claim.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gossip_step.h"

namespace gut_fast::cpu {

// The order in which one tile of columns is computed. In step k of a tile the message of agent message_order[k] goes to
// its scratch row, and in step k + lag agent mix_order[k], whose neighbours' messages are there by then, is mixed and
// stored. The tile after begins at step N. Agents are ordered such that few messages and few rows wait, so that what
// is waiting stays in the cache: a ring of any size needs six scratch rows.
struct Schedule {
  std::vector<std::int32_t> message_order, mix_order;  // [N]
  std::int32_t lag = 0;
  std::vector<std::int32_t> slot[2];           // [N] scratch row of each agent's message, in even and in odd tiles
  std::vector<std::int32_t> neighbor_slot[2];  // parallel to Mixing::neighbor
  std::int32_t num_slots = 0;
  bool uniform = false;  // everybody mixes with all others, with one weight

  // Rows of scratch and rows of parameters or state that wait to be mixed, at any time.
  std::int64_t live_rows(int num_messages, int num_outputs) const {
    return std::int64_t{num_slots} * num_messages + std::int64_t{lag + 2} * num_outputs;
  }
};

// Throws std::invalid_argument if the CSR arrays are not those of a matrix of this size.
// A thread keeps its last schedule for the next call, which in training is about the same mixing matrix.
std::shared_ptr<const Schedule> schedule_of(const Mixing& mixing);

// Columns per tile: a multiple of `block`. Long rows suit the hardware's prefetchers; 4,096 columns were best wherever
// the live rows fit the outer caches (Zen 3, 512 KiB of L2, 32 MiB of L3; fractions of the ceiling): a 32-torus .64,
// .69 and .71 with budgets of .5, 2 and 1 MiB; a random 4-regular graph of 1,024 agents .27, .30, .31, .33 with at
// least 128, 512, 1,024 and 4,096 columns.
std::int64_t tile_columns(const StepArgs& args, const Schedule& schedule, std::int64_t itemsize, std::int64_t block);

// Throws std::invalid_argument if the CSR arrays are not those of the rows of `num_agents` agents whose neighbours are
// among `num_rows`.
void check_mixing(const Mixing& mixing, std::int64_t num_rows);

struct Chunk {
  const Segment* segment;
  std::int64_t begin, end;  // columns
};

// All segments in chunks, a few per thread: who comes late finds work, and who is delayed leaves some.
std::vector<Chunk> make_chunks(const StepArgs& args, int num_threads, std::int64_t tile, std::int64_t block);

}  // namespace gut_fast::cpu
