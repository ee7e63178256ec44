// The drift D_m(i) = sum_j W[i][j] (S_m(j) - S_m(i)), of messages in shared memory or of rows in global memory.
//
// A neighbour out of range cannot be reported without waiting for the device: its edge gets weight NaN and names row 0,
// so nothing beyond the rows is read, and the agent's drift is NaN.
#pragma once

#include <cmath>

#include "cuda/equations.cuh"

namespace gut_fast::cuda {

template <typename T>
struct Edge {
  T weight;
  std::int32_t row;
};

template <typename T>
__device__ __forceinline__ Edge<T> read_edge(const Arguments& args, std::int64_t edge) {
  const auto row = args.mixing.neighbor[edge];
  if (row < 0 || row >= args.num_rows) return {static_cast<T>(NAN), 0};
  return {static_cast<T>(args.mixing.weight[edge]), static_cast<std::int32_t>(row)};
}

// Where an agent's edges begin, kept inside the list whatever it says.
__device__ __forceinline__ std::int64_t read_row_start(const Arguments& args, std::int64_t agent) {
  const auto start = args.mixing.row_start[agent];
  return start < 0 ? 0 : start > args.mixing.num_edges ? args.mixing.num_edges : start;
}

// Calls work(i) for i = 0 ... count - 1, spread over the block's threads.
template <typename Work>
__device__ __forceinline__ void spread(std::int64_t count, Work work) {
  for (std::int64_t i = threadIdx.x; i < count; i += blockDim.x) work(i);
}

// W in CSR form: in shared memory where it fits.
template <typename T>
struct Graph {
  const Arguments& args;
  std::int32_t* row_start;
  Edge<T>* edges;

  __device__ __forceinline__ Graph(const Arguments& args, char* shared)
      : args(args),
        row_start(reinterpret_cast<std::int32_t*>(shared + args.layout.row_start)),
        edges(reinterpret_cast<Edge<T>*>(shared + args.layout.edges)) {}

  __device__ __forceinline__ bool is_staged() const { return args.layout.edges != kNowhere; }

  __device__ __forceinline__ void stage() const {
    if (!is_staged()) return;
    spread(args.mixing.num_agents + 1,
           [&](std::int64_t i) { row_start[i] = static_cast<std::int32_t>(read_row_start(args, i)); });
    spread(args.mixing.num_edges, [&](std::int64_t e) { edges[e] = read_edge<T>(args, e); });
  }

  // D_m of an agent; S(row, m) is the vector of messages of a row. Always in the order of the edges.
  template <typename S, typename Messages>
  __device__ __forceinline__ void drift(std::int64_t agent, const Messages& messages, Vector<T> (&drift)[S::M]) const {
    Vector<T> own[S::M];
#pragma unroll
    for (int m = 0; m < S::M; ++m) {
      own[m] = messages(agent, m);
      drift[m] = Vector<T>{};
    }
    const bool staged = is_staged();
    const std::int64_t end = staged ? row_start[agent + 1] : read_row_start(args, agent + 1);
    for (std::int64_t e = staged ? row_start[agent] : read_row_start(args, agent); e < end; ++e) {
      const Edge<T> edge = staged ? edges[e] : read_edge<T>(args, e);
#pragma unroll
      for (int m = 0; m < S::M; ++m) add_difference(drift[m], edge.weight, messages(edge.row, m), own[m]);
    }
  }

  static __device__ __forceinline__ void add_difference(Vector<T>& drift, T weight, const Vector<T>& other,
                                                        const Vector<T>& own) {
#pragma unroll
    for (int v = 0; v < Vector<T>::size; ++v) {
      drift.at[v] = multiply_add(weight, other.at[v] - own.at[v], drift.at[v]);
    }
  }
};

// Messages of a tile in shared memory: [rows, M, columns].
template <typename T, int M>
struct SharedMessages {
  T* tile;
  std::int32_t columns;
  std::int32_t column;  // of the vector

  __device__ __forceinline__ Vector<T>& operator()(std::int64_t row, int m) const {
    return *reinterpret_cast<Vector<T>*>(tile + (row * M + m) * columns + column);
  }
};

// Messages where they were received: [M, length of the whole model] a row.
template <typename Stored>
struct RowMessages {
  const Arguments& args;
  const Item& item;

  __device__ __forceinline__ static void* row_of(const Arguments& args, std::int64_t row) {
    return args.rows != nullptr ? args.rows[row] : args.few_rows[row];
  }

  __device__ __forceinline__ std::int64_t index(int m) const {
    return m * args.model_length + item.segment->first_column + item.column;
  }

  __device__ __forceinline__ Vector<typename Stored::Compute> operator()(std::int64_t row, int m) const {
    const Bits bits = Stored::fetch(row_of(args, row), index(m), item.count, args.row_dtype);
    return Stored::widen(bits, args.row_dtype);
  }

  __device__ __forceinline__ void store(std::int64_t row, int m, const Vector<typename Stored::Compute>& values) const {
    Stored::store(row_of(args, row), index(m), item.count, args.row_dtype, values);
  }
};

}  // namespace gut_fast::cuda
