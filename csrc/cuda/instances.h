// The compiled kernels, by how numbers are stored, shape of the rule and kind.
#pragma once

#include "cuda/arguments.h"

namespace gut_fast::cuda {

enum Kind { kRegisters, kTiles, kNumKinds };

using Kernel = void (*)(Launch);

struct Instances {
  Kernel of[kMaxStates + 1][kMaxMessages][kNumKinds];
};

extern const Instances kFloat32Instances, kFloat64Instances, kMixedInstances;

}  // namespace gut_fast::cuda
