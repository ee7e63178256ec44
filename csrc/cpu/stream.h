// The ceiling of a step: the same streams of memory in a plain loop, without agents.
#pragma once

#include "gossip_step.h"

namespace gut_fast::cpu {

// Momentum on the same buffers: s_k = b s_k + g, z = z - a (g + sum_k s_k). Reads and writes every byte that a step of
// these arguments reads and writes, in place, segment after segment; coefficients and mixing weights are not used.
// Throws std::invalid_argument for dtypes or a number of states that gossip_step has no instance for.
void stream_step(const StepArgs& args, int num_threads);

}  // namespace gut_fast::cpu
