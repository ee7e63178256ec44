#include "cpu/kernel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/block.h"
#include "cpu/plan.h"
#include "cpu/schedule.h"
#include "cpu/step.h"
#include "cpu/thread_pool.h"

namespace gut_fast::cpu {

extern const Tier kBaseline;
#if defined(__x86_64__)
extern const Tier kX86V3, kX86V4;
#endif

namespace {

struct Choice {
  const char* name;
  const Tier* tier;
};

// The best first.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = [] {
    std::vector<Choice> found;
#if defined(__x86_64__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) found.push_back({"x86-64-v4", &kX86V4});
    if (v3) found.push_back({"x86-64-v3", &kX86V3});
#endif
    found.push_back({"baseline", &kBaseline});
    return found;
  }();
  return all;
}

std::atomic<const Choice*>& current() {
  static std::atomic<const Choice*> choice{&choices().front()};
  return choice;
}

void check_dtypes(const StepArgs& args) {
  if (storage_index(args.dtype, args.state_dtype, Storages{}) < 0) {
    throw std::invalid_argument("no compiled instance for state of this type beside such parameters");
  }
}

void check_rows(const StepArgs& args, const Rows& rows) {
  const auto exact = args.dtype == DType::float64 ? DType::float64 : DType::float32;
  if (rows.dtype != exact && (exact == DType::float64 || rows.dtype != DType::bfloat16)) {
    throw std::invalid_argument("no compiled instance for messages of this type beside such parameters");
  }
}

// Calls `work` of the step for all chunks.
template <typename T>
using Work = void (Step<T>::*)(const Chunk&, int participant) const;

// Calls body(chunk, participant) for all chunks.
template <typename Body>
void each_chunk(const std::vector<Chunk>& chunks, int num_threads, Body body) {
  auto numbered = [&](std::int64_t index, int participant) { body(chunks[index], participant); };
  const auto call = [](void* context, std::int64_t index, int participant) {
    (*static_cast<decltype(numbered)*>(context))(index, participant);
  };
  parallel_chunks(num_threads, static_cast<std::int64_t>(chunks.size()), call, &numbered);
}

template <typename T, typename Body>
void run_chunks(Step<T>& step, Body body) {
  const auto chunks = make_chunks(step.args(), step.plan().threads, step.plan().block);
  const auto num_chunks = static_cast<std::int64_t>(chunks.size());
  const auto num_threads = static_cast<int>(std::clamp<std::int64_t>(num_chunks, 1, step.plan().threads));
  step.make_scratch(num_threads);
  each_chunk(chunks, num_threads, body);
}

template <typename T>
void run(const StepArgs& args, const Schedule* schedule, const Rows* rows, int num_threads, Work<T> work) {
  Step<T> step(args, current_tier(), schedule, rows, num_threads);
  const auto begin = std::chrono::steady_clock::now();
  run_chunks(step, [&](const Chunk& chunk, int participant) { (step.*work)(chunk, participant); });
  if (schedule) plan_took(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
}

}  // namespace

CompiledRule::CompiledRule(const Tier& tier, const StepArgs& args) {
  const int q = args.num_states, M = args.num_messages;
  if (q > kMaxStates || M > kMaxMessages) {
    throw std::invalid_argument("no compiled instance for " + std::to_string(q) + " states and " + std::to_string(M) +
                                " messages");
  }
  const std::int64_t K = q + 2, L = q + 1, size = M * K + L * K + 2 * L * M;
  std::uint64_t zeros = 0, ones = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    zeros |= static_cast<std::uint64_t>(args.coefficients[i] == 0.0) << i;
    ones |= static_cast<std::uint64_t>(args.coefficients[i] == 1.0) << i;
  }
  // A coefficient that happens to be zero is nothing, not zero times what it multiplies: then any rule's loop serves.
  instance = std::find_if(tier.begin, tier.end - 1, [&](const Instance& each) {
    return each.num_states == q && each.num_messages == M && each.zero_bits == zeros && (each.one_bits & ~ones) == 0;
  });
  serves_any = instance == tier.end - 1;
  const std::int64_t all_K = serves_any ? kMaxInputs : K, all_M = serves_any ? kMaxMessages : M;
  const auto append = [&](std::int64_t rows, std::int64_t all_rows, std::int64_t columns, std::int64_t all_columns,
                          const double* from, bool is_of_inputs) {
    for (std::int64_t row = 0; row < all_rows; ++row) {
      for (std::int64_t column = 0; column < all_columns; ++column) {
        // The gradient is the last input, whatever states are between.
        const bool is_gradient = is_of_inputs && column == all_columns - 1;
        const auto of_rule = is_gradient ? columns - 1 : column;
        const bool has = row < rows && (is_gradient || column < (is_of_inputs ? columns - 1 : columns));
        const double value = has ? from[row * columns + of_rule] : 0.0;
        zero_bits |= static_cast<std::uint64_t>(value == 0.0) << coefficients.size();
        coefficients.push_back(value);
        is_of_gradient.push_back(is_gradient);
      }
    }
    return from + rows * columns;
  };
  const std::int64_t all_L = serves_any ? kMaxStates + 1 : L;
  const double* next = append(M, all_M, K, all_K, args.coefficients, true);
  next = append(L, all_L, K, all_K, next, true);
  next = append(L, all_L, M, all_M, next, false);
  append(L, all_L, M, all_M, next, false);
}

bool CompiledRule::reads_gradient() const {
  for (std::size_t i = 0; i < coefficients.size(); ++i) {
    if (is_of_gradient[i] && coefficients[i] != 0.0) return true;
  }
  return false;
}

std::vector<std::string> available_tiers() {
  std::vector<std::string> names;
  for (const Choice& each : choices()) names.emplace_back(each.name);
  return names;
}

const Tier& current_tier() { return *current().load()->tier; }

std::string tier() { return current().load()->name; }

void set_tier(const std::string& name) {
  for (const Choice& each : choices()) {
    if (name == each.name) return current().store(&each);
  }
  std::string message = "instruction tier '" + name + "' is not available here; there are:";
  for (const auto& available : available_tiers()) message += " " + available;
  throw std::invalid_argument(message);
}

bool serves(const StepArgs& args) {
  return storage_index(args.dtype, args.state_dtype, Storages{}) >= 0 && args.num_states <= kMaxStates &&
         args.num_messages <= kMaxMessages;
}

void gossip_step(const StepArgs& args, int num_threads) {
  check_dtypes(args);
  const auto schedule = schedule_of(args.mixing);
  if (args.dtype == DType::float64) {
    run<double>(args, schedule.get(), nullptr, num_threads, &Step<double>::run);
  } else {
    run<float>(args, schedule.get(), nullptr, num_threads, &Step<float>::run);
  }
}

void message(const StepArgs& args, const Rows& rows, int num_threads) {
  check_dtypes(args);
  check_rows(args, rows);
  if (args.dtype == DType::float64) {
    run<double>(args, nullptr, &rows, num_threads, &Step<double>::send);
  } else {
    run<float>(args, nullptr, &rows, num_threads, &Step<float>::send);
  }
}

void combine(const StepArgs& args, const Rows& rows, int num_threads) {
  check_dtypes(args);
  check_rows(args, rows);
  check_mixing(args.mixing, rows.count);
  if (args.dtype == DType::float64) {
    run<double>(args, nullptr, &rows, num_threads, &Step<double>::combine);
  } else {
    run<float>(args, nullptr, &rows, num_threads, &Step<float>::combine);
  }
}

void encode(const StepArgs& args, const Encoding& encoding, int num_threads) {
  check_dtypes(args);
  if (args.dtype == DType::float64) throw std::invalid_argument("no compiled codes for messages of float64");
  const std::vector<void*> nobody(args.mixing.num_agents, nullptr);  // no message leaves as it is
  const Rows rows{DType::float32, nobody.data(), args.mixing.num_agents, encoding.layout->length};
  Step<float> step(args, current_tier(), nullptr, &rows, num_threads, kCodeBlock);
  run_chunks(step, [&](const Chunk& chunk, int participant) { step.encode(encoding, chunk, participant); });
}

void decode(const Decoding& decoding, int num_threads) {
  const CodeLayout& layout = *decoding.layout;
  StepArgs args{};
  args.segments = layout.segments.data();
  args.num_segments = static_cast<std::int64_t>(layout.segments.size());
  args.mixing.num_agents = 1;
  const auto threads = std::max(useful_threads(args, num_threads), 1);
  const auto decode = current_tier().decode;
  each_chunk(make_chunks(args, threads, kCodeBlock), threads, [&](const Chunk& chunk, int) {
    for (int m = 0; m < layout.num_messages; ++m) {
      const auto segment = chunk.segment - args.segments;
      auto piece = code_args(layout, segment, m, chunk.begin, chunk.end - chunk.begin,
                             const_cast<std::uint8_t*>(decoding.coded), decoding.copy, nullptr);
      if (layout.is_modulo) {
        const auto block = m * layout.blocks + layout.first_block[segment] + chunk.begin / kCodeBlock;
        piece.from = decoding.own + (piece.copy - decoding.copy);
        piece.width = const_cast<float*>(decoding.width) + block;
        piece.distance = decoding.distance + block;
      }
      decode(piece);
    }
  });
}

CodeLayout::CodeLayout(int bits, bool is_modulo, const std::vector<std::int64_t>& columns, int num_messages)
    : bits(bits), is_modulo(is_modulo), num_messages(num_messages) {
  if ((bits != 16 && bits != 8 && bits != 4) || (bits == 16 && is_modulo) || num_messages < 1) {
    throw std::invalid_argument("no such code: " + std::to_string(bits) + " bits");
  }
  for (const auto each : columns) {
    if (each < 0) throw std::invalid_argument("a tensor has " + std::to_string(each) + " columns");
    segments.push_back({nullptr, nullptr, each, length});
    first_block.push_back(blocks);
    first_byte.push_back(bytes);
    length += each;
    blocks += (each + kCodeBlock - 1) / kCodeBlock;
    bytes += bits == 16 ? 2 * each : (each * bits + 31) / 32 * 4;
  }
}

}  // namespace gut_fast::cpu
