// How a step is cut up: the columns of a block, how far ahead memory is fetched, and the chunks that threads claim.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/block.h"
#include "cpu/schedule.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// Bits do not depend on it.
struct Plan {
  std::int64_t block;  // columns
  std::int64_t ahead;  // columns in the order in which rows are read
  Fetch fetch;
  std::int32_t threads;  // at most
};

// How many steps of each kind and size try plans: two rounds of so many plans, each tried so often.
constexpr int kTriedPlans = 6, kTries = 5, kTriedSteps = 2 * kTriedPlans * kTries;

// The plan for the processor at hand, in whole steps of so many columns; or the forced one. The first steps of each
// kind and size that a thread takes try what may be fast, first blocks of several lengths and then other fetches and
// one thread, and the fastest is kept: what a processor pays for each visit to a row, which fetches it likes, and what
// it costs to wake a thread, is not to be read off it.
Plan choose_plan(const StepArgs& args, const Schedule& schedule, int num_threads, std::int64_t itemsize,
                 std::int64_t step);

// The number of threads that are worth their waking up.
int useful_threads(const StepArgs& args, int num_threads);

// Tells how long the step took that this thread planned last.
void plan_took(double seconds);

// The same for the halves of a step, of which `num_rows` rows of each message lie side by side in a block;
// blocks are a multiple of `unit` columns, which is more than 1 if messages are coded.
Plan choose_split_plan(const StepArgs& args, std::int64_t num_rows, int num_threads, std::int64_t itemsize,
                       std::int64_t step, std::int64_t unit);

// Makes all later steps use this plan, or the best one again.
void force_plan(const std::optional<Plan>& plan);

// The plan of this thread's last step; zeros before the first.
Plan last_plan();

struct Chunk {
  const Segment* segment;
  std::int64_t begin, end;  // columns
};

// All segments in chunks, a few per thread: who comes late finds work, and who is delayed leaves some.
std::vector<Chunk> make_chunks(const StepArgs& args, int num_threads, std::int64_t block);

}  // namespace gut_fast::cpu
