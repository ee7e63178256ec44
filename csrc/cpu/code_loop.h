// The loops that make and read codes, for one instruction tier: loop.cpp includes this file, and all of it is its own.
//
// A block is always taken whole: the last one of a tensor is filled up with zeros, which change nothing. Numbers are
// rounded by adding 1.5 * 2^23, whose low bits then are the integer: to the nearest, ties to even, in every tier.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/codes.h"
#include "cpu/lanes.h"
#include "cpu/storage.h"

namespace gut_fast::cpu {
namespace {

constexpr float kMagic = 12582912.0f, kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::int32_t kMagicBits = 0x4b400000, kInfinityBits = 0x7f800000;
constexpr float kLeastDifference = 0x1p-118f, kLeastWidth = 0x1p-100f, kMostWidth = 0x1p100f, kMargin = 0.4375f;

template <typename To, typename From>
GUT_FAST_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 14 bits of a number and two keys.
template <typename W>
GUT_FAST_INLINE W hashed(W x, std::uint32_t first, std::uint32_t second) {
  x = x ^ first;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = ((x ^ (x >> 15)) + second) * 0x846ca68bu;
  return x >> 18;
}

// The odd factors of the check sum.
struct Multipliers {
  std::uint32_t of[kCodeBlock] = {};
  constexpr Multipliers() {
    for (std::uint32_t p = 0; p < kCodeBlock; ++p) of[p] = (hash(p, 1) << 18 | hash(p, 2) << 4) | 1;
  }
  static constexpr std::uint32_t hash(std::uint32_t x, std::uint32_t key) {
    x ^= key;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x >> 18;
  }
};
constexpr Multipliers kMultipliers;

template <int kLanes>
struct CodeBlocks {
  using Lane = Lanes<float, kLanes>;
  using V = typename Lane::V;
  using Word = typename VectorOf<std::uint32_t, kLanes>::type;
  using Int = typename VectorOf<std::int32_t, kLanes>::type;

  static GUT_FAST_INLINE V all(float value) { return Lane::broadcast(value); }
  static GUT_FAST_INLINE V rounded(V shifted) { return shifted - all(kMagic); }
  static GUT_FAST_INLINE Int integer(V shifted) { return bits_of<Int>(shifted) - kMagicBits; }
  static GUT_FAST_INLINE void store(std::int32_t* place, Int value) { std::memcpy(place, &value, sizeof value); }
  static GUT_FAST_INLINE V floats(Int value) { return __builtin_convertvector(value, V); }

  static GUT_FAST_INLINE void keep_larger(Int& largest, V value) {
    const Int magnitude = bits_of<Int>(value) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }

  // The largest magnitude; NaN if a number is not finite and `only_finite`, else as it is, NaN beyond infinity.
  static GUT_FAST_INLINE float magnitude(Int largest, bool only_finite) {
    std::int32_t lanes[kLanes], most = 0;
    std::memcpy(lanes, &largest, sizeof lanes);
    for (const auto each : lanes) most = each > most ? each : most;
    return only_finite && most >= kInfinityBits ? kNaN : bits_of<float>(most);
  }

  static GUT_FAST_INLINE std::uint32_t sum(Word words) {
    std::uint32_t lanes[kLanes], total = 0;
    std::memcpy(lanes, &words, sizeof lanes);
    for (const auto each : lanes) total += each;
    return total;
  }

  static GUT_FAST_INLINE Word multipliers(std::int64_t c) {
    Word words;
    std::memcpy(&words, kMultipliers.of + c, sizeof words);
    return words;
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

  // From integers to bytes, and from bytes to numbers, go plain loops: GCC 12 takes vectors of bytes apart.
  static GUT_FAST_INLINE void bytes_of(const std::int32_t* integers, std::uint8_t* bytes) {
    for (std::int64_t c = 0; c < kCodeBlock; ++c) bytes[c] = static_cast<std::uint8_t>(integers[c]);
  }

  // Two numbers in a byte, the first one in its lower half.
  static GUT_FAST_INLINE void pack(const std::uint8_t* bytes, std::uint8_t* code) {
    for (std::int64_t k = 0; k < kCodeBlock / 2; ++k) {
      code[k] = static_cast<std::uint8_t>((bytes[2 * k] & 15) | (bytes[2 * k + 1] << 4));
    }
  }

  static GUT_FAST_INLINE void unpack(const std::uint8_t* code, std::uint8_t* bytes) {
    for (std::int64_t k = 0; k < kCodeBlock / 2; ++k) {
      bytes[2 * k] = code[k] & 15;
      bytes[2 * k + 1] = code[k] >> 4;
    }
  }

  // The numbers of a block's codes: from 0 on, or from -2^(bits - 1) on.
  template <int bits, bool is_signed>
  static GUT_FAST_INLINE void numbers_of(const std::uint8_t* bytes, float* numbers) {
    constexpr int half = 1 << (bits - 1);
    for (std::int64_t c = 0; c < kCodeBlock; ++c) {
      const int code = bytes[c];
      numbers[c] = static_cast<float>(is_signed ? (code ^ half) - half : code);
    }
  }

  static GUT_FAST_INLINE void fill(float* numbers, float value) {
    for (std::int64_t c = 0; c < kCodeBlock; ++c) numbers[c] = value;
  }

  // q = round(x L/a), X += q a/L. Returns a/L.
  template <int bits, bool is_random>
  static GUT_FAST_INLINE float encode_difference(const CodeArgs& args, const float* S, float* X, std::uint8_t* bytes,
                                                 std::uint32_t position) {
    constexpr float levels = (1 << (bits - 1)) - 1;
    std::int32_t integers[kCodeBlock];
    Int largest{};
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) keep_larger(largest, Lane::load(S + c) - Lane::load(X + c));
    const float most = magnitude(largest, true);
    if (most != most) {
      std::memset(bytes, 0, kCodeBlock);
      fill(X, kNaN);
      return kNaN;
    }
    const float scale = most < kLeastDifference ? 0.0f : most / levels;
    const float factor = most < kLeastDifference ? 0.0f : levels / most;
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) {
      const V old = Lane::load(X + c);
      const V q = shifted<is_random>((Lane::load(S + c) - old) * all(factor), args, position + c);
      store(integers + c, integer(q));
      Lane::store(X + c, old + rounded(q) * all(scale));
    }
    bytes_of(integers, bytes);
    return scale;
  }

  template <int bits>
  static GUT_FAST_INLINE void decode_difference(const std::uint8_t* bytes, float scale, float* X) {
    float q[kCodeBlock];
    numbers_of<bits, true>(bytes, q);
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) {
      Lane::store(X + c, Lane::load(X + c) + Lane::load(q + c) * all(scale));
    }
  }

  // k = round(S / step), X = k step. Returns the check sum of k div 2^bits.
  template <int bits, bool is_random>
  static GUT_FAST_INLINE std::uint32_t encode_modulo(const CodeArgs& args, const float* S, float* X, float& width,
                                                     std::uint8_t* bytes, std::uint32_t position) {
    constexpr float levels = 1 << bits;
    std::int32_t integers[kCodeBlock];
    Int largest{};
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) keep_larger(largest, Lane::load(S + c));
    const float least = magnitude(largest, true) * (levels * 0x1p-21f);
    if (least != least) {
      std::memset(bytes, 0, kCodeBlock);
      fill(X, kNaN);
      width = kNaN;
      return 0;
    }
    width = width > kLeastWidth ? width : kLeastWidth;
    width = width > kMostWidth ? kMostWidth : width;
    width = width > least ? width : least;
    const V factor = all(levels / width), step = all(width * (1 / levels));
    Word check{};
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) {
      const V shift = shifted<is_random>(Lane::load(S + c) * factor, args, position + c);
      const Int k = integer(shift);
      store(integers + c, k);
      check += bits_of<Word>(k >> bits) * multipliers(c);
      Lane::store(X + c, rounded(shift) * step);
    }
    bytes_of(integers, bytes);
    return sum(check);
  }

  // The k of this code nearest to X_i / step; X_j = k step. Returns max|X_j - X_i|, infinity if the check sum is wrong.
  template <int bits>
  static GUT_FAST_INLINE float decode_modulo(const std::uint8_t* bytes, float width, std::uint32_t expected,
                                             const float* own, float* X) {
    constexpr float levels = 1 << bits;
    float codes[kCodeBlock];
    numbers_of<bits, false>(bytes, codes);
    const V factor = all(levels / width), step = all(width * (1 / levels)), most = all(0x1p22f);
    Int largest{};
    Word check{};
    for (std::int64_t c = 0; c < kCodeBlock; c += kLanes) {
      const V mine = Lane::load(own + c), code = Lane::load(codes + c);
      V t = mine * factor;
      t = t > most ? most : t;
      t = t < -most ? -most : t;
      const V shift = (t - code) * all(1 / levels) + all(kMagic);
      check += bits_of<Word>(integer(shift)) * multipliers(c);
      const V found = (code + rounded(shift) * all(levels)) * step;
      keep_larger(largest, found - mine);
      Lane::store(X + c, found);
    }
    return sum(check) == expected ? magnitude(largest, false) : std::numeric_limits<float>::infinity();
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

// Both loops go over blocks; the last one of a tensor is copied to where there is room for a whole one.
struct CodeRoom {
  float from[kCodeBlock], copy[kCodeBlock];
  std::uint8_t code[2 * kCodeBlock];

  void take(const float* message, const float* X, std::int64_t count) {
    std::memset(this, 0, sizeof *this);
    if (message) std::memcpy(from, message, count * sizeof(float));
    std::memcpy(copy, X, count * sizeof(float));
  }
};

template <int kLanes>
struct EncodeLoop {
  using Blocks = CodeBlocks<kLanes>;

  static GUT_FAST_INLINE void run(const CodeArgs& args) {
    if (args.bits == 16) return all<16, false>(args);
    if (args.keys == nullptr) return args.bits == 8 ? all<8, false>(args) : all<4, false>(args);
    args.bits == 8 ? all<8, true>(args) : all<4, true>(args);
  }

  template <int bits, bool is_random>
  static GUT_FAST_INLINE void all(const CodeArgs& args) {
    std::int64_t block = 0;
    for (std::int64_t c = 0; c < args.count; c += kCodeBlock, ++block) {
      const auto count = args.count - c < kCodeBlock ? args.count - c : kCodeBlock;
      const bool is_whole = count == kCodeBlock;
      CodeRoom room;
      if (!is_whole) room.take(args.from + c, args.copy + c, count);
      std::uint8_t* to = args.code ? args.code + c * bits / 8 : room.code;
      one<bits, is_random>(args, block, is_whole ? args.from + c : room.from, is_whole ? args.copy + c : room.copy,
                           is_whole ? to : room.code);
      if (is_whole) continue;
      std::memcpy(args.copy + c, room.copy, count * sizeof(float));
      if (args.code) std::memcpy(to, room.code, (count * bits + 7) / 8);
    }
  }

  template <int bits, bool is_random>
  static GUT_FAST_INLINE void one(const CodeArgs& args, std::int64_t block, const float* S, float* X,
                                  std::uint8_t* code) {
    if constexpr (bits == 16) {
      Blocks::encode_half(S, X, code, kCodeBlock);
    } else {
      const auto position = args.position + static_cast<std::uint32_t>(block * kCodeBlock);
      std::uint8_t unpacked[kCodeBlock], *bytes = bits == 8 ? code : unpacked;
      float head;
      std::uint32_t check = 0;
      if (args.is_modulo) {
        check = Blocks::template encode_modulo<bits, is_random>(args, S, X, args.width[block], bytes, position);
        head = args.width[block];
      } else {
        head = Blocks::template encode_difference<bits, is_random>(args, S, X, bytes, position);
      }
      if (args.head == nullptr) return;
      if (bits == 4) Blocks::pack(bytes, code);
      std::memcpy(args.head + 4 * block, &head, 4);
      if (args.is_modulo) std::memcpy(args.head + args.next_head + 4 * block, &check, 4);
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
    std::int64_t block = 0;
    for (std::int64_t c = 0; c < args.count; c += kCodeBlock, ++block) {
      const auto count = args.count - c < kCodeBlock ? args.count - c : kCodeBlock;
      const std::uint8_t* code = args.code + c * bits / 8;
      const float* own = args.from ? args.from + c : nullptr;
      const bool is_whole = count == kCodeBlock;
      CodeRoom room;
      if (!is_whole) {
        room.take(own, args.copy + c, count);
        std::memcpy(room.code, code, (count * bits + 7) / 8);
        // The other half of the last byte is nobody's number.
        if (bits == 4 && count % 2 == 1) room.code[count / 2] &= 15;
      }
      one<bits>(args, block, is_whole ? own : room.from, is_whole ? args.copy + c : room.copy,
                is_whole ? code : room.code);
      if (!is_whole) std::memcpy(args.copy + c, room.copy, count * sizeof(float));
    }
  }

  template <int bits>
  static GUT_FAST_INLINE void one(const CodeArgs& args, std::int64_t block, const float* own, float* X,
                                  const std::uint8_t* code) {
    if constexpr (bits == 16) {
      Blocks::decode_half(code, X, kCodeBlock);
    } else {
      std::uint8_t unpacked[kCodeBlock];
      if (bits == 4) Blocks::unpack(code, unpacked);
      const std::uint8_t* bytes = bits == 4 ? unpacked : code;
      float head;
      std::memcpy(&head, args.head + 4 * block, 4);
      if (!args.is_modulo) return Blocks::template decode_difference<bits>(bytes, head, X);
      std::uint32_t check;
      std::memcpy(&check, args.head + args.next_head + 4 * block, 4);
      const float distance = Blocks::template decode_modulo<bits>(bytes, head, check, own, X);
      args.distance[block] = judged(distance, args.width[block], head, own, X);
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
