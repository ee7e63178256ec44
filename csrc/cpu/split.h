// The halves of a step whose agents are on several ranks, on a range of columns of one segment.
//
// Rows that are sent or have come are read and written where they lie. In the scratch are, for a tile of columns, the
// messages of agents that send nothing elsewhere, and bfloat16 rows in the type that is computed in.
#pragma once

#include <cstdint>

#include "cpu/sweep.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// Columns per tile, such that the scratch rows of a tile stay in the cache.
std::int64_t split_tile(const StepArgs& args, const Rows& rows, std::int64_t itemsize);

void send_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end);

void combine_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                     void* scratch);

}  // namespace gut_fast::cpu
