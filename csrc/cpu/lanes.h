// A few numbers at a time: loaded, computed and stored. bfloat16 is storage only: its arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/storage.h"

#define GUT_FAST_INLINE inline __attribute__((always_inline))
#define GUT_FAST_LAMBDA __attribute__((always_inline))

// Before a loop whose iterations are independent, though pointers that may be equal hide it from the compiler; before
// one whose iterations are too short for a branch each.
#if defined(__clang__)
#define GUT_FAST_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#define GUT_FAST_UNROLL _Pragma("unroll 4")
#else
#define GUT_FAST_VECTORIZE _Pragma("GCC ivdep")
#define GUT_FAST_UNROLL _Pragma("GCC unroll 4")
#endif

#if defined(__has_builtin) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#if __has_builtin(__builtin_shufflevector)
#define GUT_FAST_SHUFFLE
#endif
#endif

namespace gut_fast::cpu {

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
    return value - V{};  // which is value, and GCC makes one instruction of it
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
