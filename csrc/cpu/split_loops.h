// The loops of the split form. Rows of messages are found through LoopArgs::place, whether they are read where they
// came, written where they leave from, or lie in the scratch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/equations.h"
#include "cpu/instance.h"
#include "cpu/storage.h"
#include "cpu/tiers.h"

namespace gut_fast::cpu {

// Messages, stored as Wire. What rounding takes from one is added to the next: their sum stays right to one rounding.
template <typename Of, typename Wire>
struct SendLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    using P = typename Of::Pattern;
    const typename Of::Places row(args.sent, args.stride);
    const auto with = Of::with(args.sent);
    void* const* place = args.place + args.sent.agent * P::M;
    for (std::int64_t c = 0; c < args.sent.count; c += Of::Lane::count) {
      typename Of::V u[P::K];
      Of::load(row, c, u);
      for (int m = 0; m < P::M; ++m) {
        store(static_cast<Wire*>(place[m]) + c, Of::message_of(with, m, u), args.residual[m], c);
      }
    }
  }

 private:
  static GUT_FAST_INLINE void store(Wire* sent, typename Of::V message, void* residual, std::int64_t c) {
    auto* left = static_cast<typename Of::T*>(residual);
    if (std::is_same_v<Wire, typename Of::T> || left == nullptr) return Of::Lane::store(sent, message);
    message = message + Of::Lane::load(left + c);
    Of::Lane::store(sent, message);
    Of::Lane::store(left + c, message - Of::Lane::load(sent));
  }
};

// bfloat16 messages that came, in the type that is computed in.
template <typename Of>
struct WidenLoop {
  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    using P = typename Of::Pattern;
    void* const* place = args.place + args.sent.agent * P::M;
    for (int m = 0; m < P::M; ++m) {
      const auto* rounded = static_cast<const BFloat16*>(args.rounded[m]);
      for (std::int64_t c = 0; c < args.sent.count; c += Of::Lane::count) {
        Of::Lane::store(static_cast<typename Of::T*>(place[m]) + c, Of::Lane::load(rounded + c));
      }
    }
  }
};

// Drifts of the messages as they were sent, and all outputs; in these the messages are computed anew, as what was sent
// may have been rounded. One pass over the columns, a block of vectors at a time: see Equations::mix_block.
template <typename Of, typename Wire>
struct CombineLoop {
  using P = typename Of::Pattern;
  using T = typename Of::T;
  using V = typename Of::V;
  using Lane = typename Of::Lane;
  static constexpr int kLanes = Lane::count;

  static GUT_FAST_INLINE void run(const LoopArgs& args) {
    const typename Of::Places row(args.mixed, args.stride);
    const auto with = Of::with(args.mixed);
    const auto count = args.mixed.count;
    std::int64_t c = 0;
    if constexpr (kLanes > 1) {
      for (; c + kBlockVectors * kLanes <= count; c += kBlockVectors * kLanes) block<kBlockVectors>(args, row, with, c);
    }
    for (; c < count; c += kLanes) block<1>(args, row, with, c);
  }

 private:
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

  static GUT_FAST_INLINE const Wire* sent_by(const LoopArgs& args, std::int64_t agent, int m) {
    return static_cast<const Wire*>(args.place[agent * P::M + m]);
  }

  // In the order of Neighbors::drifts, whose bits these are.
  template <int n>
  static GUT_FAST_INLINE void drifts(const LoopArgs& args, int m, std::int64_t c, V (&drift)[n]) {
    const Wire* own = sent_by(args, args.mixed.agent, m) + c;
    for (int v = 0; v < n; ++v) drift[v] = Lane::broadcast(T(0));
    for (std::int64_t j = 0; j < args.degree; ++j) {
      const Wire* of_neighbor = sent_by(args, args.neighbor[j], m) + c;
      const V weight = Lane::broadcast(static_cast<const T*>(args.weight)[j]);
      for (int v = 0; v < n; ++v) {
        const V term = weight * (Lane::load(of_neighbor + v * kLanes) - Lane::load(own + v * kLanes));
        drift[v] = j == 0 ? term : drift[v] + term;
      }
    }
  }
};

// bfloat16 rows are mixed as they are by the rules of the table; others, and the few columns that do not fill a vector,
// have them widened first.
template <typename Of, typename Tier>
constexpr void add_split(Loops& loops) {
  loops.send[0] = Tier::template run<SendLoop<Of, typename Of::T>, const LoopArgs&>;
  loops.combine[0] = Tier::template run<CombineLoop<Of, typename Of::T>, const LoopArgs&>;
  if constexpr (sizeof(typename Of::T) == sizeof(float)) {
    loops.send[1] = Tier::template run<SendLoop<Of, BFloat16>, const LoopArgs&>;
    loops.widen = Tier::template run<WidenLoop<Of>, const LoopArgs&>;
    if constexpr (!Of::Pattern::dense && Of::Lane::count > 1) {
      loops.combine[1] = Tier::template run<CombineLoop<Of, BFloat16>, const LoopArgs&>;
    }
  }
}

}  // namespace gut_fast::cpu
