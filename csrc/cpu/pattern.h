// The shape of an update rule, and sums over its coefficients.
#pragma once

#include <cstdint>

#include "cpu/block.h"
#include "cpu/lanes.h"

namespace gut_fast::cpu {

// q states, M messages, and which of the coefficients are zero or one whatever the hyper-parameters are (bit i is entry
// i of the flat coefficients). Every rule of the table has its own pattern.
template <int q, int M_, std::uint64_t zeros, std::uint64_t ones>
struct Pattern {
  static constexpr bool serves_any = false;
  static constexpr int Q = q, M = M_, K = q + 2, L = q + 1;
  static constexpr int A = 0, B = A + M * K, C = B + L * K, E = C + L * M, size = E + L * M;
  static constexpr std::uint64_t zero_bits = zeros, one_bits = ones;
  static constexpr bool zero(int i) { return zeros >> i & 1; }
  static constexpr bool one(int i) { return ones >> i & 1; }

  static constexpr bool mixes(int l) {
    for (int m = 0; m < M; ++m) {
      if (!zero(C + l * M + m) || !zero(E + l * M + m)) return true;
    }
    return false;
  }

  // Output l needs no message, and no output that does reads the place it is stored in: it is stored with the message,
  // while its inputs are at hand.
  static constexpr bool early(int l) {
    if (mixes(l)) return false;
    for (int other = 0; other < L; ++other) {
      if (other != l && !zero(B + other * K + l)) return false;
    }
    return true;
  }
};

// Any rule: its coefficients are padded to the largest shape, and which of them are zero is seen at run time. States
// and messages that the rule does not have are neither read nor written.
struct AnyRule : Pattern<kMaxStates, kMaxMessages, 0, 0> {
  static constexpr bool serves_any = true;
};

// The coefficients a rule has, each in all lanes; those that are zero are never read, whatever they would multiply.
template <typename P, typename V>
struct Coefficients {
  V value[P::size];
  std::uint64_t zero_bits;

  template <typename Lane, typename T>
  static GUT_FAST_INLINE Coefficients of(const T* coefficient, std::uint64_t zero_bits, Lane) {
    Coefficients all;
    all.zero_bits = zero_bits;
    for (int i = 0; i < P::size; ++i) {
      if (!P::zero(i) && !P::one(i)) all.value[i] = Lane::broadcast(coefficient[i]);
    }
    return all;
  }

  GUT_FAST_INLINE bool is_zero(int i) const { return P::serves_any ? zero_bits >> i & 1 : P::zero(i); }
};

// A sum over the coefficients the rule has, in order; a coefficient of one costs no product.
template <typename P, typename V>
struct Sum {
  V value{};
  bool empty = true;

  template <int Count>
  GUT_FAST_INLINE void add(const Coefficients<P, V>& coefficients, int first, const V (&x)[Count]) {
    for (int k = 0; k < Count; ++k) {
      if (coefficients.is_zero(first + k)) continue;
      const V term = P::one(first + k) ? x[k] : coefficients.value[first + k] * x[k];
      value = empty ? term : value + term;  // not 0 + term, which would make -0 into 0
      empty = false;
    }
  }
};

}  // namespace gut_fast::cpu
