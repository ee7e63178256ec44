// The kernels that are compiled: each kind for each shape of rule, for one way of storing numbers. Included by one
// source file for each of these, so that they are compiled side by side.
#pragma once

#include "cuda/instances.h"
#include "cuda/kernels.cuh"

namespace gut_fast::cuda {

template <int capacity, typename Stored, typename S>
constexpr Family<capacity> family() {
  return {{step_in_registers<Stored, S, capacity>, step_in_tiles<Stored, S, false, capacity>,
           step_in_tiles<Stored, S, true, capacity>, send_messages<Stored, S, capacity>}};
}

template <int capacity, typename Stored>
constexpr Families<capacity> families() {
  return {{{family<capacity, Stored, Shape<0, 1>>(), family<capacity, Stored, Shape<0, 2>>()},
           {family<capacity, Stored, Shape<1, 1>>(), family<capacity, Stored, Shape<1, 2>>()},
           {family<capacity, Stored, Shape<2, 1>>(), family<capacity, Stored, Shape<2, 2>>()},
           {family<capacity, Stored, Shape<3, 1>>(), family<capacity, Stored, Shape<3, 2>>()}}};
}

template <typename Stored>
constexpr Instances instances() {
  return {families<kFewSegments, Stored>(), families<kManySegments, Stored>()};
}

}  // namespace gut_fast::cuda
