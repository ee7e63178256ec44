// One step on the columns of a chunk, block by block: of all agents together, or one of the halves of a step whose
// agents are on several ranks.
//
// Rows lie where the tensors are. Only the last columns of a tensor, which do not fill the loop's vectors, are copied
// into rows of scratch, and messages that are bfloat16 on their way to other ranks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/block.h"
#include "cpu/pattern.h"
#include "cpu/plan.h"
#include "cpu/schedule.h"
#include "cpu/storage.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// A rule as a loop takes it: A, B, C, E one after the other, padded to the largest shape where the loop serves any
// rule.
struct CompiledRule {
  const Instance* instance;
  bool serves_any;
  std::vector<double> coefficients;
  std::vector<bool> is_of_gradient;
  std::uint64_t zero_bits = 0;

  CompiledRule(const Tier& tier, const StepArgs& args);

  // False where all coefficients of the gradient are zero: plain gossip must not spread a NaN in it.
  bool reads_gradient() const;
};

inline std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory on page boundaries.
class Memory {
 public:
  explicit Memory(std::int64_t bytes) : start_(std::aligned_alloc(4096, round_up(bytes + 1, 4096))) {
    if (start_ == nullptr) throw std::bad_alloc();
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(start_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> start_;
};

// T is the type of arithmetic.
template <typename T>
class Step {
 public:
  // `schedule` is null for the halves, `rows` for a whole step. Blocks are multiples of `unit` columns.
  Step(const StepArgs& args, const Tier& tier, const Schedule* schedule, const Rows* rows, int num_threads,
       std::int64_t unit = 1)
      : args_(args),
        tier_(tier),
        schedule_(schedule),
        rows_(rows),
        rule_(tier, args),
        step_(kVectors * tier.lanes[is_double]),
        plan_(schedule ? choose_plan(args, *schedule, num_threads, sizeof(T), step_)
                       : choose_split_plan(args, rows->count, num_threads, sizeof(T), step_, unit)),
        loop_(rule_.instance->loop[storage_index(args.dtype, args.state_dtype, Storages{})]),
        weight_(args.mixing.num_edges * sizeof(T)),
        coefficients_((args.gradient_scale ? n() : 1) * rule_.coefficients.size() * sizeof(T)),
        zeros_((plan_.block + kPad) * sizeof(T)) {
    const auto* weight = args.mixing.weight;
    std::transform(weight, weight + args.mixing.num_edges, weight_.template as<T>(),
                   [](double each) { return static_cast<T>(each); });
    T* coefficient = coefficients_.template as<T>();
    for (std::int64_t set = 0; set < (args.gradient_scale ? n() : 1); ++set) {
      for (std::size_t i = 0; i < rule_.coefficients.size(); ++i) {
        const double scale = args.gradient_scale && rule_.is_of_gradient[i] ? args.gradient_scale[set] : 1.0;
        *coefficient++ = static_cast<T>(rule_.coefficients[i] * scale);
      }
    }
    std::memset(zeros_.template as<T>(), 0, (plan_.block + kPad) * sizeof(T));
    for (std::int32_t i = 0; rows != nullptr && i < n(); ++i) {
      (rows->row[i] != nullptr ? with_row_ : without_row_).push_back({i, -1});
      everybody_.push_back({i, i});
    }
  }

  const StepArgs& args() const { return args_; }
  const Plan& plan() const { return plan_; }

  // Room for so many threads.
  void make_scratch(int participants) { scratch_.emplace(participants * Layout(*this).bytes); }

  // The whole step.
  void run(const Chunk& chunk, int participant) const {
    Room room(*this, participant);
    Block block = block_of(room);
    for (std::int64_t i = 0; i < n(); ++i) {
      for (int m = 0; m < M(); ++m) room.sent[i * M() + m] = room.message(schedule_->slot[i] * M() + m);
    }
    block.mixed = room.sent;
    const Turn* turns = schedule_->turns.data();
    const Turn *middle = turns + (schedule_->uniform ? n() : 0), *end = turns + schedule_->turns.size();
    each_block(chunk, [&](std::int64_t column, std::int64_t count) {
      enter(block, room, *chunk.segment, column, count);
      if (schedule_->uniform) {
        take(block, turns, middle, 0);
        tier_.sum[is_double]({room.sent, n(), block.columns, M(), &room.total});
        block.total = &room.total;
      }
      take(block, middle, end, middle - turns);
      block.total = nullptr;
      leave(block, room, *chunk.segment, column, count);
    });
  }

  // Computes the messages of the agents that have rows, and changes nothing else.
  void send(const Chunk& chunk, int participant) const {
    Room room(*this, participant);
    Block block = block_of(room);
    block.finishes = false;
    each_block(chunk, [&](std::int64_t column, std::int64_t count) {
      enter(block, room, *chunk.segment, column, count);
      const bool is_direct = rows_->dtype == exact && block.columns == count;
      each_row(with_row_, [&](std::int64_t at, std::int64_t i, int m) {
        room.sent[at] = is_direct ? row(*chunk.segment, i, m, column) : room.message(at);
      });
      take(block, with_row_.data(), with_row_.data() + with_row_.size(), 0);
      if (is_direct) return;
      each_row(with_row_, [&](std::int64_t at, std::int64_t i, int m) {
        store(room.message(at), rows_->dtype, row(*chunk.segment, i, m, column), count);
      });
    });
  }

  // Computes the messages into scratch, and turns them into codes and copies there.
  void encode(const Encoding& encoding, const Chunk& chunk, int participant) const {
    Room room(*this, participant);
    Block block = block_of(room);
    block.finishes = false;
    const auto segment = chunk.segment - args_.segments;
    for (auto first = chunk.begin; first < chunk.end; first += plan_.block) {
      const auto end = std::min(first + plan_.block, chunk.end);
      each_block({chunk.segment, first, end}, [&](std::int64_t column, std::int64_t count) {
        enter(block, room, *chunk.segment, column, count);
        each_row(without_row_,
                 [&](std::int64_t at, std::int64_t, int) { room.sent[at] = room.message(at) + column - first; });
        take(block, without_row_.data(), without_row_.data() + without_row_.size(), 0);
      });
      each_row(without_row_, [&](std::int64_t at, std::int64_t i, int m) {
        auto args = code_args(*encoding.layout, segment, m, first, end - first, encoding.coded[i], encoding.copy[i],
                              encoding.width ? encoding.width[i] : nullptr);
        args.from = room.message(at);
        args.keys = encoding.keys ? encoding.keys + at : nullptr;
        args.position = static_cast<std::uint32_t>(encoding.position + chunk.segment->state_offset / n() + first);
        tier_.encode(args);
      });
    }
  }

  // Mixes the rows as they were sent, with the messages of those agents that have none; in the outputs all messages are
  // computed anew, as what was sent may have been rounded.
  void combine(const Chunk& chunk, int participant) const {
    Room room(*this, participant);
    Block block = block_of(room);
    block.mixed = room.mixed;
    each_block(chunk, [&](std::int64_t column, std::int64_t count) {
      enter(block, room, *chunk.segment, column, count);
      const bool is_direct = rows_->dtype == exact && block.columns == count;
      for (std::int64_t j = 0; j < rows_->count; ++j) {
        for (int m = 0; m < M(); ++m) {
          const auto at = j * M() + m;
          void* const sent = rows_->row[j] ? row(*chunk.segment, j, m, column) : nullptr;
          room.mixed[at] = sent && is_direct ? sent : room.message(at);
          if (sent && !is_direct) load(sent, rows_->dtype, room.message(at), count);
        }
      }
      each_row(without_row_, [&](std::int64_t at, std::int64_t, int) { room.sent[at] = room.message(at); });
      block.finishes = false;
      take(block, without_row_.data(), without_row_.data() + without_row_.size(), 0);
      each_row(everybody_, [&](std::int64_t at, std::int64_t, int m) { room.sent[at] = room.own(m); });
      block.finishes = true;
      take(block, everybody_.data(), everybody_.data() + everybody_.size(), 0);
      leave(block, room, *chunk.segment, column, count);
    });
  }

 private:
  static constexpr bool is_double = sizeof(T) == sizeof(double);
  static constexpr DType exact = is_double ? DType::float64 : DType::float32;
  static constexpr std::int64_t kPad = kLine / sizeof(T);  // between rows of scratch, so that they do not alias

  std::int64_t n() const { return args_.mixing.num_agents; }
  int M() const { return args_.num_messages; }
  int num_inputs() const { return args_.num_states + 2; }
  DType dtype_of(int k) const { return k == 0 || k == num_inputs() - 1 ? args_.dtype : args_.state_dtype; }

  // How a thread's scratch is divided, in rows of numbers and then pointers.
  struct Layout {
    std::int64_t stride, staged_stride, num_messages, num_mixed, bytes;  // a staged number takes no more than a T

    explicit Layout(const Step& step) : stride(step.plan_.block + kPad) {
      staged_stride = step.step_ + kPad;
      num_mixed = step.rows_ ? step.rows_->count * step.M() : 0;
      num_messages = step.rows_ ? num_mixed : step.schedule_->num_slots * step.M();
      const auto numbers = (num_messages + 3 * step.M()) * stride + step.num_inputs() * step.n() * staged_stride;
      const auto pointers = step.n() * step.M() + num_mixed;
      bytes = round_up(numbers * sizeof(T) + pointers * sizeof(void*), 4096);
    }
  };

  // The scratch of one thread.
  struct Room {
    const Layout layout;
    T* start;
    T* staged;
    void** sent;
    void** mixed;
    Total total;

    Room(const Step& step, int participant)
        : layout(step), start(reinterpret_cast<T*>(step.scratch_->template as<char>() + participant * layout.bytes)) {
      staged = message(layout.num_messages + 3 * step.M());
      sent = reinterpret_cast<void**>(staged + step.num_inputs() * step.n() * layout.staged_stride);
      mixed = sent + step.n() * step.M();
      for (int m = 0; m < step.M(); ++m) {
        total.sum[m] = message(layout.num_messages + step.M() + m);
        total.lost[m] = message(layout.num_messages + 2 * step.M() + m);
      }
    }

    T* message(std::int64_t index) const { return start + index * layout.stride; }
    T* own(int m) const { return message(layout.num_messages + m); }
  };

  Block block_of(const Room& room) const {
    Block block{};
    block.num_agents = n();
    block.zeros = zeros_.template as<T>();
    block.gradient_scale = args_.gradient_scale;
    block.coefficients = coefficients_.template as<T>();
    block.per_agent = args_.gradient_scale ? static_cast<std::int64_t>(rule_.coefficients.size()) : 0;
    block.zero_bits = rule_.zero_bits;
    block.num_states = args_.num_states;
    block.num_messages = M();
    block.sent = room.sent;
    block.finishes = true;
    block.row_start = args_.mixing.row_start;
    block.neighbor = args_.mixing.neighbor;
    block.weight = weight_.template as<T>();
    block.message_order = schedule_ ? schedule_->message_order.data() : nullptr;
    block.ahead = plan_.ahead;
    return block;
  }

  void take(Block& block, const Turn* begin, const Turn* end, std::int64_t place) const {
    block.turns = begin;
    block.end = end;
    block.begins_at = place;
    loop_(block);
  }

  // Calls body(column, count) for blocks of whole vectors, and for what is left of the columns.
  template <typename Body>
  void each_block(const Chunk& chunk, const Body& body) const {
    for (auto column = chunk.begin; column < chunk.end; column += plan_.block) {
      const auto count = std::min(plan_.block, chunk.end - column), whole = count / step_ * step_;
      if (whole > 0) body(column, whole);
      if (whole < count) body(column + whole, count - whole);
    }
  }

  template <typename Body>
  void each_row(const std::vector<Turn>& turns, const Body& body) const {
    for (const Turn& turn : turns) {
      for (int m = 0; m < M(); ++m) body(turn.message * M() + m, turn.message, m);
    }
  }

  // Where the agents' columns of input k begin; null is a gradient of zero.
  char* input_at(const Segment& segment, int k, std::int64_t column) const {
    if (k == 0) return static_cast<char*>(segment.parameters) + column * item_size(args_.dtype);
    if (k <= args_.num_states) {
      return static_cast<char*>(args_.state[k - 1]) + (segment.state_offset + column) * item_size(args_.state_dtype);
    }
    if (segment.gradients == nullptr || !rule_.reads_gradient()) return nullptr;
    return static_cast<char*>(const_cast<void*>(segment.gradients)) + column * item_size(args_.dtype);
  }

  // The rows of scratch for input k of a block that does not fill the vectors.
  char* staged(const Room& room, int k, std::int64_t agent) const {
    return reinterpret_cast<char*>(room.staged + (k * n() + agent) * room.layout.staged_stride);
  }

  // Shows the block where its rows are, and brings those that do not fill the vectors into the scratch.
  void enter(Block& block, const Room& room, const Segment& segment, std::int64_t column, std::int64_t count) const {
    block.columns = round_up(count, step_);
    block.fetch = schedule_ && block.columns == count ? plan_.fetch : Fetch::none;
    for (int k = 0; k < num_inputs(); ++k) {
      const int at = rule_.serves_any && k == num_inputs() - 1 ? kMaxInputs - 1 : k;
      const auto item = item_size(dtype_of(k));
      char* const from = input_at(segment, k, column);
      block.input[at] = from ? static_cast<void*>(from) : const_cast<void*>(block.zeros);
      block.pitch[at] = from ? segment.columns : 0;
      if (from == nullptr || block.columns == count) continue;
      for (std::int64_t i = 0; i < n(); ++i) {
        std::memcpy(staged(room, k, i), from + i * segment.columns * item, count * item);
        // What is left over there would decay from block to block, and take a hundred times as long once it is
        // subnormal.
        std::memset(staged(room, k, i) + count * item, 0, (block.columns - count) * item);
      }
      block.input[at] = staged(room, k, 0);
      block.pitch[at] = room.layout.staged_stride * sizeof(T) / item;
    }
  }

  // Brings back what has been computed in the scratch.
  void leave(const Block& block, const Room& room, const Segment& segment, std::int64_t column,
             std::int64_t count) const {
    for (int k = 0; k <= args_.num_states && block.columns != count; ++k) {
      const auto item = item_size(dtype_of(k));
      for (std::int64_t i = 0; i < n(); ++i) {
        std::memcpy(input_at(segment, k, column) + i * segment.columns * item, staged(room, k, i), count * item);
      }
    }
  }

  void load(const void* from, DType dtype, T* to, std::int64_t count) const {
    if (dtype == exact) {
      std::memcpy(to, from, count * sizeof(T));
    } else {
      tier_.widen({from, to, count});
    }
  }

  void store(const T* from, DType dtype, void* to, std::int64_t count) const {
    if (dtype == exact) {
      std::memcpy(to, from, count * sizeof(T));
    } else {
      tier_.narrow({from, to, count});
    }
  }

  void* row(const Segment& segment, std::int64_t agent, int m, std::int64_t column) const {
    const auto of_segment = segment.state_offset / n();  // where it begins in one agent's model
    return static_cast<char*>(rows_->row[agent]) + (m * rows_->length + of_segment + column) * item_size(rows_->dtype);
  }

  const StepArgs& args_;
  const Tier& tier_;
  const Schedule* const schedule_;
  const Rows* const rows_;
  const CompiledRule rule_;
  const std::int64_t step_;  // columns that the loop takes at a time
  const Plan plan_;
  const Loop loop_;
  const Memory weight_, coefficients_, zeros_;
  std::vector<Turn> with_row_, without_row_, everybody_;  // of the halves
  std::optional<Memory> scratch_;
};

}  // namespace gut_fast::cpu
