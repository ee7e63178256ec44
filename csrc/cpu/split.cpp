#include "cpu/split.h"

#include <algorithm>
#include <vector>

namespace gut_fast::cpu {
namespace {

class Split {
 public:
  Split(const Plan& plan, const Loops& loops, const Rows& rows, const Segment& segment, std::int64_t begin,
        std::int64_t end, void* scratch)
      : plan_(plan),
        loops_(loops),
        rows_(rows),
        segment_(segment),
        num_agents_(plan.args->mixing.num_agents),
        num_messages_(plan.args->num_messages),
        is_rounded_(rows.dtype == DType::bfloat16),
        begin_(begin),
        end_(end),
        scratch_(static_cast<char*>(scratch)) {
    args_.stride = plan.stride;
    args_.num_agents = num_agents_;
  }

  void send() {
    for (auto column = begin_; column < end_; column += plan_.tile) {
      for (std::int64_t agent = 0; agent < num_agents_; ++agent) {
        if (rows_.row[agent] == nullptr) continue;
        set_row(args_.sent, agent, column);
        for (int m = 0; m < num_messages_; ++m) outgoing_[m] = in_row(agent, m, column);
        args_.outgoing = outgoing_;
        loops_.send[is_rounded_](args_);
      }
    }
  }

  void combine() {
    for (auto column = begin_; column < end_; column += plan_.tile) {
      for (std::int64_t agent = 0; agent < rows_.count; ++agent) fill_scratch(agent, column);
      for (std::int64_t agent = 0; agent < num_agents_; ++agent) mix(agent, column);
    }
  }

 private:
  // The messages of a tile that are not to be read where they lie.
  void fill_scratch(std::int64_t agent, std::int64_t column) {
    if (!is_in_scratch(agent)) return;
    for (int m = 0; m < num_messages_; ++m) outgoing_[m] = in_scratch(agent, m);
    args_.outgoing = outgoing_;
    if (rows_.row[agent] == nullptr) {
      set_row(args_.sent, agent, column);
      loops_.send[0](args_);
    } else {
      args_.sent.count = std::min(end_ - column, plan_.tile);
      for (int m = 0; m < num_messages_; ++m) own_[m] = in_row(agent, m, column);
      args_.own = own_;
      loops_.widen(args_);
    }
  }

  void mix(std::int64_t agent, std::int64_t column) {
    const Mixing& mixing = plan_.args->mixing;
    const auto first = mixing.row_start[agent], last = mixing.row_start[agent + 1];
    set_row(args_.mixed, agent, column);
    args_.degree = last - first;
    args_.weight = static_cast<const char*>(plan_.weight) + first * plan_.item;
    incoming_.resize(args_.degree * num_messages_);
    for (int m = 0; m < num_messages_; ++m) {
      own_[m] = as_sent(agent, m, column);
      for (auto edge = first; edge < last; ++edge) {
        incoming_[(edge - first) * num_messages_ + m] = as_sent(mixing.neighbor[edge], m, column);
      }
    }
    args_.own = own_;
    args_.incoming = incoming_.data();
    loops_.combine(args_);
  }

  void set_row(Row& row, std::int64_t agent, std::int64_t column) const {
    row.agent = agent;
    row.count = std::min(end_ - column, plan_.tile);
    set_inputs(row, plan_, segment_, column);
  }

  bool is_in_scratch(std::int64_t agent) const { return is_rounded_ || rows_.row[agent] == nullptr; }

  void* as_sent(std::int64_t agent, int m, std::int64_t column) const {
    return is_in_scratch(agent) ? in_scratch(agent, m) : in_row(agent, m, column);
  }

  void* in_scratch(std::int64_t agent, int m) const {
    return scratch_ + (agent * num_messages_ + m) * plan_.stride * plan_.item;
  }

  void* in_row(std::int64_t agent, int m, std::int64_t column) const {
    const auto of_segment = segment_.state_offset / num_agents_;
    const auto offset = m * rows_.length + of_segment + column;
    return static_cast<char*>(rows_.row[agent]) + offset * (is_rounded_ ? sizeof(BFloat16) : plan_.item);
  }

  const Plan& plan_;
  const Loops& loops_;
  const Rows& rows_;
  const Segment& segment_;
  const std::int64_t num_agents_;
  const int num_messages_;
  const bool is_rounded_;
  const std::int64_t begin_, end_;
  char* const scratch_;
  void* outgoing_[kMaxMessages] = {};
  const void* own_[kMaxMessages] = {};
  std::vector<const void*> incoming_;
  LoopArgs args_{};
};

}  // namespace

std::int64_t split_tile(const StepArgs& args, const Rows& rows, std::int64_t itemsize) {
  constexpr std::int64_t kBudget = 256 << 10, kLeast = 512, kMost = 4096;  // bytes, columns
  const auto bytes_per_column = rows.count * args.num_messages * itemsize;
  return std::clamp(kBudget / bytes_per_column / kBlock * kBlock, kLeast, kMost);
}

void send_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end) {
  const auto whole = begin + (end - begin) / plan.wide.lanes * plan.wide.lanes;
  if (begin < whole) Split(plan, plan.wide, rows, segment, begin, whole, nullptr).send();
  if (whole < end) Split(plan, plan.narrow, rows, segment, whole, end, nullptr).send();
}

void combine_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                     void* scratch) {
  const auto whole = begin + (end - begin) / plan.wide.lanes * plan.wide.lanes;
  if (begin < whole) Split(plan, plan.wide, rows, segment, begin, whole, scratch).combine();
  if (whole < end) Split(plan, plan.narrow, rows, segment, whole, end, scratch).combine();
}

}  // namespace gut_fast::cpu
