// The equations of an update rule on the columns of a row, in a few always-inline functions, for each shape of rule,
// storage and number of lanes. Explicit vectors, one fixed order of summation and no fused multiply-add: every tier,
// and the narrow loops of one column at a time, give the same bits.
#pragma once

#include <cstdint>

#include "cpu/instance.h"
#include "cpu/pattern.h"
#include "cpu/storage.h"
#include "cpu/tiers.h"

namespace gut_fast::cpu {

constexpr std::int64_t kAhead = 128;  // columns: how far ahead in a row its next lines are fetched
constexpr int kBlockVectors = 4;      // that one loop over the neighbours serves: with 4 messages, 4 sums in registers

template <typename P, typename Stored, int kLanes>
struct Equations {
  using Pattern = P;
  using T = typename Stored::Compute;
  using Parameter = typename Stored::Parameter;
  using State = typename Stored::State;
  using Lane = Lanes<T, kLanes>;
  using V = typename Lane::V;
  using With = Coefficients<P, T, V>;

  // A row's addresses in their types.
  struct Places {
    Parameter* z;
    State* state[P::Q + 1];
    const Parameter* gradient;
    T *own, *first, *total, *lost;
    std::int64_t stride;

    GUT_FAST_INLINE Places(const Row& row, std::int64_t stride)
        : z(static_cast<Parameter*>(row.z)),
          gradient(static_cast<const Parameter*>(row.gradient)),
          own(static_cast<T*>(row.own)),
          first(static_cast<T*>(row.first)),
          total(static_cast<T*>(row.total)),
          lost(static_cast<T*>(row.lost)),
          stride(stride) {
      for (int k = 0; k < P::Q; ++k) state[k] = static_cast<State*>(row.state[k]);
    }
  };

  template <Kind kind>
  struct Neighbors {
    static constexpr int known = kind >= kDegree1 ? kind - kDegree1 + 1 : 0;
    const T* neighbor[known + 1];
    V weight[known + 1];
    const LoopArgs& args;

    GUT_FAST_INLINE explicit Neighbors(const LoopArgs& args) : args(args) {
      for (int j = 0; j < known; ++j) {
        neighbor[j] = row_of(j);
        weight[j] = weight_of(j);
      }
      if (kind == kUniform) weight[0] = weight_of(0);
    }

    GUT_FAST_INLINE const T* row_of(std::int64_t j) const {
      return static_cast<const T*>(args.scratch) + args.slot[j] * P::M * args.stride;
    }

    GUT_FAST_INLINE V weight_of(std::int64_t j) const { return Lane::broadcast(static_cast<const T*>(args.weight)[j]); }

    // sum_j W[i][j] (S(j) - S(i)) of a block of vectors, whose sums do not wait for each other.
    template <int n>
    GUT_FAST_INLINE void drifts(const V (&message)[n], std::int64_t at, V (&drift)[n]) const {
      for (int v = 0; v < n; ++v) drift[v] = Lane::broadcast(T(0));
      for (std::int64_t j = 0; j < args.degree; ++j) {
        const T* of_neighbor = row_of(j) + at;
        const V weight = weight_of(j);
        for (int v = 0; v < n; ++v) {
          const V term = weight * (Lane::load(of_neighbor + v * kLanes) - message[v]);
          drift[v] = j == 0 ? term : drift[v] + term;  // not 0 + term, which would make -0 into 0
        }
      }
    }

    // The same of one vector.
    GUT_FAST_INLINE V drift(const Places& row, V message, std::int64_t at) const {
      V drift = Lane::broadcast(T(0));
      if constexpr (kind == kUniform) {
        // Differences from the first message, not from zero: near consensus they keep their digits.
        const V all = Lane::broadcast(static_cast<T>(args.num_agents));
        const V rest = Lane::load(row.total + at) - all * (message - Lane::load(row.first + at));
        drift = weight[0] * (rest + Lane::load(row.lost + at));
      } else {
        for (int j = 0; j < known; ++j) {
          const V term = weight[j] * (Lane::load(neighbor[j] + at) - message);
          drift = j == 0 ? term : drift + term;
        }
      }
      return drift;
    }
  };

  static GUT_FAST_INLINE void load(const Places& row, std::int64_t c, V (&u)[P::K]) {
    u[0] = Lane::load(row.z + c);
    for (int k = 0; k < P::Q; ++k) u[k + 1] = Lane::load(row.state[k] + c);
    u[P::K - 1] = Lane::load(row.gradient + c);
  }

  // What rounding loses is kept beside the sum (Knuth's two-sum): all agents are mixed with this one, so its error
  // would move their mean, which nothing pulls back.
  static GUT_FAST_INLINE void add_to_total(const Places& row, V value, std::int64_t at) {
    const bool begins = row.own == row.first;
    const V before = begins ? Lane::broadcast(T(0)) : Lane::load(row.total + at);
    const V lost = begins ? Lane::broadcast(T(0)) : Lane::load(row.lost + at);
    const V sum = before + value, part = sum - before;
    Lane::store(row.total + at, sum);
    Lane::store(row.lost + at, lost + ((before - (sum - part)) + (value - part)));
  }

  // S_m = sum_k A[m][k] u_k
  static GUT_FAST_INLINE V message_of(const With& with, int m, const V (&u)[P::K]) {
    Sum<P, V> sum;
    sum.add(with, P::A + m * P::K, u);
    return sum.value;
  }

  // Messages to scratch; and the outputs that need no mixing.
  template <bool uniform>
  static GUT_FAST_INLINE void message(const Places& row, const With& with, std::int64_t c) {
    V u[P::K], message[P::M];
    send<uniform>(row, with, c, u, message);
  }

  template <bool uniform>
  static GUT_FAST_INLINE void send(const Places& row, const With& with, std::int64_t c, V (&u)[P::K],
                                   V (&message)[P::M]) {
    load(row, c, u);
    for (int m = 0; m < P::M; ++m) {
      const auto at = m * row.stride + c;
      message[m] = message_of(with, m, u);
      Lane::store(row.own + at, message[m]);
      if constexpr (uniform) add_to_total(row, message[m] - Lane::load(row.first + at), at);
    }
    outputs<true>(row, with, c, u, message, message);
  }

  // D_m = sum_j W[i][j] (S_m(j) - S_m(i)), and the outputs.
  template <Kind kind>
  static GUT_FAST_INLINE void mix(const Places& row, const With& with, const Neighbors<kind>& neighbors,
                                  std::int64_t c) {
    V u[P::K], message[P::M], drift[P::M];
    for (int m = 0; m < P::M; ++m) {
      const auto at = m * row.stride + c;
      message[m] = Lane::load(row.own + at);
      drift[m] = neighbors.drift(row, message[m], at);
    }
    load(row, c, u);
    outputs<false>(row, with, c, u, message, drift);
  }

  // The same for a block of n vectors and any number of neighbours: each neighbour's row is found once for all of them.
  template <int n>
  static GUT_FAST_INLINE void mix_block(const Places& row, const With& with, const Neighbors<kAnyDegree>& neighbors,
                                        std::int64_t c) {
    V message[P::M][n], drift[P::M][n];
    for (int m = 0; m < P::M; ++m) {
      const auto at = m * row.stride + c;
      for (int v = 0; v < n; ++v) message[m][v] = Lane::load(row.own + at + v * kLanes);
      neighbors.template drifts<n>(message[m], at, drift[m]);
    }
    for (int v = 0; v < n; ++v) {
      V u[P::K], own[P::M], own_drift[P::M];
      for (int m = 0; m < P::M; ++m) {
        own[m] = message[m][v];
        own_drift[m] = drift[m][v];
      }
      load(row, c + v * kLanes, u);
      outputs<false>(row, with, c + v * kLanes, u, own, own_drift);
    }
  }

  template <Kind kind>
  static GUT_FAST_INLINE void mix_all(const Places& row, const With& with, const Neighbors<kind>& neighbors,
                                      std::int64_t begin, std::int64_t end) {
    auto c = begin;
    if constexpr (kind == kAnyDegree) {
      for (; c + kBlockVectors * kLanes <= end; c += kBlockVectors * kLanes) {
        mix_block<kBlockVectors>(row, with, neighbors, c);
      }
      for (; c < end; c += kLanes) mix_block<1>(row, with, neighbors, c);
    } else {
      for (; c < end; c += kLanes) mix(row, with, neighbors, c);
    }
  }

  // o_l = sum_k B[l][k] u_k + sum_m C[l][m] S_m + sum_m E[l][m] D_m
  template <bool early>
  static GUT_FAST_INLINE void outputs(const Places& row, const With& with, std::int64_t c, const V (&u)[P::K],
                                      const V (&message)[P::M], const V (&drift)[P::M]) {
    V output[P::L];
    for (int l = 0; l < P::L; ++l) {
      if (P::early(l) != early) continue;
      Sum<P, V> sum;
      sum.add(with, P::B + l * P::K, u);
      sum.add(with, P::C + l * P::M, message);
      sum.add(with, P::E + l * P::M, drift);
      output[l] = sum.value;
    }
    if (P::early(0) == early) Lane::store(row.z + c, output[0]);
    for (int l = 1; l < P::L; ++l) {
      if (P::early(l) == early) Lane::store(row.state[l - 1] + c, output[l]);
    }
  }

  static GUT_FAST_INLINE With with(const Row& row) { return With::of(static_cast<const T*>(row.coefficients), Lane()); }

  static GUT_FAST_INLINE void prefetch_ahead(const Places& row, std::int64_t c) {
    __builtin_prefetch(row.z + c + kAhead);
    for (int k = 0; k < P::Q; ++k) __builtin_prefetch(row.state[k] + c + kAhead);
    __builtin_prefetch(row.gradient + c + kAhead);
  }
};

}  // namespace gut_fast::cpu
