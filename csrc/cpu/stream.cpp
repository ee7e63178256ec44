#include "cpu/stream.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/kernel.h"
#include "cpu/storage.h"
#include "cpu/thread_pool.h"

namespace gut_fast::cpu {
namespace {

template <typename Stored, int Q>
struct Loop {
  using T = typename Stored::Compute;
  using Lane = Lanes<T, 1>;

  static GUT_FAST_INLINE void run(const StepArgs* args, const Segment* segment, std::int64_t begin, std::int64_t end) {
    auto* z = static_cast<typename Stored::Parameter*>(segment->parameters);
    const auto* g = static_cast<const typename Stored::Parameter*>(segment->gradients);
    typename Stored::State* state[Q + 1];
    for (int k = 0; k < Q; ++k) {
      state[k] = static_cast<typename Stored::State*>(args->state[k]) + segment->state_offset;
    }
    GUT_FAST_VECTORIZE
    for (auto i = begin; i < end; ++i) {
      const T gradient = Lane::load(g + i);
      T move = gradient;
      for (int k = 0; k < Q; ++k) {
        const T value = Lane::load(state[k] + i);
        move += value;
        Lane::store(state[k] + i, T(0.5) * value + gradient);
      }
      Lane::store(z + i, Lane::load(z + i) - T(0.01) * move);
    }
  }
};

using RunLoop = void (*)(const StepArgs*, const Segment*, std::int64_t begin, std::int64_t end);

template <typename Tier, typename Stored, int Q>
constexpr RunLoop loop =
    Tier::template run<Loop<Stored, Q>, const StepArgs*, const Segment*, std::int64_t, std::int64_t>;

struct TierLoops {
  const char* tier;
  RunLoop run[kNumStorages][kMaxStates + 1];
};

template <typename Tier, typename... Stored>
constexpr TierLoops tier_loops(List<Stored...>) {
  return {Tier::name,
          {{loop<Tier, Stored, 0>, loop<Tier, Stored, 1>, loop<Tier, Stored, 2>, loop<Tier, Stored, 3>}...}};
}

template <typename... Tiers>
struct Table {
  static constexpr TierLoops entries[] = {tier_loops<Tiers>(Storages{})...};
};

RunLoop select_loop(const StepArgs& args) {
  const int storage = storage_index(args.dtype, args.state_dtype, Storages{});
  if (storage < 0 || args.num_states < 0 || args.num_states > kMaxStates) {
    throw std::invalid_argument("no loop for these dtypes and this number of states");
  }
  const auto& entries = Table<GUT_FAST_TIERS>::entries;
  const auto* mine = std::find_if(std::begin(entries), std::end(entries),
                                  [name = tier()](const TierLoops& entry) { return name == entry.tier; });
  return mine->run[storage][args.num_states];
}

// Every thread takes one run of each segment, as long as the others'.
struct Work {
  const StepArgs* args;
  RunLoop run;
  std::int64_t num_runs;

  static void chunk(void* context, std::int64_t index, int) {
    const Work& work = *static_cast<Work*>(context);
    for (std::int64_t s = 0; s < work.args->num_segments; ++s) {
      const Segment& segment = work.args->segments[s];
      const auto length = segment.columns * work.args->mixing.num_agents;
      work.run(work.args, &segment, length * index / work.num_runs, length * (index + 1) / work.num_runs);
    }
  }
};

}  // namespace

void stream_step(const StepArgs& args, int num_threads) {
  for (std::int64_t s = 0; s < args.num_segments; ++s) {
    if (args.segments[s].gradients == nullptr) throw std::invalid_argument("every segment needs gradients");
  }
  // A few runs a thread, as the step has chunks: who wakes up late finds some left.
  Work work{&args, select_loop(args), num_threads > 1 ? 8 * num_threads : 1};
  parallel_chunks(num_threads, work.num_runs, Work::chunk, &work);
}

}  // namespace gut_fast::cpu
