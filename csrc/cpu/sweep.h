// The fused step on a range of columns of one segment, for all agents.
//
// The range is cut into tiles. Within a tile the agents' messages are computed in one order, into scratch rows, and the
// agents are mixed in another, `lag` steps later, when the messages of their neighbours are there. The steps of a tile
// go on where those of the one before end, so that every step computes one message and mixes one row in one loop: the
// message waits for memory while the mix works on what is in the cache.
//
// Measured on Zen 3 (512 KiB of L2, one thread, GUT, 272,474 columns; fractions of the ceiling, noise about 0.05):
// - Rows of 4,096 columns: 0.8 on a ring; of 1,024: 0.7. A plain loop that hops between rows of 512 columns reaches
//   0.6 without any mixing, of 4,096 1.0: the hardware's prefetchers need long rows, and few of them at a time.
// - One message and one mix at a time: 0.7 on a 32-torus, 0.66 on 16-complete. All messages that are possible, then all
//   mixes: 0.54 and 0.07.
// - Two of each at a time (six streams from memory instead of three) lose more than they save, except along a path,
//   where the middle row stays in registers: 0.82 on a ring instead of 0.75.
// - Tiles small enough for L1 need a software prefetch of everything, which has fewer lines in flight than the
//   hardware's: 0.45 to 0.55.
// - A short prefetch in the same row (128 columns, into L1): 0.70 to 0.78. The first lines of the next row: +0.03.
#pragma once

#include <cstdint>

#include "cpu/instance.h"
#include "cpu/plan.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// What all ranges of a step share.
struct Plan {
  const StepArgs* args;
  const Schedule* schedule;
  bool reads_gradient;  // false where its coefficients are all zero: plain gossip must not spread a NaN in it
  Loops wide, narrow;
  std::int64_t item;         // bytes of a number that is computed with
  const void* weight;        // Mixing::weight in that type
  const void* coefficients;  // in that type, a set for each agent if there is a gradient scale
  std::int64_t per_agent;    // bytes from one agent's coefficients to the next one's; 0 if all share them
  const void* zeros;         // `tile` zeros: the gradient of who has none
  std::int64_t tile;         // columns
  std::int64_t stride;       // of scratch rows, in numbers
};

// Where agent `row.agent` has its `row.count` columns from `column` on, and its coefficients.
void set_inputs(Row& row, const Plan& plan, const Segment& segment, std::int64_t column);

// Columns [begin, end) of a segment, with this scratch space.
void sweep(const Plan& plan, const Segment& segment, std::int64_t begin, std::int64_t end, void* scratch);

}  // namespace gut_fast::cpu
