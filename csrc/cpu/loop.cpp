// What is compiled once for each instruction tier: the one loop of a step, and the little ones beside it. CMake
// compiles this file for each tier, with that tier's instructions; all of it but the tier itself is the file's own, so
// no linker can swap one tier's code for another's.
//
// The loop takes a block of columns of all agents, turn by turn. In a turn the message of one agent is computed and
// another agent, whose neighbours' messages are there, is mixed, a few vectors of columns at a time; the lines that
// later turns need are fetched on the way. A block is so small that everything in it stays in the nearest cache.
//
// Explicit vectors, one fixed order of summation and no fused multiply-add: every tier and every plan gives the same
// bits.
#include <cstdint>
#include <iterator>

#include "cpu/block.h"
#include "cpu/code_loop.h"
#include "cpu/lanes.h"
#include "cpu/pattern.h"
#include "cpu/storage.h"

namespace gut_fast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Brings a line into the nearest cache as its only owner, where the processor can.
GUT_FAST_INLINE void prefetch_to_write(const void* place) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(place)));
#else
  __builtin_prefetch(place, 1);
#endif
}

template <typename P, typename Stored>
class BlockLoop {
 public:
  static GUT_FAST_INLINE void run(const Block& given) {
    const Block block = given;  // one of our own, which the compiler knows that stores to rows do not change
    const auto split = block.columns - block.ahead % block.columns;
    auto place = block.begins_at + block.ahead / block.columns;
    for (const Turn* turn = block.turns; turn != block.end; ++turn, ++place) take(block, *turn, place, split);
  }

 private:
  using T = typename Stored::Compute;
  using Parameter = typename Stored::Parameter;
  using State = typename Stored::State;
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  using Lane = Lanes<T, kLanes>;
  using V = typename Lane::V;
  using With = Coefficients<P, V>;
  static constexpr int n = kVectors, M = P::M, K = P::K;
  static constexpr std::int64_t kStep = n * kLanes;

  static constexpr std::int64_t item(int k) { return k == 0 || k == K - 1 ? sizeof(Parameter) : sizeof(State); }

  // The rows of one agent.
  struct Rows {
    char* input[K];
    T* sent[M] = {};         // its messages,
    const T* mixed[M] = {};  // and what neighbours see of them
    With with;

    GUT_FAST_INLINE Parameter* z() const { return reinterpret_cast<Parameter*>(input[0]); }
    GUT_FAST_INLINE State* state(int k) const { return reinterpret_cast<State*>(input[k + 1]); }
    GUT_FAST_INLINE const Parameter* gradient() const { return reinterpret_cast<const Parameter*>(input[K - 1]); }

    GUT_FAST_INLINE Rows(const Block& block, std::int64_t agent)
        : with(With::of(static_cast<const T*>(block.coefficients) + agent * block.per_agent, block.zero_bits, Lane())) {
      for (int k = 0; k < K; ++k) input[k] = static_cast<char*>(block.input[k]) + agent * block.pitch[k] * item(k);
      if (block.gradient_scale != nullptr && block.gradient_scale[agent] == 0.0) {
        input[K - 1] = static_cast<char*>(const_cast<void*>(block.zeros));
      }
      for (int m = 0; m < messages(block); ++m) {
        sent[m] = static_cast<T*>(block.sent[agent * messages(block) + m]);
        if (block.mixed != nullptr) mixed[m] = static_cast<const T*>(block.mixed[agent * messages(block) + m]);
      }
    }
  };

  static GUT_FAST_INLINE bool has_state(const Block& block, int k) { return !P::serves_any || k < block.num_states; }
  static GUT_FAST_INLINE int messages(const Block& block) { return P::serves_any ? block.num_messages : M; }

  // Lines are fetched where a message is computed: `turns` turns and a part of a row ahead, which ends at `split`.
  static GUT_FAST_INLINE void take(const Block& block, const Turn& turn, std::int64_t place, std::int64_t split) {
    const bool sends = turn.message >= 0, mixes = turn.mix >= 0;
    const std::int64_t sender = sends ? turn.message : turn.mix, mixed = mixes ? turn.mix : turn.message;
    const Rows of_sender(block, sender), of_mixed(block, mixed);
    const char* fetched[K] = {};
    if (sends) find(block, place, block.columns - split, fetched);
    for (std::int64_t c = 0; c < block.columns; c += kStep) {
      if (sends) {
        if (c == split) find(block, place + 1, -split, fetched);
        fetch(block.fetch, fetched, c);
        message(block, of_sender, c);
      }
      if (mixes) mix(block, of_mixed, mixed, c);
    }
  }

  // The rows of the agent whose message comes at this place, counted on through the blocks that follow.
  static GUT_FAST_INLINE void find(const Block& block, std::int64_t place, std::int64_t shift, const char* (&rows)[K]) {
    if (block.fetch == Fetch::none) return;
    for (; place >= block.num_agents; place -= block.num_agents) shift += block.columns;
    const std::int64_t agent = block.message_order[place];
    for (int k = 0; k < K; ++k) {
      rows[k] = static_cast<const char*>(block.input[k]) + (agent * block.pitch[k] + shift) * item(k);
    }
  }

  static GUT_FAST_INLINE void fetch(Fetch how, const char* const (&rows)[K], std::int64_t c) {
    if (how == Fetch::none) return;
    for (int k = 0; k < K; ++k) {
      for (std::int64_t at = c * item(k); at < (c + kStep) * item(k); at += kLine) {
        if (how == Fetch::near || (how == Fetch::write && k == K - 1)) __builtin_prefetch(rows[k] + at);
        if (how == Fetch::outer) __builtin_prefetch(rows[k] + at, 0, 2);
        if (how == Fetch::write && k < K - 1) prefetch_to_write(rows[k] + at);
      }
    }
  }

  static GUT_FAST_INLINE void load(const Block& block, const Rows& rows, std::int64_t c, V (&u)[K]) {
    u[0] = Lane::load(rows.z() + c);
    for (int k = 0; k < P::Q; ++k) u[k + 1] = has_state(block, k) ? Lane::load(rows.state(k) + c) : V{};
    u[K - 1] = Lane::load(rows.gradient() + c);
  }

  // S_m = sum_k A[m][k] u_k; and the outputs that need no mixing.
  static GUT_FAST_INLINE void message(const Block& block, const Rows& rows, std::int64_t c) {
    for (int v = 0; v < n; ++v, c += kLanes) {
      V u[K], nothing[M] = {};
      load(block, rows, c, u);
      for (int m = 0; m < messages(block); ++m) {
        Sum<P, V> sum;
        sum.add(rows.with, P::A + m * K, u);
        Lane::store(rows.sent[m] + c, sum.value);
      }
      if (block.finishes) outputs<true>(block, rows, c, u, nothing, nothing);
    }
  }

  // D_m = sum_j W[i][j] (S_m(j) - S_m(i)), and the other outputs.
  static GUT_FAST_INLINE void mix(const Block& block, const Rows& rows, std::int64_t agent, std::int64_t c) {
    V drift[M][n];
    for (int m = 0; m < messages(block); ++m) {
      if (block.total != nullptr) {
        drift_of_all(block, rows, m, c, drift[m]);
      } else {
        drift_of_neighbors(block, rows, agent, m, c, drift[m]);
      }
    }
    for (int v = 0; v < n; ++v, c += kLanes) {
      V u[K], own[M] = {}, own_drift[M] = {};
      for (int m = 0; m < messages(block); ++m) {
        own[m] = Lane::load(rows.sent[m] + c);
        own_drift[m] = drift[m][v];
      }
      load(block, rows, c, u);
      outputs<false>(block, rows, c, u, own, own_drift);
    }
  }

  static GUT_FAST_INLINE void drift_of_neighbors(const Block& block, const Rows& rows, std::int64_t agent, int m,
                                                 std::int64_t c, V (&drift)[n]) {
    const T* own = rows.mixed[m] + c;
    V message[n];
    for (int v = 0; v < n; ++v) {
      message[v] = Lane::load(own + v * kLanes);
      drift[v] = V{};
    }
    const auto begin = block.row_start[agent], end = block.row_start[agent + 1];
    for (auto e = begin; e < end; ++e) {
      const auto* of_neighbor = static_cast<const T*>(block.mixed[block.neighbor[e] * messages(block) + m]) + c;
      const V weight = Lane::broadcast(static_cast<const T*>(block.weight)[e]);
      for (int v = 0; v < n; ++v) {
        const V term = weight * (Lane::load(of_neighbor + v * kLanes) - message[v]);
        drift[v] = e == begin ? term : drift[v] + term;  // not 0 + term, which would make -0 into 0
      }
    }
  }

  // Differences from the first message, not from zero: near consensus they keep their digits.
  static GUT_FAST_INLINE void drift_of_all(const Block& block, const Rows& rows, int m, std::int64_t c, V (&drift)[n]) {
    const V weight = Lane::broadcast(static_cast<const T*>(block.weight)[0]);
    const V all = Lane::broadcast(static_cast<T>(block.num_agents));
    const T* own = rows.sent[m] + c;
    const auto* first = static_cast<const T*>(block.sent[m]) + c;
    const auto* sum = static_cast<const T*>(block.total->sum[m]) + c;
    const auto* lost = static_cast<const T*>(block.total->lost[m]) + c;
    for (int v = 0; v < n; ++v) {
      const auto at = v * kLanes;
      const V rest = Lane::load(sum + at) - all * (Lane::load(own + at) - Lane::load(first + at));
      drift[v] = weight * (rest + Lane::load(lost + at));
    }
  }

  // o_l = sum_k B[l][k] u_k + sum_m C[l][m] S_m + sum_m E[l][m] D_m
  template <bool early>
  static GUT_FAST_INLINE void outputs(const Block& block, const Rows& rows, std::int64_t c, const V (&u)[K],
                                      const V (&message)[M], const V (&drift)[M]) {
    V output[P::L];
    for (int l = 0; l < P::L; ++l) {
      if (P::early(l) != early) continue;
      Sum<P, V> sum;
      sum.add(rows.with, P::B + l * K, u);
      sum.add(rows.with, P::C + l * M, message);
      sum.add(rows.with, P::E + l * M, drift);
      output[l] = sum.value;
    }
    if (P::early(0) == early) Lane::store(rows.z() + c, output[0]);
    for (int k = 0; k < P::Q; ++k) {
      if (P::early(k + 1) == early && has_state(block, k)) Lane::store(rows.state(k) + c, output[k + 1]);
    }
  }
};

// The sums of a complete graph: see Total.
template <typename T, int kLanes>
struct SumLoop {
  static GUT_FAST_INLINE void run(const SumArgs& args) {
    using Lane = Lanes<T, kLanes>;
    using V = typename Lane::V;
    for (int m = 0; m < args.num_messages; ++m) {
      for (std::int64_t c = 0; c < args.columns; c += kLanes) {
        const V first = Lane::load(static_cast<const T*>(args.sent[m]) + c);
        V total{}, lost{};
        for (std::int64_t agent = 0; agent < args.num_agents; ++agent) {
          const V value = Lane::load(static_cast<const T*>(args.sent[agent * args.num_messages + m]) + c) - first;
          const V sum = total + value, part = sum - total;
          lost = lost + ((total - (sum - part)) + (value - part));
          total = sum;
        }
        Lane::store(static_cast<T*>(args.total->sum[m]) + c, total);
        Lane::store(static_cast<T*>(args.total->lost[m]) + c, lost);
      }
    }
  }
};

// Calls columns(lanes, c) for all columns of a row, the last ones one by one.
template <int kLanes, typename Columns>
GUT_FAST_INLINE void each(std::int64_t count, Columns columns) {
  std::int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) columns(Lanes<float, kLanes>(), c);
  for (; c < count; ++c) columns(Lanes<float, 1>(), c);
}

template <int kLanes>
struct WidenLoop {
  static GUT_FAST_INLINE void run(const CopyArgs& args) {
    const auto* from = static_cast<const BFloat16*>(args.from);
    auto* to = static_cast<float*>(args.to);
    each<kLanes>(args.columns,
                 [=](auto lane, std::int64_t c) GUT_FAST_LAMBDA { lane.store(to + c, lane.load(from + c)); });
  }
};

template <int kLanes>
struct NarrowLoop {
  static GUT_FAST_INLINE void run(const CopyArgs& args) {
    const auto* from = static_cast<const float*>(args.from);
    auto* to = static_cast<BFloat16*>(args.to);
    each<kLanes>(args.columns,
                 [=](auto lane, std::int64_t c) GUT_FAST_LAMBDA { lane.store(to + c, lane.load(from + c)); });
  }
};

// The ceiling of a step: see stream.h.
template <typename Stored, int Q>
struct StreamLoop {
  using T = typename Stored::Compute;
  using Lane = Lanes<T, 1>;

  static GUT_FAST_INLINE void run(const StreamArgs& args) {
    auto* z = static_cast<typename Stored::Parameter*>(args.segment->parameters);
    const auto* g = static_cast<const typename Stored::Parameter*>(args.segment->gradients);
    typename Stored::State* state[Q + 1];
    for (int k = 0; k < Q; ++k) {
      state[k] = static_cast<typename Stored::State*>(args.step->state[k]) + args.segment->state_offset;
    }
    const auto end = args.end;
    GUT_FAST_VECTORIZE
    for (auto i = args.begin; i < end; ++i) {
      const T gradient = Lane::load(g + i);
      T move = gradient;
      for (int k = 0; k < Q; ++k) {
        const T value = Lane::load(state[k] + i);
        move += value;
        Lane::store(state[k] + i, T(0.5) * value + gradient);
      }
      Lane::store(z + i, Lane::load(z + i) - T(0.01) * move);
    }
  }
};

// Entries of the tier's table.
template <typename Loop, typename Args>
void run(const Args& args) {
  Loop::run(args);
}

constexpr int kFloats = kVectorBytes / sizeof(float), kDoubles = kVectorBytes / sizeof(double);

template <typename P, typename... Stored>
constexpr Instance instance(List<Stored...>) {
  return {P::Q, P::M, P::zero_bits, P::one_bits, {run<BlockLoop<P, Stored>, Block>...}};
}

// The rules of the table (generated from rules.py when building), and the shape that serves any rule: the only one for
// x86 processors from before AVX2 (2013).
constexpr Instance kInstances[] = {
#if !defined(__x86_64__) || defined(__AVX2__)
#define GUT_FAST_PATTERN(q, M, zeros, ones) instance<Pattern<q, M, zeros, ones>>(Storages{}),
#include "patterns.inc"
#undef GUT_FAST_PATTERN
#endif
    instance<AnyRule>(Storages{})};

template <typename... Stored>
constexpr Streams streams(List<Stored...>) {
  return {{{run<StreamLoop<Stored, 0>, StreamArgs>, run<StreamLoop<Stored, 1>, StreamArgs>,
            run<StreamLoop<Stored, 2>, StreamArgs>, run<StreamLoop<Stored, 3>, StreamArgs>}...}};
}

}  // namespace

extern const Tier GUT_FAST_TIER;
const Tier GUT_FAST_TIER = {std::begin(kInstances),
                            std::end(kInstances),
                            {kFloats, kDoubles},
                            {run<SumLoop<float, kFloats>, SumArgs>, run<SumLoop<double, kDoubles>, SumArgs>},
                            run<WidenLoop<kFloats>, CopyArgs>,
                            run<NarrowLoop<kFloats>, CopyArgs>,
                            run<EncodeLoop<kFloats>, CodeArgs>,
                            run<DecodeLoop<kFloats>, CodeArgs>,
                            streams(Storages{})};

}  // namespace gut_fast::cpu
