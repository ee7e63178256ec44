// The contract between the bindings, which read and check tensors, and the kernels of the CPU and of CUDA, which only
// compute: one step of one update rule, for all agents, in place.
//
//   message   S_m(i) = sum_k A[m][k] u_k(i)                         u = (z, state_1 ... state_q, scale(i) * g)
//   drift     D_m(i) = sum_j W[i][j] (S_m(j) - S_m(i))
//   outputs   o_l(i) = sum_k B[l][k] u_k(i) + sum_m C[l][m] S_m(i) + E[l][m] D_m(i)
//
// Pointers are the device's, but the tables of pointers themselves (segments, state, rows) are the host's, and the
// coefficients may be.
#pragma once

#include <cstdint>

namespace gut_fast {

// The half-width types are computed in float32. The CPU kernel does not serve float16.
enum class DType : std::int32_t { float32, float64, bfloat16, float16 };

// One parameter tensor of all agents: `columns` numbers per agent, agent after agent ([N, columns], contiguous).
// `state_offset` is where the same block starts in each state buffer, in elements. Null gradients count as zero.
struct Segment {
  void* parameters;
  const void* gradients;
  std::int64_t columns;
  std::int64_t state_offset;
};

// The off-diagonal non-zeros of W, row by row (CSR). The drift needs no diagonal.
struct Mixing {
  std::int64_t num_agents, num_edges;
  const std::int64_t* row_start;  // [num_agents + 1], the last is num_edges
  const std::int64_t* neighbor;   // [num_edges]
  const double* weight;           // same
};

struct StepArgs {
  DType dtype;                 // of parameters and gradients
  DType state_dtype;           // of the state
  int num_states;              // q
  int num_messages;            // M
  const double* coefficients;  // A [M, q+2], B [q+1, q+2], C [q+1, M], E [q+1, M], one after the other
  Mixing mixing;
  const double* gradient_scale;  // [num_agents], or null for ones; a scale of zero drops the gradient, NaN included
  void* const* state;            // q buffers, each holding all segments
  const Segment* segments;
  std::int64_t num_segments;
};

// What agents on several ranks send each other, for a step cut in two: row j holds messages 0 ... M-1 of agent j, each
// its whole model of `length` numbers, segment after segment. The first rows are those of the step's agents, null for
// who sends nothing to another rank; Mixing::neighbor indexes into all of them.
struct Rows {
  DType dtype;  // the type that is computed in, or bfloat16
  void* const* row;
  std::int64_t count;
  std::int64_t length;
};

}  // namespace gut_fast
