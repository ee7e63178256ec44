// The fused step on the columns of a row: the equations of an update rule in a few always-inline functions, and the
// loops over them, compiled for each shape of rule, storage and instruction tier. Explicit vectors, one fixed order of
// summation and no fused multiply-add: every tier, and the narrow loops of one column at a time, give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

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

template <typename Of, bool uniform>
struct MessageLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    const typename Of::Places row(args.sent, args.stride);
    const auto with = Of::with(args.sent);
    for (std::int64_t c = 0; c < args.sent.count; c += Of::Lane::count) Of::template message<uniform>(row, with, c);
  }
};

template <typename Of, Kind kind>
struct MixLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    const typename Of::Places row(args.mixed, args.stride);
    const auto with = Of::with(args.mixed);
    const typename Of::template Neighbors<kind> neighbors(args);
    Of::mix_all(row, with, neighbors, 0, args.mixed.count);
  }
};

// Calls columns(c) for the columns of a row, vector by vector, ahead(c) before each cache line of them and then(c, d)
// after each block of them, c to d; fetches the first lines of the rows that come next on the way.
template <typename Of, typename Ahead, typename Columns, typename Then>
GUT_FAST_INLINE void walk(const LoopArgs& args, Ahead ahead, Columns columns, Then then) {
  constexpr std::int64_t kLanes = Of::Lane::count, kLineColumns = kLine / sizeof(typename Of::T);
  constexpr std::int64_t kStride = kLineColumns > kLanes ? kLineColumns : kLanes;
  const auto count = args.sent.count;
  int line = 0;
  for (std::int64_t begin = 0; begin < count; begin += kBlock, ++line) {
    for (int k = 0; k < args.num_next && line < kHeadLines; ++k) {
      __builtin_prefetch(static_cast<const char*>(args.next[k]) + line * kLine, 0, 2);
    }
    const auto end = begin + kBlock < count ? begin + kBlock : count;
    const auto whole = begin + (end - begin) / kStride * kStride;
    for (auto c = begin; c < whole; c += kStride) {
      ahead(c);
      for (int i = 0; i < kStride; i += kLanes) columns(c + i);
    }
    for (auto c = whole; c < end; c += kLanes) columns(c);
    then(begin, end);
  }
}

// Split form: messages into rows that are sent, of type Wire; changes nothing else.
template <typename Of, typename Wire>
struct SendLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    using P = typename Of::Pattern;
    const typename Of::Places row(args.sent, args.stride);
    const auto with = Of::with(args.sent);
    for (std::int64_t c = 0; c < args.sent.count; c += Of::Lane::count) {
      typename Of::V u[P::K];
      Of::load(row, c, u);
      for (int m = 0; m < P::M; ++m) {
        Of::Lane::store(static_cast<Wire*>(args.outgoing[m]) + c, Of::message_of(with, m, u));
      }
    }
  }
};

template <typename Of>
struct WidenLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    for (int m = 0; m < Of::Pattern::M; ++m) {
      for (std::int64_t c = 0; c < args.sent.count; c += Of::Lane::count) {
        Of::Lane::store(static_cast<typename Of::T*>(args.outgoing[m]) + c,
                        Of::Lane::load(static_cast<const BFloat16*>(args.own[m]) + c));
      }
    }
  }
};

// Split form: drifts from the messages as they were sent; in the outputs they are computed anew, as they may have been
// rounded. A block of vectors at a time, as in mix_block.
template <typename Of>
struct CombineLoop {
  using P = typename Of::Pattern;
  using T = typename Of::T;
  using V = typename Of::V;
  using Lane = typename Of::Lane;
  static constexpr int kLanes = Lane::count;

  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    const typename Of::Places row(args.mixed, args.stride);
    const auto with = Of::with(args.mixed);
    std::int64_t c = 0;
    const auto count = args.mixed.count;
    for (; c + kBlockVectors * kLanes <= count; c += kBlockVectors * kLanes) block<kBlockVectors>(args, row, with, c);
    for (; c < count; c += kLanes) block<1>(args, row, with, c);
  }

  template <int n>
  static GUT_FAST_INLINE void block(const LoopArgs& args, const typename Of::Places& row, const typename Of::With& with,
                                    std::int64_t c) {
    V drift[P::M][n];
    for (int m = 0; m < P::M; ++m) drifts<n>(args, m, c, drift[m]);
    for (int v = 0; v < n; ++v) {
      V u[P::K], message[P::M], own_drift[P::M];
      Of::load(row, c + v * kLanes, u);
      for (int m = 0; m < P::M; ++m) {
        message[m] = Of::message_of(with, m, u);
        own_drift[m] = drift[m][v];
      }
      Of::template outputs<true>(row, with, c + v * kLanes, u, message, message);
      Of::template outputs<false>(row, with, c + v * kLanes, u, message, own_drift);
    }
  }

  template <int n>
  static GUT_FAST_INLINE void drifts(const LoopArgs& args, int m, std::int64_t c, V (&drift)[n]) {
    V own[n];
    for (int v = 0; v < n; ++v) {
      own[v] = Lane::load(static_cast<const T*>(args.own[m]) + c + v * kLanes);
      drift[v] = Lane::broadcast(T(0));
    }
    for (std::int64_t j = 0; j < args.degree; ++j) {
      const T* of_neighbor = static_cast<const T*>(args.incoming[j * P::M + m]) + c;
      const V weight = Lane::broadcast(static_cast<const T*>(args.weight)[j]);
      for (int v = 0; v < n; ++v) {
        const V term = weight * (Lane::load(of_neighbor + v * kLanes) - own[v]);
        drift[v] = j == 0 ? term : drift[v] + term;  // as in Neighbors::drifts
      }
    }
  }
};

struct Nothing {
  GUT_FAST_INLINE void operator()(std::int64_t, std::int64_t) const {}
};

// One message and one mix at a time.
template <typename Of, Kind kind>
struct BothLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    const typename Of::Places sent(args.sent, args.stride), mixed(args.mixed, args.stride);
    const auto message_with = Of::with(args.sent), mix_with = Of::with(args.mixed);
    const typename Of::template Neighbors<kind> neighbors(args);
    const auto ahead = [&](std::int64_t c) GUT_FAST_LAMBDA { Of::prefetch_ahead(sent, c); };
    const auto message = [&](std::int64_t c)
                             GUT_FAST_LAMBDA { Of::template message<kind == kUniform>(sent, message_with, c); };
    if constexpr (kind == kAnyDegree) {
      walk<Of>(args, ahead, message, [&](std::int64_t begin, std::int64_t end) GUT_FAST_LAMBDA {
        Of::mix_all(mixed, mix_with, neighbors, begin, end);
      });
    } else {
      const auto both = [&](std::int64_t c) GUT_FAST_LAMBDA {
        message(c);
        Of::mix(mixed, mix_with, neighbors, c);
      };
      walk<Of>(args, ahead, both, Nothing());
    }
  }
};

// Two steps along a path: `mixed`, `sent` and `after` follow each other, and the middle one is mixed in the same
// iteration in which its message is computed, from registers. Rings and chains are paths but for their ends. It saves
// the loads that bound the loop where memory does not: 0.75 of the ceiling without, 0.82 with it (16-ring, Zen 3).
template <typename Of>
struct ChainLoop {
  using V = typename Of::V;
  using Places = typename Of::Places;
  using Neighbors = typename Of::template Neighbors<kDegree2>;
  static constexpr int M = Of::Pattern::M, K = Of::Pattern::K;

  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    const Places mixed(args.mixed, args.stride), sent(args.sent, args.stride), after(args.after, args.stride);
    const auto with = Of::with(args.sent);
    const Neighbors neighbors(args);
    const auto* weight = static_cast<const typename Of::T*>(args.chain_weight);
    const V weights[2] = {Of::Lane::broadcast(weight[0]), Of::Lane::broadcast(weight[1])};
    walk<Of>(
        args,
        [&](std::int64_t c) GUT_FAST_LAMBDA {
          Of::prefetch_ahead(sent, c);
          Of::prefetch_ahead(after, c);
        },
        [&](std::int64_t c) GUT_FAST_LAMBDA { columns(mixed, sent, after, with, neighbors, weights, c); }, Nothing());
  }

  static GUT_FAST_INLINE void columns(const Places& mixed, const Places& sent, const Places& after,
                                      const typename Of::With& with, const Neighbors& neighbors, const V (&weights)[2],
                                      std::int64_t c) {
    V u[K], sent_u[K], after_u[K], older[M], message[M], newer[M], drift[M];
    Of::template send<false>(sent, with, c, sent_u, message);
    Of::load(mixed, c, u);
    for (int m = 0; m < M; ++m) {
      const auto at = m * mixed.stride + c;
      older[m] = Of::Lane::load(mixed.own + at);
      const V first = neighbors.weight[0] * (Of::Lane::load(neighbors.neighbor[0] + at) - older[m]);
      drift[m] = first + neighbors.weight[1] * (message[m] - older[m]);
    }
    Of::template outputs<false>(mixed, with, c, u, older, drift);
    Of::template send<false>(after, with, c, after_u, newer);
    for (int m = 0; m < M; ++m) {
      const V first = weights[0] * (older[m] - message[m]);
      drift[m] = first + weights[1] * (newer[m] - message[m]);
    }
    Of::template outputs<false>(sent, with, c, sent_u, message, drift);
  }
};

// The loops of the split form.
template <typename Of, typename Tier>
constexpr void add_split(Loops& loops) {
  loops.send[0] = Tier::template run<SendLoop<Of, typename Of::T>, const LoopArgs&>;
  loops.combine = Tier::template run<CombineLoop<Of>, const LoopArgs&>;
  if constexpr (sizeof(typename Of::T) == sizeof(float)) {
    loops.send[1] = Tier::template run<SendLoop<Of, BFloat16>, const LoopArgs&>;
    loops.widen = Tier::template run<WidenLoop<Of>, const LoopArgs&>;
  }
}

// What a pattern has loops for: any rule runs, those of the table fast. Double precision has no degrees of its own.
template <typename P, typename Stored, typename Tier>
constexpr Loops wide_loops() {
  constexpr int kLanes = Tier::vector_bytes / sizeof(typename Stored::Compute);
  using Of = Equations<P, Stored, kLanes>;
  Loops loops{kLanes,
              {nullptr, Tier::template run<MessageLoop<Of, false>, const LoopArgs&>},
              {nullptr, Tier::template run<MixLoop<Of, kAnyDegree>, const LoopArgs&>},
              {nullptr, Tier::template run<BothLoop<Of, kAnyDegree>, const LoopArgs&>},
              nullptr,
              {},
              nullptr,
              nullptr};
  add_split<Of, Tier>(loops);
  if constexpr (!P::dense) {
    loops.message[kUniform] = Tier::template run<MessageLoop<Of, true>, const LoopArgs&>;
    loops.mix[kUniform] = Tier::template run<MixLoop<Of, kUniform>, const LoopArgs&>;
    loops.both[kUniform] = Tier::template run<BothLoop<Of, kUniform>, const LoopArgs&>;
    if constexpr (sizeof(typename Stored::Compute) == sizeof(float)) {
      loops.chain = Tier::template run<ChainLoop<Of>, const LoopArgs&>;
      loops.both[kDegree1] = Tier::template run<BothLoop<Of, kDegree1>, const LoopArgs&>;
      loops.both[kDegree2] = Tier::template run<BothLoop<Of, kDegree2>, const LoopArgs&>;
      loops.both[kDegree3] = Tier::template run<BothLoop<Of, kDegree3>, const LoopArgs&>;
      loops.both[kDegree4] = Tier::template run<BothLoop<Of, kDegree4>, const LoopArgs&>;
    }
  }
  return loops;
}

template <typename P, typename Stored>
constexpr Loops one_by_one() {
  using Of = Equations<P, Stored, 1>;
  Loops loops{1,
              {nullptr, Baseline::run<MessageLoop<Of, false>, const LoopArgs&>},
              {nullptr, Baseline::run<MixLoop<Of, kAnyDegree>, const LoopArgs&>},
              {},
              nullptr,
              {},
              nullptr,
              nullptr};
  add_split<Of, Baseline>(loops);
  if constexpr (!P::dense) {
    loops.message[kUniform] = Baseline::run<MessageLoop<Of, true>, const LoopArgs&>;
    loops.mix[kUniform] = Baseline::run<MixLoop<Of, kUniform>, const LoopArgs&>;
  }
  return loops;
}

struct Wide {
  template <typename P, typename Stored, typename Tier>
  static constexpr Loops loops() {
    return wide_loops<P, Stored, Tier>();
  }
};

struct Narrow {
  template <typename P, typename Stored, typename Tier>
  static constexpr Loops loops() {
    return one_by_one<P, Stored>();
  }
};

template <typename Width, typename Tier, typename P, typename... Stored>
constexpr Instance instance(List<Stored...>) {
  return {P::Q, P::M, P::zero_bits, P::one_bits, {Width::template loops<P, Stored, Tier>()...}};
}

// The rules of the table first (generated from rules.py when building), then the dense shapes that serve any rule.
template <typename Width, typename Tier>
constexpr Instance instances[] = {
#define GUT_FAST_PATTERN(q, M, zeros, ones) instance<Width, Tier, Pattern<q, M, zeros, ones>>(Storages{}),
#include "patterns.inc"
    GUT_FAST_PATTERN(0, 1, 0, 0) GUT_FAST_PATTERN(0, 2, 0, 0) GUT_FAST_PATTERN(1, 1, 0, 0) GUT_FAST_PATTERN(1, 2, 0, 0)
        GUT_FAST_PATTERN(2, 1, 0, 0) GUT_FAST_PATTERN(2, 2, 0, 0) GUT_FAST_PATTERN(3, 1, 0, 0)
            GUT_FAST_PATTERN(3, 2, 0, 0)
#undef GUT_FAST_PATTERN
};

template <typename Tier>
constexpr TierEntry tier_entry() {
  return {Tier::name, Tier::available, std::begin(instances<Wide, Tier>), std::end(instances<Wide, Tier>)};
}

}  // namespace gut_fast::cpu
