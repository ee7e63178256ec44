// What is compiled for each shape of rule, storage and instruction tier: a few loops over the columns of one or two
// rows. `sweep.cpp` decides which rows, in which order.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/storage.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

constexpr std::int64_t kLine = 64;    // bytes of a cache line
constexpr std::int64_t kBlock = 128;  // columns between two lines of the row that comes next
constexpr int kHeadLines = 4;         // fetched of a row before it is begun

// How a row is mixed: with all others and one weight, any number of neighbours, or a number known when compiling.
enum Kind { kUniform, kAnyDegree, kDegree1, kDegree2, kDegree3, kDegree4, kNumKinds };

// One agent's columns of one tile. Scratch rows hold message m at m * stride.
struct Row {
  std::int64_t agent, count;  // columns
  int parity;                 // of the tile: two tiles are under way at a time
  void* z;
  void* state[kMaxStates];
  const void* gradient;
  const void* coefficients;
  void* own;    // scratch: the agent's message
  void* first;  // scratch: the tile's first message
  void* total;  // scratch: the sum of what the messages differ from the first, if mixing is uniform
  void* lost;   // scratch: what rounding has lost of that sum
};

struct LoopArgs {
  Row sent, mixed;                         // whose message is computed, who is mixed
  Row after;                               // in a chain: whose message comes after `sent`
  void* scratch;                           // what the neighbours' slots are rows of
  std::int64_t stride;                     // of scratch rows, in numbers
  const std::int32_t* slot;                // of the mixed agent's neighbours
  const void* weight;                      // of the same
  const void* chain_weight;                // in a chain: of the neighbours of `sent`
  std::int64_t degree;                     // how many neighbours the mixed agent has
  std::int64_t num_agents;                 // N
  void* const* place;                      // split form: where each row's messages are, M for each
  const std::int64_t* neighbor;            // the mixed agent's, whose messages are there
  const void* rounded[kMaxMessages];       // bfloat16 messages that came, to be widened
  void* residual[kMaxMessages];            // of bfloat16 messages that leave: what rounding has left so far, or null
  const void* next[2 * (kMaxStates + 2)];  // where the rows begin whose messages come next
  int num_next;
};

using Loop = void (*)(const LoopArgs&);

// By kind; where there is none for a degree, kAnyDegree serves, where there is no chain, two steps do. The loops of the
// split form are for messages in the type that is computed in, and where that is float for bfloat16 ones.
struct Loops {
  int lanes;  // columns come in multiples of it
  Loop message[2], mix[2], both[kNumKinds];
  Loop chain;                // of two steps along a path of agents: see loops.h
  Loop send[2], combine[2];  // split form; without combine[1] bfloat16 rows are widened and combine[0] serves
  Loop widen;                // from `rounded` to the place of `sent`
};

struct Instance {
  int num_states, num_messages;
  std::uint64_t zero_bits, one_bits;  // of the pattern: see pattern.h
  Loops loops[kNumStorages];
};

struct TierEntry {
  const char* name;
  bool (*available)();
  const Instance *begin, *end;
};

// Columns one by one, for those that do not fill a vector.
Loops narrow_loops(const Instance& instance, int storage);

}  // namespace gut_fast::cpu
