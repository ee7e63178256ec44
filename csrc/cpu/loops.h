// The loops over the columns of a row that are compiled for each shape of rule, storage and instruction tier, and the
// table of them. The split form has its own: see split_loops.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cpu/equations.h"
#include "cpu/instance.h"
#include "cpu/pattern.h"
#include "cpu/split_loops.h"
#include "cpu/storage.h"
#include "cpu/tiers.h"

namespace gut_fast::cpu {

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
              {},
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
              {},
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
