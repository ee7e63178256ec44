#include "cpu/stream.h"

#include <stdexcept>

#include "cpu/block.h"
#include "cpu/kernel.h"
#include "cpu/storage.h"
#include "cpu/thread_pool.h"

namespace gut_fast::cpu {
namespace {

// Every thread takes one run of each segment, as long as the others'.
struct Work {
  const StepArgs* args;
  void (*run)(const StreamArgs&);
  std::int64_t num_runs;

  static void chunk(void* context, std::int64_t index, int) {
    const Work& work = *static_cast<Work*>(context);
    for (std::int64_t s = 0; s < work.args->num_segments; ++s) {
      const Segment& segment = work.args->segments[s];
      const auto length = segment.columns * work.args->mixing.num_agents;
      work.run({work.args, &segment, length * index / work.num_runs, length * (index + 1) / work.num_runs});
    }
  }
};

}  // namespace

void stream_step(const StepArgs& args, int num_threads) {
  const int storage = storage_index(args.dtype, args.state_dtype, Storages{});
  if (storage < 0 || args.num_states < 0 || args.num_states > kMaxStates) {
    throw std::invalid_argument("no loop for these dtypes and this number of states");
  }
  for (std::int64_t s = 0; s < args.num_segments; ++s) {
    if (args.segments[s].gradients == nullptr) throw std::invalid_argument("every segment needs gradients");
  }
  // A few runs a thread, as the step has chunks: who wakes up late finds some left.
  Work work{&args, current_tier().streams.run[storage][args.num_states], num_threads > 1 ? 8 * num_threads : 1};
  parallel_chunks(num_threads, work.num_runs, Work::chunk, &work);
}

}  // namespace gut_fast::cpu
