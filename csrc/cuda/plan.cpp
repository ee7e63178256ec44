#include "cuda/plan.h"

#include <algorithm>

namespace gut_fast::cuda {

namespace {

constexpr std::int64_t kVector = 16;  // bytes

std::int64_t power_of_two_below(std::int64_t value) {
  std::int64_t power = 1;
  while (2 * power <= value) power *= 2;
  return power;
}

std::int64_t tile_bytes(const Problem& problem, std::int64_t columns) {
  return problem.num_rows * problem.num_messages * columns * problem.item_size;
}

// Coefficients begin; offsets are multiples of a vector.
class SharedMemory {
 public:
  explicit SharedMemory(const Problem& problem) { take(kMaxCoefficients * problem.item_size); }

  std::int32_t take(std::int64_t bytes) {
    const auto offset = bytes_;
    bytes_ += (bytes + kVector - 1) / kVector * kVector;
    return static_cast<std::int32_t>(offset);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::int64_t bytes_ = 0;
};

constexpr std::int64_t kReserve = 2048;  // for coefficients and what is rounded up

// The widest tile of whole vectors with so many items.
std::int64_t columns_for(const Problem& problem, std::int64_t rows, int items) {
  const auto vectors = std::max<std::int64_t>(items / rows, 1);
  return power_of_two_below(vectors) * kVector / problem.item_size;
}

// Small blocks wait least for each other, long rows are read fastest: so many threads where their rows are so long.
// 128 bytes are a cache line, 32 the least that is moved of one. Thousands of agents get rows of one vector.
struct Choice {
  int threads, row_bytes;
};
constexpr Choice kChoices[] = {{256, 128}, {512, 64}, {1024, 32}};

// `near`: the messages of a tile lie in shared memory, so it must have room for them.
void choose_tile(const Problem& problem, const Device& device, bool near, Plan& plan) {
  const auto rows = near ? problem.num_rows : problem.num_agents;
  const int most = plan.kind == kRegisters ? max_threads(problem.num_states, problem.num_messages) : kTileThreads;
  std::int64_t columns = 0;
  for (const Choice choice : kChoices) {
    if (choice.threads > most) break;
    plan.threads = choice.threads;
    columns = columns_for(problem, rows, choice.threads);
    if (columns * problem.item_size >= choice.row_bytes) break;
  }
  columns = std::max(columns, 32 / problem.item_size);
  while (near && tile_bytes(problem, columns) > device.shared_bytes - kReserve) columns /= 2;
  plan.tile_columns = static_cast<int>(columns);
}

// One agent among rows of others: no row is read twice, so none is put into shared memory.
bool is_alone(const Problem& problem) { return problem.num_agents == 1 && problem.num_rows > 1; }

void lay_out(const Problem& problem, const Device& device, bool near, Plan& plan) {
  SharedMemory shared(problem);
  Layout& layout = plan.layout;
  if (near) layout.tile[0] = shared.take(tile_bytes(problem, plan.tile_columns));
  if (plan.kind == kRegisters) layout.tile[1] = shared.take(tile_bytes(problem, plan.tile_columns));
  const auto starts = (problem.num_agents + 1) * static_cast<std::int64_t>(sizeof(std::int32_t));
  const auto edges = problem.num_edges * 2 * problem.item_size;  // a weight and a row
  // As much as leaves the other blocks of a multiprocessor theirs: there are as many as registers allow.
  const auto share = device.shared_bytes * plan.threads / 1024 - kReserve;
  if (problem.work != Work::message && shared.bytes() + starts + edges <= share) {
    layout.row_start = shared.take(starts);
    layout.edges = shared.take(edges);
  }
  plan.shared_bytes = static_cast<std::size_t>(shared.bytes());
}

}  // namespace

bool has_tile(const Problem& problem, const Device& device) {
  return tile_bytes(problem, kVector / problem.item_size) <= device.shared_bytes - kReserve;
}

Plan make_plan(const Problem& problem, const Device& device) {
  Plan plan{};
  plan.kind = problem.work == Work::step ? kRegisters : kTiles;
  plan.layout = {kNowhere, kNowhere, {kNowhere, kNowhere}};
  const bool near = has_tile(problem, device) && problem.work != Work::message && !is_alone(problem);
  choose_tile(problem, device, near, plan);
  if (plan.kind == kRegisters && plan.tile_columns * problem.item_size / kVector * problem.num_agents > plan.threads) {
    plan.kind = kTiles;
    choose_tile(problem, device, near, plan);  // its blocks are smaller
  }
  lay_out(problem, device, near, plan);
  return plan;
}

}  // namespace gut_fast::cuda
