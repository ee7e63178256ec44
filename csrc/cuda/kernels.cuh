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
// on. step_in_tiles has 58. The largest rules have up to 90 and 106 registers; a spill fails the build. Dense and
// complete graphs have no kernels of their own: whether a GPU asks for them has not been measured yet.
#pragma once

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
__device__ __forceinline__ const Entry* segment_of(const Launch& launch, std::int64_t tile) {
  int first = 0, last = launch.arguments.num_entries - 1;
  while (first < last) {
    const int middle = (first + last + 1) / 2;
    if (launch.entries[middle].first_tile <= tile) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return launch.entries + first;
}

// The items of a tile: vectors of columns, agent after agent.
template <typename T>
struct Tile {
  const Entry* segment;
  std::int64_t first_column, columns;
  std::int32_t shift;  // vectors in a row, as a power of two

  __device__ __forceinline__ Tile(const Launch& launch, std::int64_t tile)
      : segment(segment_of(launch, tile)), shift(31 - __clz(launch.arguments.tile_columns / Vector<T>::size)) {
    first_column = (tile - segment->first_tile) * launch.arguments.tile_columns;
    columns = segment[1].first_column - segment->first_column;
  }

  __device__ __forceinline__ Item item(std::int32_t number) const {
    const std::int32_t agent = number >> shift;
    const std::int64_t column = first_column + column_in_tile(number), left = columns - column;
    const auto count = static_cast<std::int32_t>(left < Vector<T>::size ? left : Vector<T>::size);
    return {segment, agent, count, column, agent * columns + column};
  }

  __device__ __forceinline__ std::int32_t column_in_tile(std::int32_t number) const {
    return (number & ((1 << shift) - 1)) * Vector<T>::size;
  }

  __device__ __forceinline__ std::int32_t items(std::int64_t rows) const {
    return static_cast<std::int32_t>(rows) << shift;
  }
};

// For tiles with one item a thread: u stays in registers, and one barrier a tile does, for the messages of the next
// tile go elsewhere.
template <typename Stored, typename S>
__global__ void __launch_bounds__(max_threads(S::Q, S::M), 1) step_in_registers(const __grid_constant__ Launch launch) {
  using Rule = Step<Stored, S>;
  using T = typename Stored::Compute;
  const Arguments& args = launch.arguments;
  const T* coefficients = stage_coefficients<T>(args, S::size);
  __syncthreads();
  const Graph<T> graph(args, shared_memory());
  graph.stage();  // not needed before the first tile's barrier
  const auto number = static_cast<std::int32_t>(threadIdx.x);
  int parity = 0;
  for (std::int64_t t = blockIdx.x; t < args.num_tiles; t += gridDim.x, parity ^= 1) {
    const Tile<T> tile(launch, t);
    const Item item = tile.item(number);
    const bool is_there = item.agent < args.mixing.num_agents && item.count > 0;
    const SharedMessages<T, S::M> messages{reinterpret_cast<T*>(shared_memory() + args.layout.tile[parity]),
                                           args.tile_columns, tile.column_in_tile(number)};
    Vector<T> u[S::K];
    if (is_there) {
      Rule::load(args, item, u);
#pragma unroll
      for (int m = 0; m < S::M; ++m) messages(item.agent, m) = Rule::message(coefficients, m, u);
    }
    __syncthreads();
    if (is_there) {
      Vector<T> drift[S::M];
      graph.template drift<S>(item.agent, messages, drift);
      Rule::store_outputs(args, coefficients, item, u, drift);
    }
  }
}

// A tile's messages of all rows to shared memory, computed or as they were received; for `message`, which mixes
// nothing, to the rows.
template <typename Stored, typename S, typename T>
__device__ __forceinline__ void gather(const Arguments& args, const T* coefficients, const Tile<T>& tile) {
  T* messages = reinterpret_cast<T*>(shared_memory() + args.layout.tile[0]);
  spread(tile.items(args.num_rows), [&](std::int32_t number) {
    const Item item = tile.item(number);
    if (item.count <= 0) return;
    const SharedMessages<T, S::M> shared{messages, args.tile_columns, tile.column_in_tile(number)};
    const RowMessages<Stored> rows{args, item};
    if (args.work == Work::combine) {
#pragma unroll
      for (int m = 0; m < S::M; ++m) shared(item.agent, m) = rows(item.agent, m);
      return;
    }
    Vector<T> u[S::K];
    Step<Stored, S>::load(args, item, u);
#pragma unroll
    for (int m = 0; m < S::M; ++m) {
      const Vector<T> message = Step<Stored, S>::message(coefficients, m, u);
      if (args.work == Work::message) {
        rows.store(item.agent, m, message);
      } else {
        shared(item.agent, m) = message;
      }
    }
  });
}

// For all other tiles, any number of items a thread: u is loaded a second time, mostly from the cache. And for the
// halves of a step cut in two.
template <typename Stored, typename S>
__global__ void __launch_bounds__(kTileThreads, 1) step_in_tiles(const __grid_constant__ Launch launch) {
  using Rule = Step<Stored, S>;
  using T = typename Stored::Compute;
  const Arguments& args = launch.arguments;
  const T* coefficients = stage_coefficients<T>(args, S::size);
  const Graph<T> graph(args, shared_memory());
  graph.stage();
  __syncthreads();
  const bool near = args.layout.tile[0] != kNowhere, is_message = args.work == Work::message;
  for (std::int64_t t = blockIdx.x; t < args.num_tiles; t += gridDim.x) {
    const Tile<T> tile(launch, t);
    if (near || is_message) gather<Stored, S>(args, coefficients, tile);
    if (is_message) continue;
    __syncthreads();
    T* messages = reinterpret_cast<T*>(shared_memory() + args.layout.tile[0]);
    spread(tile.items(args.mixing.num_agents), [&](std::int32_t number) {
      const Item item = tile.item(number);
      if (item.count <= 0) return;
      Vector<T> drift[S::M];
      if (near) {
        const SharedMessages<T, S::M> shared{messages, args.tile_columns, tile.column_in_tile(number)};
        graph.template drift<S>(item.agent, shared, drift);
      } else {
        graph.template drift<S>(item.agent, RowMessages<Stored>{args, item}, drift);
      }
      Vector<T> u[S::K];
      Rule::load(args, item, u);
      Rule::store_outputs(args, coefficients, item, u, drift);
    });
    __syncthreads();
  }
}

}  // namespace gut_fast::cuda
