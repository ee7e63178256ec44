// The drift in a dense graph: one thread mixes several agents, so that it reads a neighbour's message once for all of
// them. Shared memory's bandwidth bounds the sparse loop from some 30 neighbours on; here it is a group's share of
// that.
//
// The same differences S(j) - S(i) in the same order as the sparse loop, so the same digits. An edge that is not there
// is left out, not multiplied by zero: NaN reaches an agent's neighbours and nobody else.
#pragma once

#include "cuda/mixing.cuh"

namespace gut_fast::cuda {

template <typename T, typename S>
struct Dense {
  static constexpr int group = dense_group(S::M);  // agents

  const Arguments& args;
  T* weights;  // [rows, agents], rows of whole groups
  std::int32_t stride;

  __device__ __forceinline__ Dense(const Arguments& args, char* shared)
      : args(args),
        weights(reinterpret_cast<T*>(shared + args.layout.dense)),
        stride(static_cast<std::int32_t>((args.num_agents + group - 1) / group * group)) {}

  // The whole block. False where a list of edges is not in order, or names a neighbour twice.
  __device__ __forceinline__ bool stage() const {
    spread(args.num_rows * stride, [&](std::int64_t i) { weights[i] = T(0); });
    __syncthreads();
    bool disorder = false;
    spread(args.num_agents, [&](std::int64_t agent) {
      std::int32_t last = -1;
      const auto end = read_row_start(args, agent + 1);
      for (auto e = read_row_start(args, agent); e < end; ++e) {
        const Edge<T> edge = read_edge<T>(args, e);
        disorder |= edge.row <= last;
        last = edge.row;
        weights[edge.row * stride + agent] = edge.weight;
      }
    });
    return __syncthreads_or(disorder) == 0;
  }

  // Where an agent's messages were in shared memory, their drift, once nobody needs them. The whole block; a thread has
  // one group at most.
  template <typename Tile>
  __device__ __forceinline__ void replace_by_drift(const Tile& tile, T* tile_messages) const {
    const auto item = static_cast<std::int32_t>(threadIdx.x);
    const std::int32_t first = (item >> tile.shift) * group;
    const bool is_there = first < args.num_agents;
    const SharedMessages<T, S::M> messages{tile_messages, args.tile_columns, tile.column_in_tile(item)};
    Vector<T> drift[group][S::M];
    if (is_there) compute(first, messages, drift);
    __syncthreads();
#pragma unroll
    for (int g = 0; g < group; ++g) {
      if (!is_there || first + g >= args.num_agents) break;
#pragma unroll
      for (int m = 0; m < S::M; ++m) messages(first + g, m) = drift[g][m];
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void compute(std::int32_t first, const SharedMessages<T, S::M>& messages,
                                          Vector<T> (&drift)[group][S::M]) const {
    Vector<T> own[group][S::M];
#pragma unroll
    for (int g = 0; g < group; ++g) {
#pragma unroll
      for (int m = 0; m < S::M; ++m) {
        own[g][m] = messages(first + g < args.num_agents ? first + g : first, m);
        drift[g][m] = Vector<T>{};
      }
    }
    for (std::int32_t row = 0; row < args.num_rows; ++row) {
      const auto& weight = *reinterpret_cast<const T(*)[group]>(weights + row * stride + first);
#pragma unroll
      for (int m = 0; m < S::M; ++m) {
        const Vector<T> other = messages(row, m);
#pragma unroll
        for (int g = 0; g < group; ++g) {
          if (weight[g] != T(0)) Graph<T>::add_difference(drift[g][m], weight[g], other, own[g][m]);
        }
      }
    }
  }
};

}  // namespace gut_fast::cuda
