// The shape of an update rule, and its equations on a few columns of one agent.
#pragma once

#include <cstdint>

#include "cpu/storage.h"
#include "cpu/tiers.h"

namespace gut_fast::cpu {

// q states, M messages, and which of the coefficients are zero or one whatever the hyper-parameters are (bit i is entry
// i of the flat coefficients). Every rule of the table has its own pattern; any other rule runs a dense one.
template <int q, int M_, std::uint64_t zeros, std::uint64_t ones>
struct Pattern {
  static constexpr int Q = q, M = M_, K = q + 2, L = q + 1;
  static constexpr int A = 0, B = A + M * K, C = B + L * K, E = C + L * M, size = E + L * M;
  static constexpr std::uint64_t zero_bits = zeros, one_bits = ones;
  static constexpr bool dense = zeros == 0 && ones == 0;
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

// The coefficients a pattern has, each in all lanes; the others are never read.
template <typename P, typename T, typename V>
struct Coefficients {
  V value[P::size];

  template <typename Lane>
  static GUT_FAST_INLINE Coefficients of(const T* coefficient, Lane) {
    Coefficients all;
    for (int i = 0; i < P::size; ++i) {
      if (!P::zero(i) && !P::one(i)) all.value[i] = Lane::broadcast(coefficient[i]);
    }
    return all;
  }
};

// A sum over the coefficients the pattern has, in order; a coefficient of one costs no product.
template <typename P, typename V>
struct Sum {
  V value;
  bool empty = true;

  template <typename T, int Count>
  GUT_FAST_INLINE void add(const Coefficients<P, T, V>& coefficients, int first, const V (&x)[Count]) {
    for (int k = 0; k < Count; ++k) {
      if (P::zero(first + k)) continue;
      const V term = P::one(first + k) ? x[k] : coefficients.value[first + k] * x[k];
      value = empty ? term : value + term;
      empty = false;
    }
  }
};

}  // namespace gut_fast::cpu
