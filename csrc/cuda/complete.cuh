// The drift in a complete graph with equal weights w: D(i) = w sum_j (S(j) - S(i)) = w (total - N (S(i) - S(0))) with
// total = sum_j (S(j) - S(0)), one sum for all agents.
//
// All terms are differences from one agent's message, as large as the agents are apart and not as the parameters are:
// near consensus they are exact, and their sum keeps float32's digits. All agents are mixed with the same total, so its
// rounding would move their mean, which nothing pulls back: what each addition loses is summed beside it.
#pragma once

#include "cuda/mixing.cuh"

namespace gut_fast::cuda {

// Whether the graph is complete and all weights are equal: the whole block looks at every edge.
__device__ __forceinline__ bool is_uniform(const Arguments& args) {
  if (!args.may_be_uniform) return false;
  const std::int64_t others = args.num_agents - 1;
  bool differs = false;
  spread(args.num_agents + 1, [&](std::int64_t i) { differs |= args.row_start[i] != i * others; });
  spread(args.num_edges, [&](std::int64_t e) {
    const auto i = e / others, k = e % others;
    differs |= args.neighbor[e] != k + (k >= i) || args.weight[e] != args.weight[0];
  });
  return __syncthreads_or(differs) == 0;
}

// A sum, and beside it what rounding has lost of it (Knuth's two-sum).
template <typename T>
struct Total {
  Vector<T> sum, lost;

  __device__ __forceinline__ void add(const Vector<T>& value) {
#pragma unroll
    for (int v = 0; v < Vector<T>::size; ++v) {
      const T before = sum.at[v], after = before + value.at[v], part = after - before;
      sum.at[v] = after;
      lost.at[v] += (before - (after - part)) + (value.at[v] - part);
    }
  }
};

// Totals [groups, M, vectors] of a tile, one for every so-manieth row; then those of all rows in the first of them.
template <typename T, typename S>
struct Totals {
  const Arguments& args;
  T* tile;
  Total<T>* partial;

  __device__ __forceinline__ Totals(const Arguments& args, char* shared)
      : args(args),
        tile(reinterpret_cast<T*>(shared + args.layout.tile[0])),
        partial(reinterpret_cast<Total<T>*>(shared + args.layout.partial)) {}

  __device__ __forceinline__ int vectors() const { return args.tile_columns / Vector<T>::size; }

  // The whole block, when the messages are there.
  __device__ __forceinline__ void sum() const {
    const int width = S::M * vectors();
    spread(kGroups * width, [&](std::int64_t task) {
      const int group = static_cast<int>(task) / width, column = static_cast<int>(task) % width * Vector<T>::size;
      const SharedMessages<T, 1> messages{tile, S::M * args.tile_columns, column};
      const Vector<T> first = messages(0, 0);
      Total<T> total{};
      for (std::int64_t row = group; row < args.num_rows; row += kGroups) {
        total.add(difference(messages(row, 0), first));
      }
      partial[task] = total;
    });
    __syncthreads();
    spread(width, [&](std::int64_t task) {
      Total<T> total = partial[task];
      for (int group = 1; group < kGroups; ++group) {
        const Total<T> other = partial[group * width + task];
        total.add(other.sum);
        total.add(other.lost);
      }
      partial[task] = total;
    });
    __syncthreads();
  }

  __device__ __forceinline__ void drift(std::int32_t agent, std::int32_t column, Vector<T> (&drift)[S::M]) const {
    const SharedMessages<T, S::M> messages{tile, args.tile_columns, column};
    const T all = static_cast<T>(args.num_agents), weight = static_cast<T>(args.weight[0]);
#pragma unroll
    for (int m = 0; m < S::M; ++m) {
      const Total<T> total = partial[m * vectors() + column / Vector<T>::size];
      const Vector<T> own = difference(messages(agent, m), messages(0, m));
#pragma unroll
      for (int v = 0; v < Vector<T>::size; ++v) {
        drift[m].at[v] = weight * (multiply_add(-all, own.at[v], total.sum.at[v]) + total.lost.at[v]);
      }
    }
  }

 private:
  static __device__ __forceinline__ Vector<T> difference(const Vector<T>& a, const Vector<T>& b) {
    Vector<T> result;
#pragma unroll
    for (int v = 0; v < Vector<T>::size; ++v) result.at[v] = a.at[v] - b.at[v];
    return result;
  }
};

}  // namespace gut_fast::cuda
