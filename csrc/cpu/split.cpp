#include "cpu/split.h"

#include <algorithm>

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
        mixing_(plan.args->mixing),
        num_messages_(plan.args->num_messages),
        is_rounded_(rows.dtype == DType::bfloat16),
        is_mixed_rounded_(is_rounded_ && loops.combine[1] != nullptr &&
                          std::find(rows.row, rows.row + rows.count, nullptr) == rows.row + rows.count),
        begin_(begin),
        end_(end),
        scratch_(static_cast<char*>(scratch)),
        place_(reinterpret_cast<void**>(in_scratch(rows.count, 0))) {
    args_.stride = plan.stride;
    args_.place = place_;
  }

  void send() {
    for (auto column = begin_; column < end_; column += plan_.tile) {
      for (std::int64_t agent = 0; agent < mixing_.num_agents; ++agent) {
        if (rows_.row[agent] == nullptr) continue;
        for (int m = 0; m < num_messages_; ++m) {
          place(agent, m) = in_row(agent, m, column);
          if (rows_.residual != nullptr) args_.residual[m] = at(rows_.residual[agent], m, column, plan_.item);
        }
        set_row(args_.sent, agent, column);
        loops_.send[is_rounded_](args_);
      }
    }
  }

  void combine() {
    for (auto column = begin_; column < end_; column += plan_.tile) {
      for (std::int64_t agent = 0; agent < rows_.count; ++agent) collect(agent, column);
      for (std::int64_t agent = 0; agent < mixing_.num_agents; ++agent) mix(agent, column);
    }
  }

 private:
  // Finds the agent's messages of this tile: in its row, or in the scratch when they have been put there.
  void collect(std::int64_t agent, std::int64_t column) {
    const bool has_row = rows_.row[agent] != nullptr, is_read_there = has_row && is_rounded_ == is_mixed_rounded_;
    for (int m = 0; m < num_messages_; ++m) {
      place(agent, m) = is_read_there ? in_row(agent, m, column) : in_scratch(agent, m);
    }
    if (is_read_there) return;
    if (has_row) {
      args_.sent.agent = agent;
      args_.sent.count = columns_from(column);
      for (int m = 0; m < num_messages_; ++m) args_.rounded[m] = in_row(agent, m, column);
      loops_.widen(args_);
    } else {
      set_row(args_.sent, agent, column);
      loops_.send[0](args_);
    }
  }

  void mix(std::int64_t agent, std::int64_t column) {
    const auto edge = mixing_.row_start[agent];
    set_row(args_.mixed, agent, column);
    args_.degree = mixing_.row_start[agent + 1] - edge;
    args_.neighbor = mixing_.neighbor + edge;
    args_.weight = static_cast<const char*>(plan_.weight) + edge * plan_.item;
    loops_.combine[is_mixed_rounded_](args_);
  }

  void set_row(Row& row, std::int64_t agent, std::int64_t column) const {
    row.agent = agent;
    row.count = columns_from(column);
    set_inputs(row, plan_, segment_, column);
  }

  std::int64_t columns_from(std::int64_t column) const { return std::min(end_ - column, plan_.tile); }

  void*& place(std::int64_t agent, int m) const { return place_[agent * num_messages_ + m]; }

  char* in_scratch(std::int64_t agent, int m) const {
    return scratch_ + (agent * num_messages_ + m) * plan_.stride * plan_.item;
  }

  void* in_row(std::int64_t agent, int m, std::int64_t column) const {
    return at(rows_.row[agent], m, column, is_rounded_ ? sizeof(BFloat16) : plan_.item);
  }

  void* at(void* row, int m, std::int64_t column, std::int64_t itemsize) const {
    const auto of_segment = segment_.state_offset / mixing_.num_agents;  // where it begins in one agent's model
    return static_cast<char*>(row) + (m * rows_.length + of_segment + column) * itemsize;
  }

  const Plan& plan_;
  const Loops& loops_;
  const Rows& rows_;
  const Segment& segment_;
  const Mixing& mixing_;
  const int num_messages_;
  const bool is_rounded_;        // the rows
  const bool is_mixed_rounded_;  // and are mixed as they are, which wants all of them
  const std::int64_t begin_, end_;
  char* const scratch_;
  void** const place_;
  LoopArgs args_{};
};

}  // namespace

std::int64_t split_tile(const StepArgs& args, const Rows& rows, std::int64_t itemsize) {
  constexpr std::int64_t kBudget = 256 << 10, kLeast = 512, kMost = 4096;  // bytes, columns
  const auto bytes_per_column = rows.count * args.num_messages * itemsize;
  return std::clamp(kBudget / bytes_per_column / kBlock * kBlock, kLeast, kMost);
}

std::int64_t split_scratch_bytes(const StepArgs& args, const Rows& rows, std::int64_t stride, std::int64_t itemsize) {
  return rows.count * args.num_messages * (stride * itemsize + static_cast<std::int64_t>(sizeof(void*)));
}

void send_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                  void* scratch) {
  const auto whole = begin + (end - begin) / plan.wide.lanes * plan.wide.lanes;
  if (begin < whole) Split(plan, plan.wide, rows, segment, begin, whole, scratch).send();
  if (whole < end) Split(plan, plan.narrow, rows, segment, whole, end, scratch).send();
}

void combine_columns(const Plan& plan, const Rows& rows, const Segment& segment, std::int64_t begin, std::int64_t end,
                     void* scratch) {
  const auto whole = begin + (end - begin) / plan.wide.lanes * plan.wide.lanes;
  if (begin < whole) Split(plan, plan.wide, rows, segment, begin, whole, scratch).combine();
  if (whole < end) Split(plan, plan.narrow, rows, segment, whole, end, scratch).combine();
}

}  // namespace gut_fast::cpu
