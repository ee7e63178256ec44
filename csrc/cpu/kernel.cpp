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

struct Work {
  Plan plan;
  std::vector<Chunk> chunks;
  char* scratch;
  std::int64_t scratch_bytes;  // per participant

  static void chunk(void* context, std::int64_t index, int participant) {
    const Work& work = *static_cast<Work*>(context);
    const Chunk& chunk = work.chunks[index];
    sweep(work.plan, *chunk.segment, chunk.begin, chunk.end, work.scratch + participant * work.scratch_bytes);
  }
};

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

template <typename T>
void step(const StepArgs& args, int num_threads, const Loops& wide, const Loops& narrow) {
  constexpr std::int64_t kItem = sizeof(T), kPage = 4096;
  const auto schedule = schedule_of(args.mixing);
  const auto tile = tile_columns(args, *schedule, kItem, kBlock);
  const auto stride = tile + kLine / kItem;   // padded, so that rows do not alias in the cache
  const auto rows = schedule->num_slots + 4;  // and the totals of two tiles
  const auto scratch_bytes = round_up(rows * args.num_messages * stride * kItem, kPage);

  const Buffer weight = typed_weights<T>(args.mixing), coefficients = typed_coefficients<T>(args);
  const Buffer zeros = allocate_lines(tile * kItem);
  std::memset(zeros.get(), 0, tile * kItem);
  std::vector<Chunk> chunks = make_chunks(args, num_threads, tile, kBlock);
  num_threads = static_cast<int>(std::min<std::int64_t>(num_threads, std::max<std::int64_t>(chunks.size(), 1)));
  const Buffer scratch = allocate_lines(num_threads * scratch_bytes);
  const auto per_agent = args.gradient_scale ? num_coefficients(args) * kItem : 0;
  Work work{{&args, schedule.get(), reads_gradient(args), wide, narrow, kItem, weight.get(), coefficients.get(),
             per_agent, zeros.get(), tile, stride},
            std::move(chunks),
            static_cast<char*>(scratch.get()),
            scratch_bytes};
  parallel_chunks(num_threads, static_cast<std::int64_t>(work.chunks.size()), Work::chunk, &work);
}

// What the halves of a step share with it, and their rows.
struct Halves {
  Plan plan;
  const Rows* rows;
  std::vector<Chunk> chunks;
  char* scratch;
  std::int64_t scratch_bytes;  // per participant
  bool sends;

  static void chunk(void* context, std::int64_t index, int participant) {
    const Halves& half = *static_cast<Halves*>(context);
    const Chunk& chunk = half.chunks[index];
    if (half.sends) {
      send_columns(half.plan, *half.rows, *chunk.segment, chunk.begin, chunk.end);
    } else {
      combine_columns(half.plan, *half.rows, *chunk.segment, chunk.begin, chunk.end,
                      half.scratch + participant * half.scratch_bytes);
    }
  }
};

template <typename T>
void half(const StepArgs& args, const Rows& rows, bool sends, int num_threads, const Loops& wide, const Loops& narrow) {
  constexpr std::int64_t kItem = sizeof(T), kPage = 4096;
  const auto tile = split_tile(args, rows, kItem);
  const auto stride = tile + kLine / kItem;
  const auto scratch_bytes = sends ? 0 : round_up(rows.count * args.num_messages * stride * kItem, kPage);
  const Buffer weight = typed_weights<T>(args.mixing), coefficients = typed_coefficients<T>(args);
  const Buffer zeros = allocate_lines(tile * kItem);
  std::memset(zeros.get(), 0, tile * kItem);
  std::vector<Chunk> chunks = make_chunks(args, num_threads, tile, kBlock);
  num_threads = static_cast<int>(std::min<std::int64_t>(num_threads, std::max<std::int64_t>(chunks.size(), 1)));
  const Buffer scratch = allocate_lines(num_threads * scratch_bytes);
  const auto per_agent = args.gradient_scale ? num_coefficients(args) * kItem : 0;
  Halves halves{{&args, nullptr, reads_gradient(args), wide, narrow, kItem, weight.get(), coefficients.get(), per_agent,
                 zeros.get(), tile, stride},
                &rows,
                std::move(chunks),
                static_cast<char*>(scratch.get()),
                scratch_bytes,
                sends};
  parallel_chunks(num_threads, static_cast<std::int64_t>(halves.chunks.size()), Halves::chunk, &halves);
}

std::int64_t num_elements(const StepArgs& args) {
  std::int64_t columns = 0;
  for (std::int64_t s = 0; s < args.num_segments; ++s) columns += args.segments[s].columns;
  return columns * args.mixing.num_agents;
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

constexpr std::int64_t kAlone = 1 << 15;  // below this many numbers waking a thread costs more than it brings

void run_half(const StepArgs& args, const Rows& rows, bool sends, int num_threads) {
  const Instance& instance = select_instance(*current_tier().load(), args);
  const int storage = storage_index(args.dtype, args.state_dtype, Storages{});
  if (storage < 0) throw std::invalid_argument("no compiled instance for state of this type beside such parameters");
  const Loops &wide = instance.loops[storage], narrow = narrow_loops(instance, storage);
  if (rows.dtype == DType::bfloat16 ? wide.widen == nullptr
                                    : (rows.dtype == DType::float64) != (args.dtype == DType::float64)) {
    throw std::invalid_argument("no compiled instance for messages of this type beside such parameters");
  }
  if (!sends) check_mixing(args.mixing, rows.count);
  num_threads = num_elements(args) < kAlone ? 1 : std::max(num_threads, 1);
  if (args.dtype == DType::float64) {
    half<double>(args, rows, sends, num_threads, wide, narrow);
  } else {
    half<float>(args, rows, sends, num_threads, wide, narrow);
  }
}

void message(const StepArgs& args, const Rows& rows, int num_threads) { run_half(args, rows, true, num_threads); }

void combine(const StepArgs& args, const Rows& rows, int num_threads) { run_half(args, rows, false, num_threads); }

void gossip_step(const StepArgs& args, int num_threads) {
  const Instance& instance = select_instance(*current_tier().load(), args);
  const int storage = storage_index(args.dtype, args.state_dtype, Storages{});
  if (storage < 0) throw std::invalid_argument("no compiled instance for state of this type beside such parameters");
  num_threads = num_elements(args) < kAlone ? 1 : std::max(num_threads, 1);
  if (args.dtype == DType::float64) {
    step<double>(args, num_threads, instance.loops[storage], narrow_loops(instance, storage));
  } else {
    step<float>(args, num_threads, instance.loops[storage], narrow_loops(instance, storage));
  }
}

}  // namespace gut_fast::cpu
