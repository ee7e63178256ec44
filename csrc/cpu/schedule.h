// The order in which the agents' messages are computed and the agents are mixed.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/block.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// In turn k < N the message of agent message_order[k] goes to its scratch row. An agent is mixed in the first turn that
// is free when its neighbours' messages are there. Agents are ordered such that few messages and few rows wait, so that
// what is waiting stays in the cache: a ring of any size needs five scratch rows.
struct Schedule {
  std::vector<std::int32_t> message_order;  // [N]
  std::vector<Turn> turns;
  std::vector<std::int32_t> slot;  // [N] scratch row of each agent's message
  std::int32_t num_slots = 0;
  bool uniform = false;  // everybody mixes with all others, with one weight, when all messages are there

  // Rows of scratch, and rows of parameters or state that wait to be mixed, at any time.
  std::int64_t live_rows(int num_messages, int num_outputs) const {
    const auto waiting = static_cast<std::int64_t>(turns.size() - message_order.size());
    return std::int64_t{num_slots} * num_messages + (waiting + 2) * num_outputs;
  }
};

// Throws std::invalid_argument if the CSR arrays are not those of a matrix of this size.
// A thread keeps its last schedule for the next call, which in training is about the same mixing matrix.
std::shared_ptr<const Schedule> schedule_of(const Mixing& mixing);

// Throws std::invalid_argument if the CSR arrays are not those of the rows of `num_agents` agents whose neighbours are
// among `num_rows`.
void check_mixing(const Mixing& mixing, std::int64_t num_rows);

}  // namespace gut_fast::cpu
