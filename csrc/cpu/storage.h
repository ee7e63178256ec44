// How numbers lie in memory, and how a few of them at a time are loaded, computed and stored. bfloat16 is storage only:
// its arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/tiers.h"
#include "gossip_step.h"

#if defined(__has_builtin) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#if __has_builtin(__builtin_shufflevector)
#define GUT_FAST_SHUFFLE
#endif
#endif

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

// `Count` numbers of type T that are computed together: a vector of the compiler's, or for one a plain number.
template <typename T, int Count>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * Count)));
};
template <typename T>
struct VectorOf<T, 1> {
  using type = T;
};

template <typename T, int Count>
struct Lanes {
  static constexpr int count = Count;
  using V = typename VectorOf<T, Count>::type;

  static GUT_FAST_INLINE V broadcast(T value) {
    if constexpr (Count == 1) {
      return value;
    } else {
      V all;
      for (int i = 0; i < Count; ++i) all[i] = value;
      return all;
    }
  }

  static GUT_FAST_INLINE V load(const T* place) {
    V value;
    std::memcpy(&value, place, sizeof value);
    return value;
  }

  static GUT_FAST_INLINE V load(const BFloat16* place) {
    Half half;
    std::memcpy(&half, place, sizeof half);
    return from_bits(upper_halves(half));
  }

  static GUT_FAST_INLINE void store(T* place, V value) { std::memcpy(place, &value, sizeof value); }

  // To the nearest, ties to even; NaN stays NaN.
  static GUT_FAST_INLINE void store(BFloat16* place, V value) {
    Word bits, nan;
    std::memcpy(&bits, &value, sizeof bits);
    if constexpr (Count == 1) {
      nan = value != value ? ~0u : 0u;
    } else {
      const auto unordered = value != value;
      std::memcpy(&nan, &unordered, sizeof nan);
    }
    const Half half = narrow(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) | nan);
    std::memcpy(place, &half, sizeof half);
  }

 private:
  using Word = typename VectorOf<std::uint32_t, Count>::type;
  using Half = typename VectorOf<std::uint16_t, Count>::type;

  static GUT_FAST_INLINE V from_bits(Word bits) {
    V value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Each half in the upper half of a word. GCC makes two instructions of the shuffle and five of the conversion.
  static GUT_FAST_INLINE Word upper_halves(Half half) {
    if constexpr (Count == 1) {
      return static_cast<Word>(half) << 16;
    } else {
#if defined(GUT_FAST_SHUFFLE)
      return interleave(half, std::make_integer_sequence<int, 2 * Count>());
#else
      return __builtin_convertvector(half, Word) << 16;
#endif
    }
  }

#if defined(GUT_FAST_SHUFFLE)
  template <int... i>
  static GUT_FAST_INLINE Word interleave(Half half, std::integer_sequence<int, i...>) {
    const auto pairs = __builtin_shufflevector(Half{}, half, (i % 2 == 0 ? 0 : Count + i / 2)...);
    Word words;
    std::memcpy(&words, &pairs, sizeof words);
    return words;
  }
#endif

  static GUT_FAST_INLINE Half narrow(Word word) {
    if constexpr (Count == 1) {
      return static_cast<Half>(word);
    } else {
      return __builtin_convertvector(word, Half);
    }
  }
};

}  // namespace gut_fast::cpu
