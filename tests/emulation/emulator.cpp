// Runs the blocks of a grid one after the other, and the threads of a block as fibers: one after the other, in an order
// that is drawn anew after every barrier. So a race between two barriers shows as a result that depends on the seed.
// Shared memory begins as NaN, so what is read before it is written shows too; and so does a barrier that only some
// threads reach, a byte written behind the shared memory that was asked for, and a block larger than the kernel's
// bounds.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/instances.h"
#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t kMaxShared = 232448, kGuard = 4096, kDefaultShared = 48 * 1024, kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;

}  // namespace

namespace gut_fast::cuda {
uint4 shared[(kMaxShared + kGuard) / sizeof(uint4)];
}

namespace {

// What a test can choose.
int multiprocessors = 2, shared_limit = kMaxShared;
std::mt19937 generator;

std::map<const void*, std::size_t> allowed_shared;

// Of each kernel, what its __launch_bounds__ say: a compiler for CPUs forgets them.
const std::map<const void*, unsigned>& bounds() {
  using namespace gut_fast::cuda;
  static const auto all = [] {
    std::map<const void*, unsigned> all;
    for (const auto* instances : {&kFloat32Instances, &kFloat64Instances, &kMixedInstances}) {
      for (int q = 0; q <= kMaxStates; ++q) {
        for (int m = 1; m <= kMaxMessages; ++m) {
          const auto& kernels = instances->of[q][m - 1];
          all[reinterpret_cast<const void*>(kernels[kRegisters])] = max_threads(q, m);
          all[reinterpret_cast<const void*>(kernels[kTiles])] = kTileThreads;
        }
      }
    }
    return all;
  }();
  return all;
}

unsigned most_threads(const void* kernel) {
  const auto found = bounds().find(kernel);
  return found == bounds().end() ? kMaxThreads : found->second;
}

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf resume;
  bool is_running = false, is_new = true;
};

std::vector<Fiber> fibers(kMaxThreads);
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* work;

// Back to the scheduler, until it is this fiber's turn again.
void yield() {
  Fiber& own = *current;
  if (_setjmp(own.resume) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*work)();
    current->is_running = false;
    yield();
  }
}

// One turn of a fiber: to its next barrier or its end.
void turn(unsigned thread) {
  current = &fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (!current->is_new) _longjmp(current->resume, 1);
  current->is_new = false;
  getcontext(&current->context);
  current->context.uc_stack.ss_sp = current->stack.get();
  current->context.uc_stack.ss_size = kStack;
  makecontext(&current->context, live, 0);
  setcontext(&current->context);
}

bool run_block() {
  std::vector<unsigned> order(blockDim.x);
  std::iota(order.begin(), order.end(), 0u);
  for (const auto thread : order) fibers[thread].is_running = true;
  for (std::size_t running = order.size(); running > 0;) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const auto thread : order) turn(thread);
    running = std::count_if(order.begin(), order.end(), [](unsigned thread) { return fibers[thread].is_running; });
    if (running != 0 && running != order.size()) return false;  // not all threads reached the barrier
  }
  return true;
}

}  // namespace

void __syncthreads() { yield(); }

namespace emulation {

// Never less than before: another thread of the host may be about to start a block that needs it.
cudaError_t allow_shared(const void* kernel, int bytes) {
  auto& allowed = allowed_shared[kernel];
  if (bytes > shared_limit || static_cast<std::size_t>(bytes) < allowed) return cudaErrorInvalidConfiguration;
  allowed = bytes;
  return cudaSuccess;
}

cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
                     const std::function<void()>& thread) {
  const auto allowed = std::max(kDefaultShared, allowed_shared[kernel]);
  if (grid.x == 0 || block.x == 0 || block.x > most_threads(kernel) || shared_bytes > allowed) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  work = &thread;
  auto* bytes = reinterpret_cast<unsigned char*>(gut_fast::cuda::shared);
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    std::memset(bytes, 0xff, shared_bytes + kGuard);
    if (!run_block()) return cudaErrorLaunchFailure;
    const auto* guard = bytes + shared_bytes;
    if (!std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == 0xff; })) {
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void set_emulation(int new_multiprocessors, int new_shared_limit,
                                                                     unsigned seed) {
  multiprocessors = new_multiprocessors;
  shared_limit = new_shared_limit;
  allowed_shared.clear();
  generator.seed(seed);
}

const char* cudaGetErrorString(cudaError_t error) {
  constexpr const char* kNames[] = {"no error", "invalid configuration argument", "invalid device ordinal",
                                    "unspecified launch failure"};
  return kNames[error];
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : shared_limit;
  return cudaSuccess;
}
