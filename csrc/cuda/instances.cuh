// The kernels that are compiled: both kinds for each shape of rule, for one way of storing numbers. Included by one
// source file for each of these, so that they are compiled side by side.
#pragma once

#include "cuda/instances.h"
#include "cuda/kernels.cuh"

#define GUT_FAST_KINDS(Q, M) {step_in_registers<Stored, Shape<Q, M>>, step_in_tiles<Stored, Shape<Q, M>>}
#define GUT_FAST_SHAPES(Q) {GUT_FAST_KINDS(Q, 1), GUT_FAST_KINDS(Q, 2)}

namespace gut_fast::cuda {

template <typename Stored>
constexpr Instances instances() {
  return {{GUT_FAST_SHAPES(0), GUT_FAST_SHAPES(1), GUT_FAST_SHAPES(2), GUT_FAST_SHAPES(3)}};
}

}  // namespace gut_fast::cuda
