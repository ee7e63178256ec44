#include "cpu/kernel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/instance.h"
#include "cpu/plan.h"
#include "cpu/split.h"
#include "cpu/storage.h"
#include "cpu/sweep.h"
#include "cpu/thread_pool.h"

namespace gut_fast::cpu {

extern const TierEntry kBaseline;
#if defined(__x86_64__)
extern const TierEntry kX86V3, kX86V4;
#endif

namespace {

constexpr const TierEntry* kTiers[] = {
#if defined(__x86_64__)
    &kX86V4, &kX86V3,
#endif
    &kBaseline};

std::atomic<const TierEntry*>& current_tier() {
  static std::atomic<const TierEntry*> current{
      *std::find_if(std::begin(kTiers), std::end(kTiers), [](const TierEntry* entry) { return entry->available(); })};
  return current;
}

std::int64_t num_coefficients(const StepArgs& args) {
  const std::int64_t K = args.num_states + 2, L = args.num_states + 1, M = args.num_messages;
  return M * K + L * K + 2 * L * M;
}

// The first instance whose zeros and ones the rule has.
const Instance& select_instance(const TierEntry& tier, const StepArgs& args) {
  const int M = args.num_messages;
  std::uint64_t zeros = 0, ones = 0;
  for (int i = 0; i < num_coefficients(args) && i < 64; ++i) {
    zeros |= static_cast<std::uint64_t>(args.coefficients[i] == 0.0) << i;
    ones |= static_cast<std::uint64_t>(args.coefficients[i] == 1.0) << i;
  }
  for (const Instance* candidate = tier.begin; candidate != tier.end; ++candidate) {
    if (candidate->num_states == args.num_states && candidate->num_messages == M &&
        (candidate->zero_bits & ~zeros) == 0 && (candidate->one_bits & ~ones) == 0) {
      return *candidate;
    }
  }
  throw std::invalid_argument("no compiled instance for " + std::to_string(args.num_states) + " states and " +
                              std::to_string(M) + " messages");
}

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Buffer allocate_lines(std::int64_t bytes) {
  void* memory = std::aligned_alloc(kLine, round_up(std::max<std::int64_t>(bytes, 1), kLine));
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer(memory);
}

template <typename T>
Buffer typed_weights(const Mixing& mixing) {
  const auto count = mixing.row_start[mixing.num_agents];
  Buffer buffer = allocate_lines(count * sizeof(T));
  std::transform(mixing.weight, mixing.weight + count, static_cast<T*>(buffer.get()),
                 [](double weight) { return static_cast<T>(weight); });
  return buffer;
}

bool is_of_gradient(const StepArgs& args, std::int64_t i) {
  const std::int64_t K = args.num_states + 2, L = args.num_states + 1;
  return i < (args.num_messages + L) * K && i % K == K - 1;
}

bool reads_gradient(const StepArgs& args) {
  for (std::int64_t i = 0; i < num_coefficients(args); ++i) {
    if (is_of_gradient(args, i) && args.coefficients[i] != 0.0) return true;
  }
  return false;
}

// The rule's coefficients in the kernel's type; with a gradient scale one set for each agent, the scale folded in.
template <typename T>
Buffer typed_coefficients(const StepArgs& args) {
  const auto size = num_coefficients(args);
  const auto sets = args.gradient_scale ? args.mixing.num_agents : 1;
  Buffer buffer = allocate_lines(sets * size * sizeof(T));
  T* typed = static_cast<T*>(buffer.get());
  for (std::int64_t set = 0; set < sets; ++set) {
    for (std::int64_t i = 0; i < size; ++i) {
      const double scale = args.gradient_scale && is_of_gradient(args, i) ? args.gradient_scale[set] : 1.0;
      typed[set * size + i] = static_cast<T>(args.coefficients[i] * scale);
    }
  }
  return buffer;
}

// The loops of a rule and a storage.
struct Compiled {
  Loops wide, narrow;
};

Compiled compiled_loops(const StepArgs& args) {
  const Instance& instance = select_instance(*current_tier().load(), args);
  const int storage = storage_index(args.dtype, args.state_dtype, Storages{});
  if (storage < 0) throw std::invalid_argument("no compiled instance for state of this type beside such parameters");
  return {instance.loops[storage], narrow_loops(instance, storage)};
}

struct Layout {
  const Schedule* schedule;
  std::int64_t tile, stride, scratch_bytes;  // the last of each participant
};

// Between scratch rows, padded so that they do not alias in the cache.
std::int64_t padded(std::int64_t tile, std::int64_t itemsize) { return tile + kLine / itemsize; }

// Calls columns(plan, chunk, scratch) for all chunks of a step that is computed in type T.
template <typename T, typename Columns>
void run_chunks(const StepArgs& args, const Compiled& compiled, const Layout& layout, int num_threads,
                const Columns& columns) {
  constexpr std::int64_t kItem = sizeof(T), kPage = 4096;
  const Buffer weight = typed_weights<T>(args.mixing), coefficients = typed_coefficients<T>(args);
  const Buffer zeros = allocate_lines(layout.tile * kItem);
  std::memset(zeros.get(), 0, layout.tile * kItem);
  const auto chunks = make_chunks(args, num_threads, layout.tile, kBlock);
  const auto num_chunks = static_cast<std::int64_t>(chunks.size());
  num_threads = static_cast<int>(std::min<std::int64_t>(num_threads, std::max<std::int64_t>(num_chunks, 1)));
  const auto scratch_bytes = round_up(layout.scratch_bytes, kPage);
  const Buffer scratch = allocate_lines(num_threads * scratch_bytes);
  const auto per_agent = args.gradient_scale ? num_coefficients(args) * kItem : 0;
  const Plan plan{&args,           layout.schedule, reads_gradient(args), compiled.wide,
                  compiled.narrow, kItem,           weight.get(),         coefficients.get(),
                  per_agent,       zeros.get(),     layout.tile,          layout.stride};
  auto body = [&](std::int64_t index, int participant) {
    columns(plan, chunks[index], static_cast<char*>(scratch.get()) + participant * scratch_bytes);
  };
  const auto call = [](void* context, std::int64_t index, int participant) {
    (*static_cast<decltype(body)*>(context))(index, participant);
  };
  parallel_chunks(num_threads, num_chunks, call, &body);
}

template <typename T>
void run_step(const StepArgs& args, const Compiled& compiled, int num_threads) {
  const auto schedule = schedule_of(args.mixing);
  const auto tile = tile_columns(args, *schedule, sizeof(T), kBlock), stride = padded(tile, sizeof(T));
  const auto rows = schedule->num_slots + 4;  // and the totals of two tiles
  const auto scratch_bytes = static_cast<std::int64_t>(rows * args.num_messages * stride * sizeof(T));
  run_chunks<T>(args, compiled, {schedule.get(), tile, stride, scratch_bytes}, num_threads,
                [](const Plan& plan, const Chunk& chunk, void* scratch) {
                  sweep(plan, *chunk.segment, chunk.begin, chunk.end, scratch);
                });
}

// `columns` is one of the two of split.h.
template <typename T, typename Columns>
void run_half(const StepArgs& args, const Rows& rows, const Compiled& compiled, int num_threads, Columns columns) {
  const auto tile = split_tile(args, rows, sizeof(T)), stride = padded(tile, sizeof(T));
  const auto scratch_bytes = split_scratch_bytes(args, rows, stride, sizeof(T));
  run_chunks<T>(args, compiled, {nullptr, tile, stride, scratch_bytes}, num_threads,
                [&](const Plan& plan, const Chunk& chunk, void* scratch) {
                  columns(plan, rows, *chunk.segment, chunk.begin, chunk.end, scratch);
                });
}

std::int64_t num_elements(const StepArgs& args) {
  std::int64_t columns = 0;
  for (std::int64_t s = 0; s < args.num_segments; ++s) columns += args.segments[s].columns;
  return columns * args.mixing.num_agents;
}

int useful_threads(const StepArgs& args, int num_threads) {
  constexpr std::int64_t kAlone = 1 << 15;  // below this many numbers waking a thread costs more than it brings
  return num_elements(args) < kAlone ? 1 : std::max(num_threads, 1);
}

template <typename Columns>
void half(const StepArgs& args, const Rows& rows, int num_threads, Columns columns) {
  const Compiled compiled = compiled_loops(args);
  const bool is_double = args.dtype == DType::float64;
  if (rows.dtype != (is_double ? DType::float64 : DType::float32) && (is_double || rows.dtype != DType::bfloat16)) {
    throw std::invalid_argument("no compiled instance for messages of this type beside such parameters");
  }
  num_threads = useful_threads(args, num_threads);
  if (is_double) {
    run_half<double>(args, rows, compiled, num_threads, columns);
  } else {
    run_half<float>(args, rows, compiled, num_threads, columns);
  }
}

}  // namespace

std::vector<std::string> available_tiers() {
  std::vector<std::string> names;
  for (const TierEntry* entry : kTiers) {
    if (entry->available()) names.emplace_back(entry->name);
  }
  return names;
}

std::string tier() { return current_tier().load()->name; }

void set_tier(const std::string& name) {
  for (const TierEntry* entry : kTiers) {
    if (name == entry->name && entry->available()) return current_tier().store(entry);
  }
  std::string message = "instruction tier '" + name + "' is not available here; there are:";
  for (const auto& available : available_tiers()) message += " " + available;
  throw std::invalid_argument(message);
}

void gossip_step(const StepArgs& args, int num_threads) {
  const Compiled compiled = compiled_loops(args);
  num_threads = useful_threads(args, num_threads);
  if (args.dtype == DType::float64) {
    run_step<double>(args, compiled, num_threads);
  } else {
    run_step<float>(args, compiled, num_threads);
  }
}

void message(const StepArgs& args, const Rows& rows, int num_threads) { half(args, rows, num_threads, send_columns); }

void combine(const StepArgs& args, const Rows& rows, int num_threads) {
  check_mixing(args.mixing, rows.count);
  half(args, rows, num_threads, combine_columns);
}

}  // namespace gut_fast::cpu
