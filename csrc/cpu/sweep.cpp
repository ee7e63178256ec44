#include "cpu/sweep.h"

#include <algorithm>

namespace gut_fast::cpu {
namespace {

class Sweep {
 public:
  Sweep(const Plan& plan, const Loops& loops, const Segment& segment, std::int64_t begin, std::int64_t end,
        void* scratch)
      : plan_(plan),
        loops_(loops),
        segment_(segment),
        schedule_(*plan.schedule),
        mixing_(plan.args->mixing),
        parameter_item_(item_size(plan.args->dtype)),
        state_item_(item_size(plan.args->state_dtype)),
        begin_(begin),
        end_(end),
        uniform_(schedule_.uniform && loops.message[kUniform] != nullptr) {
    args_.scratch = scratch;
    args_.stride = plan.stride;
    args_.num_agents = mixing_.num_agents;
  }

  void run() {
    const auto num_tiles = (end_ - begin_ + plan_.tile - 1) / plan_.tile;
    const auto rows = num_tiles * mixing_.num_agents;
    const std::int64_t lag = schedule_.lag;
    for (std::int64_t step = 0; step < rows + lag; ++step) {
      const bool sends = step < rows, mixes = step >= lag;
      if (mixes && step + 1 < rows && is_chain(step)) {
        run_chain(step++, rows);
        continue;
      }
      if (sends) set_row(args_.sent, schedule_.message_order, step);
      if (mixes) set_mixed(step - lag);
      if (sends && mixes && args_.sent.count == args_.mixed.count && loops_.both[kAnyDegree]) {
        args_.num_next = 0;
        set_next(step + 1, rows);
        both_loop()(args_);
      } else {
        if (sends) loops_.message[uniform_ ? kUniform : kAnyDegree](args_);
        if (mixes) loops_.mix[uniform_ ? kUniform : kAnyDegree](args_);
      }
    }
  }

 private:
  void set_row(Row& row, const std::vector<std::int32_t>& order, std::int64_t index) const {
    const auto tile = index / mixing_.num_agents, column = begin_ + tile * plan_.tile;
    row.agent = order[index % mixing_.num_agents];
    row.count = std::min(end_ - column, plan_.tile);
    row.parity = tile & 1;
    set_inputs(row, plan_, segment_, column);
    row.own = scratch(schedule_.slot[row.parity][row.agent]);
    row.first = scratch(schedule_.slot[row.parity][schedule_.message_order[0]]);
    row.total = scratch(schedule_.num_slots + 2 * row.parity);
    row.lost = scratch(schedule_.num_slots + 2 * row.parity + 1);
  }

  void set_mixed(std::int64_t index) {
    set_row(args_.mixed, schedule_.mix_order, index);
    const auto edge = mixing_.row_start[args_.mixed.agent];
    args_.degree = degree(args_.mixed.agent);
    args_.slot = schedule_.neighbor_slot[args_.mixed.parity].data() + edge;
    args_.weight = static_cast<const char*>(plan_.weight) + edge * plan_.item;
  }

  // The rows of the message after this one, whose first lines are fetched beforehand.
  void set_next(std::int64_t index, std::int64_t rows) {
    if (index >= rows) return;
    const auto column = begin_ + index / mixing_.num_agents * plan_.tile;
    const auto offset = schedule_.message_order[index % mixing_.num_agents] * segment_.columns + column;
    args_.next[args_.num_next++] = parameters(offset);
    for (int k = 0; k < plan_.args->num_states; ++k) args_.next[args_.num_next++] = state(k, offset);
    if (reads_gradients()) args_.next[args_.num_next++] = gradients(offset);
  }

  // Whether this step and the next are about three agents in a row: the one mixed now, the one whose message is
  // computed now and who is mixed next, and the one whose message is computed next, each mixing with just those beside.
  bool is_chain(std::int64_t step) const {
    const auto n = mixing_.num_agents, mix = step - schedule_.lag;
    if (loops_.chain == nullptr || plan_.per_agent != 0 || step / n != (mix + 1) / n || step / n != (step + 1) / n ||
        step / n != mix / n) {
      return false;
    }
    const auto mixed = schedule_.mix_order[mix % n], sent = schedule_.message_order[step % n];
    const auto after = schedule_.message_order[(step + 1) % n];
    const auto* of_mixed = mixing_.neighbor + mixing_.row_start[mixed];
    const auto* of_sent = mixing_.neighbor + mixing_.row_start[sent];
    return schedule_.mix_order[(mix + 1) % n] == sent && degree(mixed) == 2 && degree(sent) == 2 &&
           of_mixed[1] == sent && of_sent[0] == mixed && of_sent[1] == after;
  }

  void run_chain(std::int64_t step, std::int64_t rows) {
    set_row(args_.sent, schedule_.message_order, step);
    set_row(args_.after, schedule_.message_order, step + 1);
    set_mixed(step - schedule_.lag);
    args_.chain_weight = static_cast<const char*>(plan_.weight) + mixing_.row_start[args_.sent.agent] * plan_.item;
    args_.num_next = 0;
    set_next(step + 2, rows);
    set_next(step + 3, rows);
    loops_.chain(args_);
  }

  std::int64_t degree(std::int64_t agent) const { return mixing_.row_start[agent + 1] - mixing_.row_start[agent]; }

  Loop both_loop() const {
    const auto degree = args_.degree;
    const int exact = degree >= 1 && degree <= 4 ? kDegree1 + static_cast<int>(degree) - 1 : int{kAnyDegree};
    const Loop loop = loops_.both[uniform_ ? int{kUniform} : exact];
    return loop ? loop : loops_.both[kAnyDegree];
  }

  bool reads_gradients() const { return plan_.reads_gradient && segment_.gradients != nullptr; }

  void* parameters(std::int64_t offset) const {
    return static_cast<char*>(segment_.parameters) + offset * parameter_item_;
  }

  const void* gradients(std::int64_t offset) const {
    return static_cast<const char*>(segment_.gradients) + offset * parameter_item_;
  }

  void* state(int k, std::int64_t offset) const {
    return static_cast<char*>(plan_.args->state[k]) + (segment_.state_offset + offset) * state_item_;
  }

  void* scratch(std::int64_t slot) const {
    return static_cast<char*>(args_.scratch) + slot * plan_.args->num_messages * plan_.stride * plan_.item;
  }

  const Plan& plan_;
  const Loops& loops_;
  const Segment& segment_;
  const Schedule& schedule_;
  const Mixing& mixing_;
  const std::int64_t parameter_item_, state_item_;
  const std::int64_t begin_, end_;
  const bool uniform_;
  LoopArgs args_{};
};

}  // namespace

void set_inputs(Row& row, const Plan& plan, const Segment& segment, std::int64_t column) {
  const StepArgs& args = *plan.args;
  const auto parameter_item = item_size(args.dtype), state_item = item_size(args.state_dtype);
  const auto offset = row.agent * segment.columns + column;
  row.z = static_cast<char*>(segment.parameters) + offset * parameter_item;
  for (int k = 0; k < args.num_states; ++k) {
    row.state[k] = static_cast<char*>(args.state[k]) + (segment.state_offset + offset) * state_item;
  }
  const bool has_gradient = plan.reads_gradient && segment.gradients != nullptr &&
                            !(args.gradient_scale && args.gradient_scale[row.agent] == 0.0);
  row.gradient = has_gradient ? static_cast<const char*>(segment.gradients) + offset * parameter_item : plan.zeros;
  row.coefficients = static_cast<const char*>(plan.coefficients) + row.agent * plan.per_agent;
}

void sweep(const Plan& plan, const Segment& segment, std::int64_t begin, std::int64_t end, void* scratch) {
  const auto whole = begin + (end - begin) / plan.wide.lanes * plan.wide.lanes;
  if (begin < whole) Sweep(plan, plan.wide, segment, begin, whole, scratch).run();
  if (whole < end) Sweep(plan, plan.narrow, segment, whole, end, scratch).run();
}

}  // namespace gut_fast::cpu
