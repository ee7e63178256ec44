// The kernels. A tile is a range of columns of one segment for all agents. Blocks take tiles in turn:
//
//   1. each thread loads u of its (agent, vector of columns) items and puts the messages S into shared memory;
//   2. after a barrier it computes the drift from its neighbours' S, and stores the outputs where the inputs were.
//
// Only the thread that read an input overwrites it, so nothing is read after it has changed. There are no atomics: the
// result is the same from run to run, and does not depend on how many blocks there are.
//
// What is expected of GUT in float32 (no device has measured it yet): 20 bytes of memory a number, 12 in and 8 out, so
// 29 us at 3 TB/s for 16 agents of 272,474 columns. step_in_registers has 54 registers on sm_90: four blocks of 256
// threads on a multiprocessor, each thread with three loads of 16 bytes under way, 48 KB together; at 25 bytes a
// nanosecond and multiprocessor and a microsecond's latency, 25 KB would do. About 40 instructions a number with two
// neighbours, of the 170 that an H100 has time for; in a sparse graph shared memory bounds it from some 30 neighbours
// on. step_in_tiles has 59 registers, 78 with the dense path. No instance spills: a spill fails the build.
#pragma once

#include "cuda/complete.cuh"
#include "cuda/dense.cuh"
#include "cuda/mixing.cuh"

namespace gut_fast::cuda {

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 shared[];
  return reinterpret_cast<char*>(shared);
}

// To shared memory: they may lie in device memory, and are needed in the type of arithmetic.
template <typename T>
__device__ __forceinline__ T* stage_coefficients(const Arguments& args, int size) {
  T* staged = reinterpret_cast<T*>(shared_memory());
  const double* given = args.device_coefficients != nullptr ? args.device_coefficients : args.coefficients;
  spread(size, [&](std::int64_t i) { staged[i] = static_cast<T>(given[i]); });
  return staged;
}

// The last segment that begins at or before a tile.
__device__ __forceinline__ const Segment* segment_of(const Arguments& args, const Segment* segments,
                                                     std::int64_t tile) {
  int first = 0, last = args.num_segments - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (segments[middle].first_tile <= tile) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return segments + first;
}

// The items of a tile: vectors of columns, agent after agent.
template <typename T>
struct Tile {
  const Segment* segment;
  std::int64_t first_column, columns;
  std::int32_t shift;  // vectors in a row, as a power of two

  __device__ __forceinline__ Tile(const Arguments& args, const Segment* segments, std::int64_t tile)
      : segment(segment_of(args, segments, tile)), shift(31 - __clz(args.tile_columns / Vector<T>::size)) {
    first_column = (tile - segment->first_tile) * args.tile_columns;
    columns = segment[1].first_column - segment->first_column;
  }

  __device__ __forceinline__ Place place(std::int32_t agent, std::int32_t column_in_tile) const {
    const std::int64_t column = first_column + column_in_tile, left = columns - column;
    const auto count = static_cast<std::int32_t>(left < Vector<T>::size ? left : Vector<T>::size);
    return {segment, agent, count, column, agent * columns + column};
  }

  __device__ __forceinline__ Place place(std::int32_t item) const { return place(item >> shift, column_in_tile(item)); }

  __device__ __forceinline__ std::int32_t column_in_tile(std::int32_t item) const {
    return (item & ((1 << shift) - 1)) * Vector<T>::size;
  }

  __device__ __forceinline__ std::int32_t items(std::int64_t rows) const {
    return static_cast<std::int32_t>(rows) << shift;
  }
};

// For tiles with one item a thread: u stays in registers, and one barrier a tile does, for the messages of the next
// tile go elsewhere.
template <typename Stored, typename S, int capacity>
__global__ void __launch_bounds__(max_threads(S::Q, S::M), 1)
    step_in_registers(const __grid_constant__ Launch<capacity> launch) {
  using Rule = Step<Stored, S>;
  using T = typename Stored::Compute;
  const Arguments& args = launch.arguments;
  const T* coefficients = stage_coefficients<T>(args, S::size);
  __syncthreads();
  const Graph<T> graph(args, shared_memory());
  graph.stage();  // not needed before the first tile's barrier
  const auto item = static_cast<std::int32_t>(threadIdx.x);
  int parity = 0;
  for (std::int64_t t = blockIdx.x; t < args.num_tiles; t += gridDim.x, parity ^= 1) {
    const Tile<T> tile(args, launch.segments, t);
    const Place place = tile.place(item);
    const bool is_there = place.agent < args.num_agents && place.count > 0;
    const SharedMessages<T, S::M> messages{reinterpret_cast<T*>(shared_memory() + args.layout.tile[parity]),
                                           args.tile_columns, tile.column_in_tile(item)};
    Vector<T> u[S::K];
    if (is_there) {
      Rule::load(args, place, u);
#pragma unroll
      for (int m = 0; m < S::M; ++m) messages(place.agent, m) = Rule::message(coefficients, m, u);
    }
    __syncthreads();
    if (is_there) {
      Vector<T> drift[S::M];
      graph.template drift<S>(place.agent, messages, drift);
      Rule::store_outputs(args, coefficients, place, u, drift);
    }
  }
}

// Messages of all rows to shared memory: computed, or as they were received.
template <typename Stored, typename S, typename T>
__device__ __forceinline__ void gather(const Arguments& args, const T* coefficients, const Tile<T>& tile) {
  T* messages = reinterpret_cast<T*>(shared_memory() + args.layout.tile[0]);
  spread(tile.items(args.num_rows), [&](std::int32_t item) {
    const Place place = tile.place(item);
    if (place.count <= 0) return;
    const SharedMessages<T, S::M> own{messages, args.tile_columns, tile.column_in_tile(item)};
    if (args.mixes_rows) {
      const RowMessages<Stored> rows{args, place};
#pragma unroll
      for (int m = 0; m < S::M; ++m) own(place.agent, m) = rows(place.agent, m);
    } else {
      Vector<T> u[S::K];
      Step<Stored, S>::load(args, place, u);
#pragma unroll
      for (int m = 0; m < S::M; ++m) own(place.agent, m) = Step<Stored, S>::message(coefficients, m, u);
    }
  });
  __syncthreads();
}

// For all other tiles, any number of items a thread: u is loaded a second time, mostly from the cache. Whether the
// graph is uniform or dense is the same for the whole block.
template <typename Stored, typename S, bool may_be_dense, int capacity>
__global__ void __launch_bounds__(kTileThreads, 1) step_in_tiles(const __grid_constant__ Launch<capacity> launch) {
  using Rule = Step<Stored, S>;
  using T = typename Stored::Compute;
  const Arguments& args = launch.arguments;
  const T* coefficients = stage_coefficients<T>(args, S::size);
  const Graph<T> graph(args, shared_memory());
  const Totals<T, S> totals(args, shared_memory());
  const Dense<T, S> dense(args, shared_memory());
  const bool uniform = is_uniform(args), near = args.layout.tile[0] != kNowhere;
  bool is_dense = false;
  if constexpr (may_be_dense) is_dense = !uniform && dense.stage();
  graph.stage();
  __syncthreads();
  for (std::int64_t t = blockIdx.x; t < args.num_tiles; t += gridDim.x) {
    const Tile<T> tile(args, launch.segments, t);
    T* messages = reinterpret_cast<T*>(shared_memory() + args.layout.tile[0]);
    if (near) gather<Stored, S>(args, coefficients, tile);
    if (uniform) totals.sum();
    if constexpr (may_be_dense) {
      if (is_dense) dense.replace_by_drift(tile, messages);
    }
    spread(tile.items(args.num_agents), [&](std::int32_t item) {
      const Place place = tile.place(item);
      if (place.count <= 0) return;
      const SharedMessages<T, S::M> shared{messages, args.tile_columns, tile.column_in_tile(item)};
      Vector<T> drift[S::M];
      if (uniform) {
        totals.drift(place.agent, tile.column_in_tile(item), drift);
      } else if (is_dense) {
#pragma unroll
        for (int m = 0; m < S::M; ++m) drift[m] = shared(place.agent, m);
      } else if (near) {
        graph.template drift<S>(place.agent, shared, drift);
      } else {
        graph.template drift<S>(place.agent, RowMessages<Stored>{args, place}, drift);
      }
      Vector<T> u[S::K];
      Rule::load(args, place, u);
      Rule::store_outputs(args, coefficients, place, u, drift);
    });
    __syncthreads();
  }
}

// The first half of the split form.
template <typename Stored, typename S, int capacity>
__global__ void __launch_bounds__(max_threads(S::Q, S::M), 1)
    send_messages(const __grid_constant__ Launch<capacity> launch) {
  using Rule = Step<Stored, S>;
  using T = typename Stored::Compute;
  const Arguments& args = launch.arguments;
  const T* coefficients = stage_coefficients<T>(args, S::size);
  __syncthreads();
  for (std::int64_t t = blockIdx.x; t < args.num_tiles; t += gridDim.x) {
    const Tile<T> tile(args, launch.segments, t);
    spread(tile.items(args.num_agents), [&](std::int32_t item) {
      const Place place = tile.place(item);
      if (place.count <= 0) return;
      Vector<T> u[S::K];
      Rule::load(args, place, u);
      const RowMessages<Stored> rows{args, place};
#pragma unroll
      for (int m = 0; m < S::M; ++m) rows.store(place.agent, m, Rule::message(coefficients, m, u));
    });
  }
}

}  // namespace gut_fast::cuda
