// The CPU kernel: validates the mixing matrix, plans blocks of columns, runs them on the pool, in the best instruction
// tier.
#pragma once

#include <string>
#include <vector>

#include "cpu/block.h"  // kMaxStates, kMaxMessages
#include "cpu/codes.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

// Instruction tiers this processor can run, best first; the last is always "baseline".
std::vector<std::string> available_tiers();

// The tier in use, and its choice. Throws std::invalid_argument for one that is not available.
std::string tier();
const Tier& current_tier();
void set_tier(const std::string& name);

// Whether there are instances for the step's dtypes, states and messages.
bool serves(const StepArgs& args);

// One step in place on up to num_threads threads. Results do not depend on threads, plan or tier, bit for bit.
// Throws std::invalid_argument for a malformed mixing matrix or a rule with more states or messages than are compiled,
// std::bad_alloc for want of scratch; in both cases nothing has been changed.
void gossip_step(const StepArgs& args, int num_threads);

// The two halves of a step whose agents are on several ranks: what each agent sends, then the mixing of what was sent.
// With rows of the type that is computed in, both together give what gossip_step gives, bit for bit. They throw as it
// does.
void message(const StepArgs& args, const Rows& rows, int num_threads);
void combine(const StepArgs& args, const Rows& rows, int num_threads);

// The first half with messages in few bits; the step must be computed in float32. And what a receiver does with a code:
// any bytes will do.
void encode(const StepArgs& args, const Encoding& encoding, int num_threads);
void decode(const Decoding& decoding, int num_threads);

}  // namespace gut_fast::cpu
