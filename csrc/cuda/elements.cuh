// A few neighbouring numbers of one row at a time: how they are loaded, converted, computed and stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "gossip_step.h"

namespace gut_fast::cuda {

template <typename T>
struct Vector {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

// Every product and sum of products goes through these, and nothing else is contracted (-fmad=false): all kernels round
// alike, and so does their emulation on a CPU.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename T>
__device__ __forceinline__ void add_product(Vector<T>& sum, T factor, const Vector<T>& x) {
#pragma unroll
  for (int v = 0; v < Vector<T>::size; ++v) sum.at[v] = multiply_add(factor, x.at[v], sum.at[v]);
}

// The bits of a vector as they are stored: loads are issued one after the other, and converted when all are under way.
struct alignas(16) Bits {
  std::uint32_t word[4];
};

template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = std::uint16_t;
};
template <>
struct WordOf<4> {
  using type = std::uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <int bytes, int all>
__device__ __forceinline__ void copy_words(void* to, const void* from) {
  using Word = typename WordOf<bytes>::type;
#pragma unroll
  for (int i = 0; i < all / bytes; ++i) static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
}

// Copies the first `count` of `size` numbers of so many bytes, in words as wide as the address in memory allows: rows
// begin at any multiple of a number's width.
template <int bytes, int size>
__device__ __forceinline__ void copy_numbers(void* to, const void* from, int count, const void* in_memory) {
  constexpr int all = bytes * size;
  const auto address = reinterpret_cast<std::uintptr_t>(in_memory);
  if (count >= size && address % all == 0) {
    copy_words<all, all>(to, from);
  } else if (count >= size && address % (all / 2) == 0) {
    copy_words<all / 2, all>(to, from);
  } else {
    using Number = typename WordOf<bytes>::type;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (i < count) static_cast<Number*>(to)[i] = static_cast<const Number*>(from)[i];
    }
  }
}

// Stored as they are computed.
template <typename T>
struct Plain {
  using Compute = T;

  static __device__ __forceinline__ Bits fetch(const void* base, std::int64_t index, int count, DType) {
    Bits bits{};
    const void* place = static_cast<const T*>(base) + index;
    copy_numbers<sizeof(T), Vector<T>::size>(&bits, place, count, place);
    return bits;
  }

  static __device__ __forceinline__ Vector<T> widen(const Bits& bits, DType) {
    return reinterpret_cast<const Vector<T>&>(bits);
  }

  static __device__ __forceinline__ void store(void* base, std::int64_t index, int count, DType,
                                               const Vector<T>& values) {
    void* place = static_cast<T*>(base) + index;
    copy_numbers<sizeof(T), Vector<T>::size>(place, &values, count, place);
  }
};

// Stored in a half-width type or in float32, which is known when the kernel runs; rounded to the nearest even.
struct Mixed {
  using Compute = float;

  static __device__ __forceinline__ Bits fetch(const void* base, std::int64_t index, int count, DType dtype) {
    if (dtype == DType::float32) return Plain<float>::fetch(base, index, count, dtype);
    Bits bits{};
    const void* place = static_cast<const std::uint16_t*>(base) + index;
    copy_numbers<2, 4>(&bits, place, count, place);
    return bits;
  }

  static __device__ __forceinline__ Vector<float> widen(const Bits& bits, DType dtype) {
    if (dtype == DType::float32) return Plain<float>::widen(bits, dtype);
    Vector<float> values;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const auto half = static_cast<std::uint16_t>(bits.word[v / 2] >> 16 * (v % 2));
      values.at[v] = dtype == DType::bfloat16 ? __bfloat162float(__ushort_as_bfloat16(half))
                                              : __half2float(__ushort_as_half(half));
    }
    return values;
  }

  static __device__ __forceinline__ void store(void* base, std::int64_t index, int count, DType dtype,
                                               const Vector<float>& values) {
    if (dtype == DType::float32) return Plain<float>::store(base, index, count, dtype, values);
    Bits bits{};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const std::uint32_t half = dtype == DType::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(values.at[v]))
                                                          : __half_as_ushort(__float2half_rn(values.at[v]));
      bits.word[v / 2] |= half << 16 * (v % 2);
    }
    void* place = static_cast<std::uint16_t*>(base) + index;
    copy_numbers<2, 4>(place, &bits, count, place);
  }
};

}  // namespace gut_fast::cuda
