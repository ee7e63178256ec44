// The part of CUDA that csrc/cuda uses, on a CPU: its kernels compile as plain C++ and compute the same numbers, bit
// for bit. See emulator.cpp for how blocks run.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

namespace gut_fast::cuda {
extern uint4 shared[];  // `extern __shared__ uint4 shared[]` of a kernel in that namespace means this one
}

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
inline int __clz(int value) { return __builtin_clz(static_cast<unsigned>(value)); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidDevice, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct Stream*;
struct cudaFuncAttributes {};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulation {
cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
                     const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);

template <typename... Parameters, std::size_t... i>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<i...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[i])...);
}
}  // namespace emulation

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared_bytes, cudaStream_t) {
  return emulation::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                             [&] { emulation::call(kernel, arguments, std::index_sequence_for<Parameters...>()); });
}
