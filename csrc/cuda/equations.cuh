// The equations of an update rule on one vector of columns of one agent. A coefficient of zero is "not read": it brings
// in no NaN.
#pragma once

#include "cuda/arguments.h"
#include "cuda/elements.cuh"

namespace gut_fast::cuda {

// q states, M messages; and where the four matrices lie in the flat coefficients.
template <int q, int m>
struct Shape {
  static constexpr int Q = q, M = m, K = q + 2, L = q + 1;
  static constexpr int A = 0, B = A + M * K, C = B + L * K, E = C + L * M, size = E + L * M;
};

// A vector of columns of one agent's row in a segment, the same one in all buffers.
struct Item {
  const Entry* segment;
  std::int32_t agent;
  std::int32_t count;   // columns of the vector that are there; none or less beyond the end
  std::int64_t column;  // of the segment
  std::int64_t index;   // in the segment [N, columns]
};

template <typename Stored, typename S>
struct Step {
  using T = typename Stored::Compute;
  using V = Vector<T>;

  // S_m = sum_k A[m][k] u_k
  static __device__ __forceinline__ V message(const T* coefficients, int m, const V (&u)[S::K]) {
    V sum{};
#pragma unroll
    for (int k = 0; k < S::K; ++k) add_term(sum, coefficients[S::A + m * S::K + k], u[k]);
    return sum;
  }

  // Each u as it is stored: no load waits for another.
  static __device__ __forceinline__ void fetch(const Arguments& args, const Item& item, Bits (&bits)[S::K]) {
    const auto state_index = item.segment->state_offset + item.index;
    bits[0] = Stored::fetch(item.segment->parameters, item.index, item.count, args.dtype);
#pragma unroll
    for (int k = 0; k < S::Q; ++k) {
      bits[k + 1] = Stored::fetch(args.state[k], state_index, item.count, args.state_dtype);
    }
    bits[S::K - 1] = Bits{};
    if (item.segment->gradients != nullptr) {
      bits[S::K - 1] = Stored::fetch(item.segment->gradients, item.index, item.count, args.dtype);
    }
  }

  static __device__ __forceinline__ void widen(const Arguments& args, const Item& item, const Bits (&bits)[S::K],
                                               V (&u)[S::K]) {
#pragma unroll
    for (int k = 0; k < S::K; ++k) {
      u[k] = Stored::widen(bits[k], k == 0 || k == S::K - 1 ? args.dtype : args.state_dtype);
    }
    if (args.gradient_scale != nullptr) scale(u[S::K - 1], static_cast<T>(args.gradient_scale[item.agent]));
  }

  static __device__ __forceinline__ void load(const Arguments& args, const Item& item, V (&u)[S::K]) {
    Bits bits[S::K];
    fetch(args, item, bits);
    widen(args, item, bits, u);
  }

  // o_l = sum_k B[l][k] u_k + sum_m C[l][m] S_m + sum_m E[l][m] D_m, in place of z and the states.
  static __device__ __forceinline__ void store_outputs(const Arguments& args, const T* coefficients, const Item& item,
                                                       const V (&u)[S::K], const V (&drift)[S::M]) {
    V messages[S::M];
#pragma unroll
    for (int m = 0; m < S::M; ++m) messages[m] = message(coefficients, m, u);
    const auto state_index = item.segment->state_offset + item.index;
#pragma unroll
    for (int l = 0; l < S::L; ++l) {
      V sum{};
#pragma unroll
      for (int k = 0; k < S::K; ++k) add_term(sum, coefficients[S::B + l * S::K + k], u[k]);
#pragma unroll
      for (int m = 0; m < S::M; ++m) add_term(sum, coefficients[S::C + l * S::M + m], messages[m]);
#pragma unroll
      for (int m = 0; m < S::M; ++m) add_term(sum, coefficients[S::E + l * S::M + m], drift[m]);
      if (l == 0) {
        Stored::store(item.segment->parameters, item.index, item.count, args.dtype, sum);
      } else {
        Stored::store(args.state[l - 1], state_index, item.count, args.state_dtype, sum);
      }
    }
  }

 private:
  static __device__ __forceinline__ void add_term(V& sum, T coefficient, const V& x) {
    if (coefficient != T(0)) add_product(sum, coefficient, x);
  }

  static __device__ __forceinline__ void scale(V& gradient, T factor) {
#pragma unroll
    for (int v = 0; v < V::size; ++v) gradient.at[v] = factor == T(0) ? T(0) : factor * gradient.at[v];
  }
};

}  // namespace gut_fast::cuda
