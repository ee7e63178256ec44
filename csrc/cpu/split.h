// The halves of a step whose agents are on several ranks, on a range of columns of one segment.
//
// Rows that are sent or have come are written and read where they lie. In the scratch are, for a tile of columns, the
// messages of agents that send nothing elsewhere and, beside such agents, bfloat16 rows widened.
//
// Measured on Zen 3 (AVX2, one thread, GUT, 11.2 million parameters in float32; fractions of the ceiling's bandwidth):
// - One agent, two received rows: `combine` has eight streams, one pass, 0.82; with bfloat16 rows 0.86, in 0.8 of the
//   time. Widening these into the scratch first, a tile at a time, took twice as long.
// - `send` has four streams, 0.64, or five with the lines of its row that are read before they are written, 0.8.
//   Non-temporal stores save those, a fifth of its time, but whoever sends a short row next would not find it in cache.
// - bfloat16 messages with their residuals: 10 ms, where float32 ones take 8.9 and bfloat16 ones without 7.7. Rounding
//   in passes of its own (add, copy, subtract) took 59 ms in all.
// - Prefetching any of the streams in the same row, 128 to 1,024 columns ahead, brings nothing: rows are long, and few.
// - Eight agents of which two send: 0.62, where the fused step, which mixes while it waits for memory, has 0.77.
#pragma once

#include <cstdint>

#include "cpu/sweep.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// Columns per tile, such that its scratch rows stay in the cache.
std::int64_t split_tile(const StepArgs& args, const Rows& rows, std::int64_t itemsize);

// What a half needs where a tile's rows lie `stride` numbers apart: the rows, and a table of where each message is.
std::int64_t split_scratch_bytes(const StepArgs& args, const Rows& rows, std::int64_t stride, std::int64_t itemsize);

void send_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                  void* scratch);

void combine_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                     void* scratch);

}  // namespace gut_fast::cpu
