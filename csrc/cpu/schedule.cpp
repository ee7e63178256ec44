#include "cpu/schedule.h"

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
  if (mixing.row_start[n] != mixing.num_edges) {
    throw std::invalid_argument("row_start ends at " + std::to_string(mixing.row_start[n]) + ", but there are " +
                                std::to_string(mixing.num_edges) + " neighbours");
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

// When messages come in this order: each turn mixes one agent that has become possible, those that wait longest first.
void order_turns(const Mixing& mixing, Schedule& schedule) {
  const auto n = mixing.num_agents;
  std::vector<std::int32_t> position(n), ready(n);
  for (std::int64_t k = 0; k < n; ++k) position[schedule.message_order[k]] = static_cast<std::int32_t>(k);
  for (std::int64_t i = 0; i < n; ++i) {
    ready[i] = position[i];
    for (auto e = mixing.row_start[i]; e < mixing.row_start[i + 1]; ++e) {
      ready[i] = std::max(ready[i], position[mixing.neighbor[e]]);
    }
  }
  auto mix_order = schedule.message_order;
  std::stable_sort(mix_order.begin(), mix_order.end(), [&](auto a, auto b) { return ready[a] < ready[b]; });
  auto next = mix_order.begin();
  for (std::int64_t k = 0; next != mix_order.end(); ++k) {
    const bool sends = k < n, mixes = !sends || (!schedule.uniform && ready[*next] <= k);
    schedule.turns.push_back({sends ? schedule.message_order[k] : -1, mixes ? *next++ : -1});
  }
}

// Gives each message a scratch row from its turn to the last one that reads it.
void assign_slots(const Mixing& mixing, Schedule& schedule) {
  std::vector<std::size_t> last(mixing.num_agents);
  for (std::size_t k = 0; k < schedule.turns.size(); ++k) {
    const auto agent = schedule.turns[k].mix;
    if (agent < 0) continue;
    last[agent] = k;
    for (auto e = mixing.row_start[agent]; e < mixing.row_start[agent + 1]; ++e) last[mixing.neighbor[e]] = k;
  }
  std::vector<std::vector<std::int32_t>> freed(schedule.turns.size());  // after each turn
  std::vector<std::int32_t> free;
  schedule.slot.resize(mixing.num_agents);
  for (std::size_t k = 0; k < schedule.turns.size(); ++k) {
    if (const auto agent = schedule.turns[k].message; agent >= 0) {
      if (free.empty()) free.push_back(schedule.num_slots++);
      schedule.slot[agent] = free.back();
      freed[last[agent]].push_back(free.back());
      free.pop_back();
    }
    free.insert(free.end(), freed[k].begin(), freed[k].end());
  }
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

Schedule schedule_in(std::vector<std::int32_t> message_order, bool uniform, const Mixing& mixing) {
  Schedule schedule;
  schedule.message_order = std::move(message_order);
  schedule.uniform = uniform;
  order_turns(mixing, schedule);
  assign_slots(mixing, schedule);
  return schedule;
}

Schedule make_schedule(const Mixing& mixing) {
  std::vector<std::int32_t> natural(mixing.num_agents);
  std::iota(natural.begin(), natural.end(), 0);
  const bool uniform = is_uniform(mixing);
  Schedule first = schedule_in(std::move(natural), uniform, mixing);
  Schedule second = schedule_in(breadth_first(mixing), uniform, mixing);
  return std::move(first.live_rows(1, 2) <= second.live_rows(1, 2) ? first : second);
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

}  // namespace gut_fast::cpu
