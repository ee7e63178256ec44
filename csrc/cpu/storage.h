// How numbers lie in memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gossip_step.h"

namespace gut_fast::cpu {

struct BFloat16 {
  std::uint16_t bits;
};

template <DType dtype>
using Element =
    std::conditional_t<dtype == DType::float64, double, std::conditional_t<dtype == DType::float32, float, BFloat16>>;

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

inline std::int64_t item_size(DType dtype) {
  return dtype == DType::float64 ? sizeof(double) : dtype == DType::float32 ? sizeof(float) : sizeof(BFloat16);
}

}  // namespace gut_fast::cpu
