// How numbers lie in memory and what they are computed in: bfloat16 is storage only, its arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/tiers.h"
#include "gossip_step.h"

namespace gut_fast::cpu {

struct BFloat16 {
  std::uint16_t bits;
};

template <DType dtype>
using Element = std::conditional_t<dtype == DType::float64, double,
                                   std::conditional_t<dtype == DType::float32, float, BFloat16>>;

// Parameters and gradients lie as `Parameter`, state lies as `State`, both are computed in `Compute`.
template <DType parameter, DType state>
struct Storage {
  static constexpr DType dtype = parameter, state_dtype = state;
  using Parameter = Element<parameter>;
  using State = Element<state>;
  using Compute = std::conditional_t<parameter == DType::float64, double, float>;
};

template <typename...>
struct List {};

using Storages = List<Storage<DType::float32, DType::float32>, Storage<DType::float64, DType::float64>,
                      Storage<DType::float32, DType::bfloat16>, Storage<DType::bfloat16, DType::bfloat16>,
                      Storage<DType::bfloat16, DType::float32>>;
constexpr int kNumStorages = 5;

// The place of these dtypes in the list, or -1.
template <typename... S>
int storage_index(DType dtype, DType state_dtype, List<S...>) {
  int index = -1, next = 0;
  ((index = S::dtype == dtype && S::state_dtype == state_dtype ? next : index, ++next), ...);
  return index;
}

template <typename T>
GUT_FAST_INLINE T load(const T* place) {
  return *place;
}

GUT_FAST_INLINE float load(const BFloat16* place) {
  const auto bits = static_cast<std::uint32_t>(place->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
GUT_FAST_INLINE void store(T* place, T value) {
  *place = value;
}

// To the nearest, ties to even; NaN stays NaN.
GUT_FAST_INLINE void store(BFloat16* place, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  place->bits = static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0);
}

}  // namespace gut_fast::cpu
