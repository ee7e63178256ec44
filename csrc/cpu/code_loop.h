// The loops that make and read codes, for one instruction tier: loop.cpp includes this file, and all of it is its own.
//
// A block is always taken whole: the last one of a tensor is filled up with zeros, which change nothing. `position` is
// that of a block's first number, and those that share a word are `stride` apart. Numbers are rounded by adding 1.5 *
// 2^23, whose low bits then are the integer: to the nearest, ties to even, in every tier.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/codes.h"
#include "cpu/lanes.h"
#include "cpu/storage.h"

namespace gut_fast::cpu {
namespace {

constexpr float kMagic = 12582912.0f, kNaN = std::numeric_limits<float>::quiet_NaN(),
                kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kMagicBits = 0x4b400000;
constexpr float kLeastDifference = 0x1p-118f, kLeastWidth = 0x1p-100f, kMostWidth = 0x1p100f, kMargin = 0.4375f;

template <typename To, typename From>
GUT_FAST_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Words of a block's codes.
constexpr std::int64_t words_of(int bits) { return kCodeBlock * bits / 32; }

// 14 bits of a number and two keys.
template <typename W>
GUT_FAST_INLINE W hashed(W x, std::uint32_t first, std::uint32_t second) {
  x = x ^ first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + second) * 0x846ca68bu;
  return x >> 18;
}

// The factors of the check sum: h of its sixteen columns, and 5^(15 - t) h by Horner's rule.
constexpr int kCheckColumns = 16;
struct CheckFactors {
  std::uint32_t of[kCheckColumns] = {};
  constexpr CheckFactors() {
    for (std::uint32_t p = 0; p < kCheckColumns; ++p) of[p] = (hash(p, 1) << 18 | hash(p, 2) << 4) | 1;
  }
  static constexpr std::uint32_t hash(std::uint32_t x, std::uint32_t key) {
    x ^= key;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x >> 18;
  }
};
constexpr CheckFactors kCheckFactors;

template <int kLanes>
struct CodeBlocks {
  using Lane = Lanes<float, kLanes>;
  using V = typename Lane::V;
  using Word = typename VectorOf<std::uint32_t, kLanes>::type;
  using Int = typename VectorOf<std::int32_t, kLanes>::type;

  static GUT_FAST_INLINE V all(float value) { return Lane::broadcast(value); }
  static GUT_FAST_INLINE V rounded(V shifted) { return shifted - all(kMagic); }
  static GUT_FAST_INLINE Int integer(V shifted) { return bits_of<Int>(shifted) - kMagicBits; }
  static GUT_FAST_INLINE V floats(Int value) { return __builtin_convertvector(value, V); }

  static constexpr int kParts = kCheckColumns / kLanes;  // vectors of words between which the check sum goes around

  // Calls body(w, k) for the words of a block, a vector of them at a time: from the w-th on, which is the k-th in turn.
  template <int bits, typename Body>
  static GUT_FAST_INLINE void each_words(Body body) {
    for (std::int64_t w = 0; w < words_of(bits); w += kCheckColumns) {
      for (int k = 0; k < kParts; ++k) body(w + k * kLanes, k);
    }
  }

  // Where the j-th numbers of these words are, and their codes at the place of theirs in the words.
  template <int bits>
  static GUT_FAST_INLINE std::int64_t number(std::int64_t w, int j) {
    return j * words_of(bits) + w;
  }
  template <int bits>
  static GUT_FAST_INLINE Word placed(V shifted, int j) {
    return (bits_of<Word>(shifted) & ((1u << bits) - 1)) << (bits * j);
  }

  static GUT_FAST_INLINE Word words(const void* place) {
    Word value;
    std::memcpy(&value, place, sizeof value);
    return value;
  }

  static GUT_FAST_INLINE void keep_larger(Int& largest, V value) {
    const Int magnitude = bits_of<Int>(value) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }

  // The largest magnitude, as it is, NaN beyond infinity.
  static GUT_FAST_INLINE float magnitude(Int largest) {
    std::int32_t lanes[kLanes];
    std::memcpy(lanes, &largest, sizeof lanes);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) lanes[k] = lanes[k] > lanes[k + half] ? lanes[k] : lanes[k + half];
    }
    return bits_of<float>(lanes[0]);
  }

  // The largest magnitude of what is rounded; not finite if a number is not.
  template <bool is_modulo>
  static GUT_FAST_INLINE float largest(const float* S, const float* X) {
    Int most{};
    GUT_FAST_UNROLL
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) {
      keep_larger(most, is_modulo ? Lane::load(S + c) : Lane::load(S + c) - Lane::load(X + c));
    }
    return magnitude(most);
  }

  // What is added before rounding: nothing, or a random number between -1/2 and 1/2.
  template <bool is_random>
  static GUT_FAST_INLINE V shifted(V value, const CodeArgs& args, std::uint32_t position) {
    if constexpr (is_random) {
      Word place;
      for (int k = 0; k < kLanes; ++k) place[k] = k;
      const Word random = hashed<Word>(place + position, args.keys->first, args.keys->second);
      value = value + (floats(bits_of<Int>(2 * random + 1)) * all(0x1p-15f) - all(0.5f));
    }
    return value + all(kMagic);
  }

  static GUT_FAST_INLINE void fill(float* numbers, float value) {
    for (std::int64_t c = 0; c < kCodeBlock; ++c) numbers[c] = value;
  }

  // The sum that tells whether a receiver has found the wraps of a block, k div 2^bits.
  struct Check {
    Word part[kParts] = {};

    GUT_FAST_INLINE void add(int k, Int wraps) { part[k] = (part[k] << 2) + part[k] + bits_of<Word>(wraps); }

    GUT_FAST_INLINE std::uint32_t sum() const {
      std::uint32_t total = 0, lanes[kLanes];
      for (int k = 0; k < kParts; ++k) {
        const Word weighted = part[k] * words(kCheckFactors.of + k * kLanes);
        std::memcpy(lanes, &weighted, sizeof lanes);
        for (const auto each : lanes) total += each;
      }
      return total;
    }
  };

  // The width for numbers up to `most`, NaN if that is not finite.
  template <int bits>
  static GUT_FAST_INLINE float width_for(float width, float most) {
    if (!(most < kInfinity)) return kNaN;
    const float least = most * (0x1p-21f * (1 << bits));
    width = width > kLeastWidth ? width : kLeastWidth;
    width = width > kMostWidth ? kMostWidth : width;
    return width > least ? width : least;
  }

  // q = round(x L/a), X += q a/L. Returns a/L.
  template <int bits, bool is_random>
  static GUT_FAST_INLINE float encode_difference(const CodeArgs& args, const float* S, float* X, float most,
                                                 std::uint8_t* code, std::uint32_t position, std::int64_t stride) {
    constexpr float levels = (1 << (bits - 1)) - 1;
    const V scale = all(most < kLeastDifference ? 0.0f : most / levels);
    const V factor = all(most < kLeastDifference ? 0.0f : levels / most);
    each_words<bits>([&](std::int64_t w, int) GUT_FAST_LAMBDA {
      Word word{};
      for (int j = 0; j < 32 / bits; ++j) {
        const auto c = number<bits>(w, j);
        const V old = Lane::load(X + c);
        const V q = shifted<is_random>((Lane::load(S + c) - old) * factor, args, position + j * stride + w);
        word |= placed<bits>(q, j);
        Lane::store(X + c, old + rounded(q) * scale);
      }
      std::memcpy(code + 4 * w, &word, sizeof word);
    });
    return scale[0];
  }

  // The lines of a block are not taken in their order, so those of the next one are asked for on the way.
  template <int bits>
  static GUT_FAST_INLINE void decode_difference(const std::uint8_t* code, float scale, float* X) {
    each_words<bits>([&](std::int64_t w, int) GUT_FAST_LAMBDA {
      const Word word = words(code + 4 * w);
      for (int j = 0; j < 32 / bits; ++j) {
        const auto c = number<bits>(w, j);
        const V q = floats(bits_of<Int>(word << (32 - bits - bits * j)) >> (32 - bits));
        __builtin_prefetch(X + c + kCodeBlock);
        Lane::store(X + c, Lane::load(X + c) + q * all(scale));
      }
    });
  }

  // k = round(S / step), X = k step. Returns the check sum of k div 2^bits.
  template <int bits, bool is_random>
  static GUT_FAST_INLINE std::uint32_t encode_modulo(const CodeArgs& args, const float* S, float* X, float width,
                                                     std::uint8_t* code, std::uint32_t position, std::int64_t stride) {
    constexpr float levels = 1 << bits;
    const V factor = all(levels / width), step = all(width * (1 / levels));
    Check check;
    each_words<bits>([&](std::int64_t w, int k) GUT_FAST_LAMBDA {
      Word word{};
      for (int j = 0; j < 32 / bits; ++j) {
        const auto c = number<bits>(w, j);
        const V shift = shifted<is_random>(Lane::load(S + c) * factor, args, position + j * stride + w);
        word |= placed<bits>(shift, j);
        check.add(k, integer(shift) >> bits);
        Lane::store(X + c, rounded(shift) * step);
      }
      std::memcpy(code + 4 * w, &word, sizeof word);
    });
    return check.sum();
  }

  // The k of this code nearest to X_i / step; X_j = k step. Returns max|X_j - X_i|, infinity if the check sum is wrong.
  template <int bits>
  static GUT_FAST_INLINE float decode_modulo(const std::uint8_t* code, float width, std::uint32_t expected,
                                             const float* own, float* X) {
    constexpr float levels = 1 << bits;
    const V factor = all(levels / width), step = all(width * (1 / levels)), most = all(0x1p22f);
    Int largest{};
    Check check;
    each_words<bits>([&](std::int64_t w, int k) GUT_FAST_LAMBDA {
      const Word word = words(code + 4 * w);
      for (int j = 0; j < 32 / bits; ++j) {
        const auto c = number<bits>(w, j);
        __builtin_prefetch(X + c + kCodeBlock);
        __builtin_prefetch(own + c + kCodeBlock);
        const V mine = Lane::load(own + c), low = floats(bits_of<Int>((word >> (bits * j)) & ((1 << bits) - 1)));
        V t = mine * factor;
        t = t > most ? most : t;
        t = t < -most ? -most : t;
        const V shift = (t - low) * all(1 / levels) + all(kMagic);
        check.add(k, integer(shift));
        const V found = (low + rounded(shift) * all(levels)) * step;
        keep_larger(largest, found - mine);
        Lane::store(X + c, found);
      }
    });
    return check.sum() == expected ? magnitude(largest) : kInfinity;
  }

  static GUT_FAST_INLINE void encode_half(const float* S, float* X, std::uint8_t* code, std::int64_t count) {
    auto* halves = reinterpret_cast<BFloat16*>(code);
    for (std::int64_t c = 0; c < count; c += kLanes) {
      const V old = Lane::load(X + c);
      Lane::store(halves + c, Lane::load(S + c) - old);
      Lane::store(X + c, old + Lane::load(halves + c));
    }
  }

  static GUT_FAST_INLINE void decode_half(const std::uint8_t* code, float* X, std::int64_t count) {
    const auto* halves = reinterpret_cast<const BFloat16*>(code);
    for (std::int64_t c = 0; c < count; c += kLanes) Lane::store(X + c, Lane::load(X + c) + Lane::load(halves + c));
  }
};

// Both loops go over blocks; the last one of a tensor, if it is not whole, goes through a room where it is: its words
// hold the numbers that are a stride apart, and the rest is zeros.
template <int bits>
struct Tail {
  float from[kCodeBlock] = {}, copy[kCodeBlock] = {};
  std::uint8_t code[2 * kCodeBlock] = {};
  std::int64_t count, stride;

  explicit Tail(std::int64_t numbers) : count(numbers), stride((numbers * bits + 31) / 32) {}

  template <typename Part>
  GUT_FAST_INLINE void each(Part part) {
    if (bits == 16) return part(0, 0, count);
    for (std::int64_t c = 0, j = 0; c < count; c += stride, ++j) {
      part(c, j * words_of(bits), count - c < stride ? count - c : stride);
    }
  }
  void take(const float* message, const float* X) {
    each([&](std::int64_t c, std::int64_t place, std::int64_t length) {
      if (message) std::memcpy(from + place, message + c, length * sizeof(float));
      std::memcpy(copy + place, X + c, length * sizeof(float));
    });
  }
  void give(float* X) {
    each([&](std::int64_t c, std::int64_t place, std::int64_t length) {
      std::memcpy(X + c, copy + place, length * sizeof(float));
    });
  }
  std::int64_t bytes() const { return bits == 16 ? 2 * count : 4 * stride; }

  // Whatever a sender has left where there are no numbers is nobody's.
  void take_code(const std::uint8_t* given) {
    std::memcpy(code, given, bytes());
    if (bits == 16) return;
    for (auto c = count; c < 32 / bits * stride; ++c) {
      auto& byte = code[4 * (c % stride) + c / stride * bits / 8];
      byte = bits == 8 ? 0 : static_cast<std::uint8_t>(byte & (c / stride % 2 ? 15 : 240));
    }
  }
};

// What a block is coded with: its scale or its width, and the check sum.
struct Heads {
  float scale;
  std::uint32_t check;
};

template <int kLanes>
struct EncodeLoop {
  using Blocks = CodeBlocks<kLanes>;
  static constexpr std::int64_t kTogether = 4;  // blocks whose largest numbers are found before the first is coded

  static GUT_FAST_INLINE void run(const CodeArgs& args) {
    if (args.bits == 16) return all<16, false, false>(args);
    if (args.is_modulo) return args.bits == 8 ? randomly<8, true>(args) : randomly<4, true>(args);
    args.bits == 8 ? randomly<8, false>(args) : randomly<4, false>(args);
  }

  template <int bits, bool is_modulo>
  static GUT_FAST_INLINE void randomly(const CodeArgs& args) {
    args.keys ? all<bits, is_modulo, true>(args) : all<bits, is_modulo, false>(args);
  }

  template <int bits, bool is_modulo, bool is_random>
  static GUT_FAST_INLINE void all(const CodeArgs& args) {
    const auto whole = args.count / kCodeBlock, rest = args.count % kCodeBlock;
    for (std::int64_t first = 0; first < whole; first += kTogether) {
      const auto end = whole - first < kTogether ? whole : first + kTogether;
      float most[kTogether] = {};
      if (bits != 16) {
        for (auto block = first; block < end; ++block) {
          const auto c = block * kCodeBlock;
          most[block - first] = Blocks::template largest<is_modulo>(args.from + c, args.copy + c);
        }
      }
      for (auto block = first; block < end; ++block) {
        const auto c = block * kCodeBlock;
        std::uint8_t unheard[2 * kCodeBlock];
        one<bits, is_modulo, is_random>(args, block, args.from + c, args.copy + c, most[block - first],
                                        args.code ? args.code + c * bits / 8 : unheard, words_of(bits));
      }
    }
    if (rest == 0) return;
    const auto c = whole * kCodeBlock;
    Tail<bits> tail(rest);
    tail.take(args.from + c, args.copy + c);
    const float most = bits == 16 ? 0 : Blocks::template largest<is_modulo>(tail.from, tail.copy);
    one<bits, is_modulo, is_random>(args, whole, tail.from, tail.copy, most, tail.code, tail.stride);
    tail.give(args.copy + c);
    if (args.code) std::memcpy(args.code + c * bits / 8, tail.code, tail.bytes());
  }

  template <int bits, bool is_modulo, bool is_random>
  static GUT_FAST_INLINE void one(const CodeArgs& args, std::int64_t block, const float* S, float* X, float most,
                                  std::uint8_t* code, std::int64_t stride) {
    if constexpr (bits == 16) {
      Blocks::encode_half(S, X, code, kCodeBlock);
    } else {
      const auto position = args.position + static_cast<std::uint32_t>(block * kCodeBlock);
      Heads heads{kNaN, 0};
      if (is_modulo) heads.scale = args.width[block] = Blocks::template width_for<bits>(args.width[block], most);
      if (!(most < kInfinity)) {
        std::memset(code, 0, kCodeBlock * bits / 8);
        Blocks::fill(X, kNaN);
      } else if (is_modulo) {
        heads.check = Blocks::template encode_modulo<bits, is_random>(args, S, X, heads.scale, code, position, stride);
      } else {
        heads.scale = Blocks::template encode_difference<bits, is_random>(args, S, X, most, code, position, stride);
      }
      if (args.head == nullptr) return;
      std::memcpy(args.head + 4 * block, &heads.scale, 4);
      if (is_modulo) std::memcpy(args.head + args.next_head + 4 * block, &heads.check, 4);
    }
  }
};

template <int kLanes>
struct DecodeLoop {
  using Blocks = CodeBlocks<kLanes>;

  static GUT_FAST_INLINE void run(const CodeArgs& args) {
    if (args.bits == 16) return all<16>(args);
    args.bits == 8 ? all<8>(args) : all<4>(args);
  }

  template <int bits>
  static GUT_FAST_INLINE void all(const CodeArgs& args) {
    const auto whole = args.count / kCodeBlock, rest = args.count % kCodeBlock, last = whole * kCodeBlock;
    for (std::int64_t block = 0; block < whole; ++block) {
      const auto c = block * kCodeBlock;
      one<bits>(args, block, args.from ? args.from + c : nullptr, args.copy + c, args.code + c * bits / 8);
    }
    if (rest == 0) return;
    Tail<bits> tail(rest);
    tail.take(args.from ? args.from + last : nullptr, args.copy + last);
    tail.take_code(args.code + last * bits / 8);
    one<bits>(args, whole, tail.from, tail.copy, tail.code);
    tail.give(args.copy + last);
  }

  template <int bits>
  static GUT_FAST_INLINE void one(const CodeArgs& args, std::int64_t block, const float* own, float* X,
                                  const std::uint8_t* code) {
    if constexpr (bits == 16) {
      Blocks::decode_half(code, X, kCodeBlock);
    } else {
      Heads heads;
      std::memcpy(&heads.scale, args.head + 4 * block, 4);
      if (!args.is_modulo) return Blocks::template decode_difference<bits>(code, heads.scale, X);
      std::memcpy(&heads.check, args.head + args.next_head + 4 * block, 4);
      const float distance = Blocks::template decode_modulo<bits>(code, heads.scale, heads.check, own, X);
      args.distance[block] = judged(distance, args.width[block], heads.scale, own, X);
    }
  }

  // The distance if both ends know that the block is right. If not, X is what leaves the block out of the mixing, and
  // -4 times the smaller width what widths should be.
  static GUT_FAST_INLINE float judged(float distance, float width, float theirs, const float* own, float* X) {
    if (width != width || theirs != theirs) {
      Blocks::fill(X, kNaN);
      return kNaN;
    }
    const float smaller = width < theirs ? width : theirs;
    if (distance < kMargin * smaller) return distance;
    std::memcpy(X, own, kCodeBlock * sizeof(float));
    return -4 * (smaller > kLeastWidth ? smaller : kLeastWidth);
  }
};

}  // namespace
}  // namespace gut_fast::cpu
