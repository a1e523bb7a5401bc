// A test-only stand-in for the CUDA runtime: kernels run as plain C++, blocks one after another,
// the threads of a block as fibers that change over at barriers and shuffles. It finds mistakes of
// indexing, of reduction order and of barriers; it says nothing about speed or memory ordering.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define DNKD_DYNAMIC_SHARED(name) uint4* const name = simt::dynamic_shared.get()
#define DNKD_ASYNC_COPIES

struct uint2 {
  alignas(8) unsigned x;
  unsigned y;
};
struct uint4 {
  alignas(16) unsigned x;
  unsigned y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace simt {

inline int multiprocessors = 2;      // small, so that blocks take several rows
inline bool reverse_blocks = false;  // the last block first
inline int shared_per_multiprocessor = 64 << 10;
constexpr int kReservedShared = 1 << 10;          // of each block
constexpr int kSharedWithoutAsking = 48 << 10;    // dynamic shared memory of a block
inline std::map<const void*, int> shared_limits;  // of kernels that may use more

struct Barrier {
  int members = 0;
  int arrived = 0;
  long generation = 0;
  void arrive() {
    if (arrived > 0 && arrived >= members) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<std::vector<Copy>> copies{1};  // by group, the last one still open
  bool done = false;
  Barrier* waits_for = nullptr;
  long generation = 0;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current = 0;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<uint64_t> lanes;
inline std::function<void()> body;
inline std::vector<std::unique_ptr<char[]>> stacks;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
// Of exactly the size that the launch asks for, so that the address sanitizer sees what is outside.
inline std::unique_ptr<uint4, Free> dynamic_shared;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "simt: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::exit(3);
}

inline void wait(Barrier& barrier) {
  Fiber& self = fibers[current];
  self.waits_for = &barrier;
  self.generation = barrier.generation;
  ++barrier.arrived;
  barrier.arrive();
  while (barrier.generation == self.generation) {
    swapcontext(&self.context, &scheduler);
  }
  self.waits_for = nullptr;
}

inline void enter() {
  body();
  Fiber& self = fibers[current];
  for (const auto& group : self.copies) {
    if (!group.empty()) {
      fail("a thread ends before its copies");
    }
  }
  self.done = true;
  // Threads that have left no longer count at barriers.
  --block_barrier.members;
  block_barrier.arrive();
  --warp_barriers[current / kWarp].members;
  warp_barriers[current / kWarp].arrive();
}

inline void run_block(int threads) {
  fibers = std::vector<Fiber>(threads);
  warp_barriers = std::vector<Barrier>((threads + kWarp - 1) / kWarp);
  lanes.assign(threads, 0);
  block_barrier = {threads, 0, 0};
  for (int t = 0; t < threads; ++t) {
    ++warp_barriers[t / kWarp].members;
    Fiber& fiber = fibers[t];
    if (static_cast<int>(stacks.size()) <= t) {
      stacks.emplace_back(new char[kStack]);
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[t].get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = threads; left > 0;) {
    bool progressed = false;
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      if (fiber.done ||
          (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.generation)) {
        continue;
      }
      progressed = true;
      current = t;
      threadIdx = dim3(t, 0, 0);
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (!progressed) {
      fail("a barrier or shuffle was not reached by all threads");
    }
  }
}

}  // namespace simt

inline void __syncthreads() { simt::wait(simt::block_barrier); }
inline void __threadfence() {}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T __ldcs(const T* from) {
  return *from;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) {
    simt::fail("a shuffle with a partial mask");
  }
  const int self = simt::current;
  const int warp = self / simt::kWarp;
  std::memcpy(&simt::lanes[self], &value, sizeof(T));
  simt::wait(simt::warp_barriers[warp]);
  if (simt::warp_barriers[warp].members != simt::kWarp) {
    simt::fail("a shuffle of all lanes after some have left");
  }
  T other;
  std::memcpy(&other, &simt::lanes[self ^ lane_mask], sizeof(T));
  simt::wait(simt::warp_barriers[warp]);
  return other;
}

// What device.cuh copies beside the computation. From the call until it is waited for there is NaN,
// which is what a read finds that comes too early, or too late for what was there before.
using SharedAddress = char*;
inline SharedAddress shared_address(void* pointer) { return static_cast<char*>(pointer); }
inline void copy_async(SharedAddress to, const void* from) {
  if ((reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from)) % 16 != 0) {
    simt::fail("an asynchronous copy that is not aligned");
  }
  std::memset(to, 0xff, 16);
  simt::fibers[simt::current].copies.back().push_back({to, from});
}
inline void end_copy_group() { simt::fibers[simt::current].copies.emplace_back(); }
template <int kPending>
void wait_for_groups() {
  auto& groups = simt::fibers[simt::current].copies;
  while (static_cast<int>(groups.size()) > kPending + 1) {
    for (const simt::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const auto limit = simt::shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t bytes = config->dynamicSmemBytes;
  if (bytes > static_cast<size_t>(limit == simt::shared_limits.end() ? simt::kSharedWithoutAsking
                                                                     : limit->second)) {
    return cudaErrorInvalidValue;
  }
  simt::dynamic_shared.reset(static_cast<uint4*>(std::malloc(bytes)));
  simt::body = [=] { kernel(arguments...); };
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    std::memset(simt::dynamic_shared.get(), 0xff, bytes);  // NaN: a block finds nothing of use
    blockIdx = dim3(simt::reverse_blocks ? config->gridDim.x - 1 - b : b, 0, 0);
    simt::run_block(static_cast<int>(config->blockDim.x));
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor
               ? simt::shared_per_multiprocessor
               : simt::shared_per_multiprocessor - simt::kReservedShared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > simt::shared_per_multiprocessor - simt::kReservedShared) {
    return cudaErrorInvalidValue;
  }
  simt::shared_limits[kernel] = bytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t bytes) {
  const int fitting =
      simt::shared_per_multiprocessor / (static_cast<int>(bytes) + simt::kReservedShared);
  *blocks = std::min(2, fitting);
  return cudaSuccess;
}
