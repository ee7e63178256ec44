#include "cpu/plan.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>

namespace gut_fast::cpu {
namespace {

std::atomic<const Plan*> forced{nullptr};  // no lock, which a fork could leave taken in the child
thread_local Plan last{};

// Bytes of a core's caches, as the system says or, where it says nothing, as they commonly are.
struct Caches {
  std::int64_t first = 32 << 10, second = 512 << 10;

  Caches() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    if (const auto bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE); bytes > 0) first = bytes;
    if (const auto bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) second = bytes;
#endif
  }
};

const Caches& caches() {
  static const Caches found;
  return found;
}

Plan decided(Plan plan, std::int64_t step) {
  if (const Plan* instead = forced.load()) plan = *instead;
  plan.block = std::max(plan.block / step, std::int64_t{1}) * step;
  plan.ahead = std::max(plan.ahead / step, std::int64_t{0}) * step;
  return last = plan;
}

}  // namespace

Plan choose_plan(const StepArgs& args, const Schedule& schedule, std::int64_t itemsize, std::int64_t step) {
  constexpr std::int64_t kFew = 64, kShort = 1 << 10, kLong = 4 << 10;  // agents; bytes of a row in a block
  const auto n = args.mixing.num_agents;
  const auto bytes_of_column = schedule.live_rows(args.num_messages, args.num_states + 1) * itemsize;
  auto block = (n <= kFew ? kShort : kLong) / itemsize;
  if (args.mixing.row_start[n] > 8 * n) {
    // Messages that many others read should stay near.
    const auto room = n <= kFew ? caches().first : caches().second / 2;
    block = std::min(block, room / bytes_of_column);
  }
  return decided({block, 2 * kShort / itemsize, Fetch::near}, step);
}

Plan choose_split_plan(const StepArgs& args, std::int64_t num_rows, std::int64_t itemsize, std::int64_t step) {
  const auto rows = num_rows * args.num_messages + (args.num_states + 2) * args.mixing.num_agents;
  const auto fitting = caches().first / (rows * itemsize);
  return decided({std::clamp(fitting, step, std::int64_t{1024}), 0, Fetch::none}, step);
}

void force_plan(const std::optional<Plan>& plan) {
  forced = plan ? new Plan(*plan) : nullptr;  // never freed: a step may be reading the last one
}

Plan last_plan() { return last; }

std::vector<Chunk> make_chunks(const StepArgs& args, int num_threads, std::int64_t block) {
  constexpr std::int64_t kChunksPerThread = 8, kFewest = 2048;  // a shorter row is not worth its beginning
  std::int64_t total = 0;
  for (std::int64_t s = 0; s < args.num_segments; ++s) total += args.segments[s].columns;
  auto length = std::max<std::int64_t>(total, 1);
  if (num_threads > 1) {
    const auto wanted = std::max(total / (num_threads * kChunksPerThread), kFewest);
    length = (wanted + block - 1) / block * block;
  }
  std::vector<Chunk> chunks;
  for (std::int64_t s = 0; s < args.num_segments; ++s) {
    const auto columns = args.segments[s].columns;
    for (std::int64_t begin = 0; begin < columns; begin += length) {
      chunks.push_back({&args.segments[s], begin, std::min(columns, begin + length)});
    }
  }
  return chunks;
}

}  // namespace gut_fast::cpu
