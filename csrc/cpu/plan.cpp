#include "cpu/plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace gut_fast::cpu {

void check_mixing(const Mixing& mixing, std::int64_t num_rows) {
  const auto n = mixing.num_agents;
  if (mixing.row_start[0] != 0) throw std::invalid_argument("row_start[0] must be 0");
  for (std::int64_t i = 0; i < n; ++i) {
    if (mixing.row_start[i + 1] < mixing.row_start[i]) {
      throw std::invalid_argument("row_start decreases after row " + std::to_string(i));
    }
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (auto e = mixing.row_start[i]; e < mixing.row_start[i + 1]; ++e) {
      const auto j = mixing.neighbor[e];
      if (j >= 0 && j < num_rows && j != i) continue;
      throw std::invalid_argument("row " + std::to_string(i) + " names agent " + std::to_string(j) +
                                  ", which is not another one of the " + std::to_string(num_rows));
    }
  }
}

namespace {

// When messages come in this order: mixes in the order in which they become possible, with the smallest lag.
void order_mixes(const Mixing& mixing, Schedule& schedule) {
  const auto n = mixing.num_agents;
  std::vector<std::int32_t> position(n), ready(n);
  for (std::int64_t k = 0; k < n; ++k) position[schedule.message_order[k]] = static_cast<std::int32_t>(k);
  for (std::int64_t i = 0; i < n; ++i) {
    ready[i] = position[i];
    for (auto e = mixing.row_start[i]; e < mixing.row_start[i + 1]; ++e) {
      ready[i] = std::max(ready[i], position[mixing.neighbor[e]]);
    }
  }
  schedule.mix_order = schedule.message_order;
  std::stable_sort(schedule.mix_order.begin(), schedule.mix_order.end(),
                   [&](auto a, auto b) { return ready[a] < ready[b]; });
  for (std::int32_t k = 0; k < n; ++k) schedule.lag = std::max(schedule.lag, ready[schedule.mix_order[k]] - k);
}

// The last step, counted from its tile's first, in which somebody reads an agent's message.
std::vector<std::int64_t> last_reads(const Mixing& mixing, const Schedule& schedule) {
  std::vector<std::int64_t> last(mixing.num_agents);
  for (std::int64_t k = 0; k < mixing.num_agents; ++k) {
    const auto agent = schedule.mix_order[k];
    last[agent] = std::max(last[agent], k + schedule.lag);
    for (auto e = mixing.row_start[agent]; e < mixing.row_start[agent + 1]; ++e) {
      last[mixing.neighbor[e]] = std::max(last[mixing.neighbor[e]], k + schedule.lag);
    }
  }
  return last;
}

// Scratch rows by when they are free. Steps go round in a circle of two tiles.
class SlotPool {
 public:
  explicit SlotPool(std::int64_t steps) : freed_(steps), steps_(steps) {}

  // A row from step `begin` to step `end`, which may lie in the next round; those that do are to be taken first.
  std::int32_t take(std::int64_t begin, std::int64_t end) {
    const bool crosses = end >= steps_;
    const auto fits = [&](std::int32_t slot) { return !crosses && end < taken_from_[slot]; };
    const auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
    std::int32_t slot;
    if (found == free_.rend()) {
      slot = static_cast<std::int32_t>(taken_from_.size());
      taken_from_.push_back(crosses ? begin : steps_);
    } else {
      slot = *found;
      free_.erase(std::next(found).base());
    }
    freed_[end % steps_].push_back(slot);
    return slot;
  }

  void finish(std::int64_t step) { free_.insert(free_.end(), freed_[step].begin(), freed_[step].end()); }

  std::int32_t size() const { return static_cast<std::int32_t>(taken_from_.size()); }

 private:
  std::vector<std::int32_t> free_;
  std::vector<std::int64_t> taken_from_;          // from when on somebody has it until the end of the round
  std::vector<std::vector<std::int32_t>> freed_;  // after each step
  std::int64_t steps_;
};

// Gives each message a scratch row from its step to the last mix that reads it.
void assign_slots(const Mixing& mixing, Schedule& schedule) {
  const auto n = mixing.num_agents;
  const auto last = last_reads(mixing, schedule);
  SlotPool pool(2 * n);
  for (auto& slot : schedule.slot) slot.resize(n);
  const auto assign = [&](std::int64_t step, bool crossing) {
    const auto agent = schedule.message_order[step % n];
    const auto end = step - step % n + last[agent];
    if ((end >= 2 * n) == crossing) schedule.slot[step / n][agent] = pool.take(step, end);
  };
  for (std::int64_t step = 0; step < 2 * n; ++step) assign(step, true);
  for (std::int64_t step = 0; step < 2 * n; ++step) {
    assign(step, false);
    pool.finish(step);
  }
  schedule.num_slots = pool.size();
  for (int parity = 0; parity < 2; ++parity) {
    for (std::int64_t e = 0; e < mixing.row_start[n]; ++e) {
      schedule.neighbor_slot[parity].push_back(schedule.slot[parity][mixing.neighbor[e]]);
    }
  }
}

Schedule schedule_in(std::vector<std::int32_t> message_order, const Mixing& mixing) {
  Schedule schedule;
  schedule.message_order = std::move(message_order);
  order_mixes(mixing, schedule);
  assign_slots(mixing, schedule);
  return schedule;
}

// Whether everybody mixes with all others, once each, and with one weight.
bool is_uniform(const Mixing& mixing) {
  const auto n = mixing.num_agents, edges = mixing.row_start[n];
  if (n <= 5 || edges != n * (n - 1) ||
      !std::all_of(mixing.weight, mixing.weight + edges, [&](double w) { return w == mixing.weight[0]; })) {
    return false;
  }
  std::vector<std::int64_t> named_by(n, -1);
  for (std::int64_t i = 0; i < n; ++i) {
    if (mixing.row_start[i + 1] - mixing.row_start[i] != n - 1) return false;
    for (auto e = mixing.row_start[i]; e < mixing.row_start[i + 1]; ++e) {
      if (named_by[mixing.neighbor[e]] == i) return false;
      named_by[mixing.neighbor[e]] = i;
    }
  }
  return true;
}

// Agents breadth first: neighbours come soon after each other, so few messages wait for theirs (Cuthill and McKee).
std::vector<std::int32_t> breadth_first(const Mixing& mixing) {
  std::vector<std::int32_t> order;
  std::vector<bool> seen(mixing.num_agents, false);
  const auto see = [&](std::int64_t agent) {
    if (!seen[agent]) order.push_back(static_cast<std::int32_t>(agent));
    seen[agent] = true;
  };
  for (std::int64_t start = 0; start < mixing.num_agents; ++start) {
    see(start);
    for (auto next = order.size() - 1; next < order.size(); ++next) {
      const auto agent = order[next];
      for (auto e = mixing.row_start[agent]; e < mixing.row_start[agent + 1]; ++e) see(mixing.neighbor[e]);
    }
  }
  return order;
}

Schedule make_schedule(const Mixing& mixing) {
  std::vector<std::int32_t> natural(mixing.num_agents);
  std::iota(natural.begin(), natural.end(), 0);
  Schedule first = schedule_in(std::move(natural), mixing), second = schedule_in(breadth_first(mixing), mixing);
  Schedule& best = first.live_rows(1, 2) <= second.live_rows(1, 2) ? first : second;
  best.uniform = is_uniform(mixing);
  return std::move(best);
}

// A mixing matrix and the schedule made for it.
struct Known {
  std::vector<std::int64_t> row_start, neighbor;
  std::vector<double> weight;
  Schedule schedule;

  explicit Known(const Mixing& mixing)
      : row_start(mixing.row_start, mixing.row_start + mixing.num_agents + 1),
        neighbor(mixing.neighbor, mixing.neighbor + row_start.back()),
        weight(mixing.weight, mixing.weight + row_start.back()),
        schedule(make_schedule(mixing)) {}

  bool is(const Mixing& mixing) const {
    return static_cast<std::int64_t>(row_start.size()) == mixing.num_agents + 1 &&
           std::equal(row_start.begin(), row_start.end(), mixing.row_start) &&
           std::equal(neighbor.begin(), neighbor.end(), mixing.neighbor) &&
           std::equal(weight.begin(), weight.end(), mixing.weight);
  }
};

}  // namespace

std::shared_ptr<const Schedule> schedule_of(const Mixing& mixing) {
  thread_local std::shared_ptr<const Known> last;  // no lock, which a fork could leave taken in the child
  if (!last || !last->is(mixing)) {
    check_mixing(mixing, mixing.num_agents);
    last = std::make_shared<const Known>(mixing);
  }
  return {last, &last->schedule};
}

std::int64_t tile_columns(const StepArgs& args, const Schedule& schedule, std::int64_t itemsize, std::int64_t block) {
  // Messages that many others read should stay in L2; else what matters is that rows are long enough for the
  // hardware's prefetchers.
  const bool is_read_often =
      args.mixing.row_start[args.mixing.num_agents] > 8 * args.mixing.num_agents && !schedule.uniform;
  const std::int64_t budget = is_read_often ? 256 << 10 : 2 << 20;     // bytes
  const std::int64_t least = is_read_often ? 512 : 2048, most = 4096;  // columns
  const auto bytes_per_column = schedule.live_rows(args.num_messages, args.num_states + 1) * itemsize;
  return std::clamp(budget / bytes_per_column / block * block, least, most);
}

std::vector<Chunk> make_chunks(const StepArgs& args, int num_threads, std::int64_t tile, std::int64_t block) {
  constexpr std::int64_t kChunksPerThread = 8, kFewest = 2048;  // a shorter row is not worth its beginning
  std::int64_t total = 0;
  for (std::int64_t s = 0; s < args.num_segments; ++s) total += args.segments[s].columns;
  auto length = std::max<std::int64_t>(total, 1);
  if (num_threads > 1) {
    const auto wanted = std::max(total / (num_threads * kChunksPerThread), kFewest),
               unit = wanted < tile ? block : tile;
    length = (wanted + unit - 1) / unit * unit;
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
