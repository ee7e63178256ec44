#include "cpu/plan.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <list>

namespace gut_fast::cpu {
namespace {

// Below so many numbers a step is over before another thread is awake, and no plan matters.
constexpr std::int64_t kAlone = 1 << 16;

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

std::int64_t num_columns(const StepArgs& args) {
  std::int64_t total = 0;
  for (std::int64_t s = 0; s < args.num_segments; ++s) total += args.segments[s].columns;
  return total;
}

const Caches& caches() {
  static const Caches found;
  return found;
}

// What decides how long a step takes, apart from the plan.
using Kind = std::array<std::int64_t, 8>;

// The plans for steps of one kind, tried in turn until each has had its steps: blocks up to the longest that leave a
// cache room for messages, and then variants of the best of them.
class Trial {
 public:
  Trial(const Kind& kind, const Plan& likely, std::int64_t longest) : kind(kind), best_(likely) {
    const auto [block, ahead, fetch, threads] = likely;
    const auto with = [&, ahead = ahead, fetch = fetch, threads = threads](std::int64_t columns) {
      return Plan{std::max(block, std::min(columns, longest)), ahead, fetch, threads};
    };
    start({likely,
           {block / 2, ahead, fetch, threads},
           with(2 * block),
           with(4 * block),
           with(8 * block),
           with(16 * block)});
  }

  const Plan& plan() const { return is_over() ? best_ : plans_[num_steps_ % kTriedPlans]; }

  void took(double seconds) {
    if (is_over()) return;
    auto& shortest = shortest_[num_steps_++ % kTriedPlans];
    shortest = std::min(shortest, seconds);
    if (num_steps_ % (kTriedPlans * kTries) != 0) return;
    const auto best = std::min_element(shortest_.begin(), shortest_.end());
    if (*best < kClearly * shortest_[0]) best_ = plans_[best - shortest_.begin()];
    if (is_over()) return;
    const auto [block, ahead, fetch, threads] = best_;
    start({best_,
           {block, 0, Fetch::none, threads},
           {block, ahead, Fetch::write, threads},
           {block, ahead / 4, Fetch::write, threads},
           {block, 2 * ahead, Fetch::outer, threads},
           {block, ahead, fetch, 1}});
  }

  const Kind kind;

 private:
  using Plans = std::array<Plan, kTriedPlans>;
  static constexpr double kClearly = 0.97;  // of the first plan's time; the rest may be chance

  bool is_over() const { return num_steps_ == kTriedSteps; }

  void start(const Plans& plans) {
    plans_ = plans;
    shortest_.fill(std::numeric_limits<double>::infinity());
  }

  Plan best_;
  Plans plans_;
  std::array<double, kTriedPlans> shortest_;
  int num_steps_ = 0;
};

thread_local std::list<Trial> trials;  // the last one used first
thread_local Trial* tried = nullptr;   // by the last step

Plan tried_plan(const Kind& kind, const Plan& likely, std::int64_t longest) {
  constexpr std::size_t kKept = 64;
  auto found = std::find_if(trials.begin(), trials.end(), [&](const Trial& each) { return each.kind == kind; });
  if (found == trials.end()) {
    if (trials.size() == kKept) trials.pop_back();
    trials.emplace_front(kind, likely, longest);
  } else {
    trials.splice(trials.begin(), trials, found);
  }
  tried = &trials.front();
  return tried->plan();
}

Plan decided(Plan plan, int num_threads, std::int64_t step) {
  if (const Plan* instead = forced.load()) plan = *instead;
  plan.block = std::max(plan.block / step, std::int64_t{1}) * step;
  plan.ahead = std::max(plan.ahead / step, std::int64_t{0}) * step;
  plan.threads = std::max(std::min(plan.threads, num_threads), 1);
  return last = plan;
}

}  // namespace

int useful_threads(const StepArgs& args, int num_threads) {
  return num_columns(args) * args.mixing.num_agents < kAlone ? 1 : num_threads;
}

Plan choose_plan(const StepArgs& args, const Schedule& schedule, int num_threads, std::int64_t itemsize,
                 std::int64_t step) {
  constexpr std::int64_t kFew = 64, kShort = 1 << 10, kLong = 4 << 10;  // agents; bytes of a row in a block
  const auto n = args.mixing.num_agents;
  const auto bytes_of_column = schedule.live_rows(args.num_messages, args.num_states + 1) * itemsize;
  auto block = (n <= kFew ? kShort : kLong) / itemsize;
  if (args.mixing.row_start[n] > 8 * n) {
    // Messages that many others read should stay near.
    const auto room = n <= kFew ? caches().first * 3 / 4 : caches().second / 2;
    block = std::min(block, room / bytes_of_column);
  }
  tried = nullptr;
  Plan plan{block, 2 * kShort / itemsize, Fetch::near, useful_threads(args, num_threads)};
  if (const auto columns = num_columns(args); n * columns >= kAlone && forced.load() == nullptr) {
    plan = tried_plan({n, args.mixing.row_start[n], args.num_states, args.num_messages, static_cast<int>(args.dtype),
                       static_cast<int>(args.state_dtype), columns, num_threads},
                      plan, caches().second / bytes_of_column);
  }
  return decided(plan, num_threads, step);
}

void plan_took(double seconds) {
  if (tried != nullptr) tried->took(seconds);
}

Plan choose_split_plan(const StepArgs& args, std::int64_t num_rows, int num_threads, std::int64_t itemsize,
                       std::int64_t step, std::int64_t unit) {
  constexpr std::int64_t kShort = 1 << 10, kLong = 16 << 10;  // bytes of a row in a block
  // Where one agent is coded, its message and its copy come from memory in turns, and both keep coming if these are
  // short. Memory begins at 32 times the second cache: what systems say of the last one is often wrong.
  const auto bytes = num_columns(args) * itemsize * (args.num_states + 2 + args.num_messages);
  const bool takes_turns = unit > 1 && args.mixing.num_agents == 1 && bytes > 32 * caches().second;
  const auto fitting = takes_turns ? std::int64_t{0} : caches().second / 2 / (num_rows * args.num_messages * itemsize);
  const auto block = std::clamp(fitting, kShort / itemsize, kLong / itemsize);
  return decided({block, 0, Fetch::none, useful_threads(args, num_threads)}, num_threads, std::max(step, unit));
}

void force_plan(const std::optional<Plan>& plan) {
  forced = plan ? new Plan(*plan) : nullptr;  // never freed: a step may be reading the last one
}

Plan last_plan() { return last; }

std::vector<Chunk> make_chunks(const StepArgs& args, int num_threads, std::int64_t block) {
  constexpr std::int64_t kChunksPerThread = 8, kFewest = 2048;  // a shorter row is not worth its beginning
  const auto total = num_columns(args);
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
