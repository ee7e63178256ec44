// What the compiled loops are given: one block of columns of all agents, and the order in which its rows are computed.
#pragma once

#include <cstdint>

#include "cpu/codes.h"
#include "cpu/storage.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

constexpr int kMaxStates = 3, kMaxMessages = 2, kMaxInputs = kMaxStates + 2;
constexpr std::int64_t kLine = 64;  // bytes of a cache line

// How lines are fetched that a block needs later: not at all, into L1, into L2, into L1 to be written.
enum class Fetch : std::int32_t { none, near, outer, write };

// One turn within a block: the message of one agent, then the mixing of another; -1 is nobody.
struct Turn {
  std::int32_t message, mix;
};

// Scratch rows by which a complete graph is mixed: what all messages differ from the first, summed up, and what
// rounding has lost of that sum (Knuth's two-sum). All agents are mixed with this one sum, so its error would move
// their mean, which nothing pulls back.
struct Total {
  void* sum[kMaxMessages];
  void* lost[kMaxMessages];
};

// Row k of agent i begins i * pitch[k] numbers after input[k].
struct Block {
  std::int64_t columns;  // a multiple of what the loop takes at a time
  std::int64_t num_agents;
  void* input[kMaxInputs];  // z, state_1 ... state_q, g
  std::int64_t pitch[kMaxInputs];
  const void* zeros;             // a row of them, the gradient of agents whose
  const double* gradient_scale;  // factor is zero; or null
  const void* coefficients;
  std::int64_t per_agent;        // from one agent's coefficients to the next one's; 0 if all share them
  std::uint64_t zero_bits;       // of the coefficients, and
  int num_states, num_messages;  // sizes of the rule, for the loop that serves any
  void* const* sent;             // where message m of agent i is put: [i * M + m]
  const void* const* mixed;      // where message m of row j is read for the drift
  bool finishes;                 // outputs that need no mixing are stored with the message
  const std::int64_t *row_start, *neighbor;
  const void* weight;
  const Total* total;  // of a complete graph, instead of the neighbours one by one; or null
  const Turn *turns, *end;
  const std::int32_t* message_order;  // [num_agents]; null where nothing is fetched
  std::int64_t ahead;                 // columns in the order of turns, how far ahead lines are fetched
  std::int64_t begins_at;             // the place of the first turn in that order
  Fetch fetch;
};

// What is compiled for a pattern and one instruction tier.
using Loop = void (*)(const Block&);

struct Instance {
  int num_states, num_messages;
  std::uint64_t zero_bits, one_bits;  // of the pattern: see pattern.h
  Loop loop[kNumStorages];
};

// Sums up the messages of all agents, `columns` of each: see Total.
struct SumArgs {
  void* const* sent;
  std::int64_t num_agents, columns;
  int num_messages;
  const Total* total;
};

// Copies between storage and arithmetic: rows of `columns` numbers, bfloat16 on one side.
struct CopyArgs {
  const void* from;
  void* to;
  std::int64_t columns;
};

// The ceiling of a step, on numbers begin to end of a segment: see stream.h.
struct StreamArgs {
  const StepArgs* step;
  const Segment* segment;
  std::int64_t begin, end;
};

struct Streams {
  void (*run[kNumStorages][kMaxStates + 1])(const StreamArgs&);
};

// What is compiled for one instruction tier.
struct Tier {
  const Instance *begin, *end;  // the last one serves any rule
  int lanes[2];                 // of float, of double
  void (*sum[2])(const SumArgs&);
  void (*widen)(const CopyArgs&);   // bfloat16 to float
  void (*narrow)(const CopyArgs&);  // and back
  void (*encode)(const CodeArgs&);
  void (*decode)(const CodeArgs&);
  Streams streams;
};

constexpr int kVectors = 4;  // a loop takes so many vectors of columns at a time

}  // namespace gut_fast::cpu
