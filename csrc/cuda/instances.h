// The compiled kernels, by how numbers are stored, shape of the rule and kind.
#pragma once

#include "cuda/arguments.h"

namespace gut_fast::cuda {

enum Kind { kRegisters, kTiles, kDense, kSend, kNumKinds };

template <int capacity>
using Kernel = void (*)(Launch<capacity>);

template <int capacity>
struct Family {
  Kernel<capacity> of[kNumKinds];
};

template <int capacity>
struct Families {
  Family<capacity> of[kMaxStates + 1][kMaxMessages];
};

struct Instances {
  Families<kFewSegments> few;
  Families<kManySegments> many;
};

extern const Instances kFloat32Instances, kFloat64Instances, kMixedInstances;

}  // namespace gut_fast::cuda
