// Instruction tiers, best first. A tier is a thin entry built for its instructions that pulls in the always-inline
// driver; the kernel's tables of such entries are the only place where tiers meet, so no linker can swap one tier's
// code for another's.
#pragma once

#define GUT_FAST_INLINE inline __attribute__((always_inline))
#define GUT_FAST_LAMBDA __attribute__((always_inline))

// Before a loop whose iterations are independent, though pointers that may be equal hide it from the compiler.
#if defined(__clang__)
#define GUT_FAST_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define GUT_FAST_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace gut_fast::cpu {

// Brings a line into the nearest cache as its only owner, where the processor can.
GUT_FAST_INLINE void prefetch_to_write(const void* place) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(place)));
#else
  __builtin_prefetch(place, 1);
#endif
}

struct Baseline {
  static constexpr int vector_bytes = 16;
  static constexpr const char* name = "baseline";
  static bool available() { return true; }
  template <typename Driver, typename... Args>
  static void run(Args... args) {
    Driver::run(args...);
  }
};

#if defined(__x86_64__)

struct X86V3 {
  static constexpr int vector_bytes = 32;
  static constexpr const char* name = "x86-64-v3";
  static bool available() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
  template <typename Driver, typename... Args>
  __attribute__((target("arch=x86-64-v3"))) static void run(Args... args) {
    Driver::run(args...);
  }
};

struct X86V4 {
  static constexpr int vector_bytes = 64;
  static constexpr const char* name = "x86-64-v4";
  static bool available() {
    return X86V3::available() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  template <typename Driver, typename... Args>
  __attribute__((target("arch=x86-64-v4"))) static void run(Args... args) {
    Driver::run(args...);
  }
};

#define GUT_FAST_TIERS X86V4, X86V3, Baseline
#else
#define GUT_FAST_TIERS Baseline
#endif

}  // namespace gut_fast::cpu
