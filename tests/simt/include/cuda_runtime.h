// A test-only stand-in for the CUDA runtime: kernels run as plain C++, blocks one after another,
// the threads of a block as fibers that change over at barriers and shuffles. The blocks of a
// cluster run at the same time, each with its fibers in a thread of its own, whose thread-local
// variables are the block's shared memory. It finds mistakes of indexing, of reduction order and of
// barriers; it says nothing about speed or memory ordering.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define DNKD_DYNAMIC_SHARED(name) uint4* const name = simt::dynamic_shared.get()
#define DNKD_ASYNC_COPIES
#define DNKD_CLUSTERS

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

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 1 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace simt {

inline int multiprocessors = 2;      // small, so that blocks take several rows
inline bool reverse_blocks = false;  // the last block first
inline bool has_clusters = true;
inline unsigned largest_cluster = 0;  // blocks of one, of all launches
inline int most_cluster_blocks = 8;   // for which there is room
inline int ptx_version = 90;          // for which kernels were compiled
// What a block sends arrives at once (0), when whom it is for waits for that alone, the last first
// (1), or each the one or the other way (2).
inline int late = 0;
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
  std::function<bool()> waits_until;  // of what other blocks of the cluster do
};

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

inline thread_local std::vector<Fiber> fibers;
inline thread_local ucontext_t scheduler;
inline thread_local int current = 0;
inline thread_local Barrier block_barrier;
inline thread_local std::vector<Barrier> warp_barriers;
inline thread_local std::vector<uint64_t> lanes;
inline std::function<void()> body;
inline thread_local std::vector<std::unique_ptr<char[]>> stacks;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
// Of exactly the size that the launch asks for, so that the address sanitizer sees what is outside.
inline thread_local std::unique_ptr<uint4, Free> dynamic_shared;

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

// Waits for something that another block of the cluster does.
inline void wait_until(std::function<bool()> ready) {
  Fiber& self = fibers[current];
  self.waits_until = std::move(ready);
  while (!self.waits_until()) {
    swapcontext(&self.context, &scheduler);
  }
  self.waits_until = nullptr;
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

// The blocks of a cluster. A thread-local variable lies at the same distance from `anchor` in every
// thread.
struct Arrivals {
  static constexpr int16_t kMade = 0x5a5a;
  int32_t due;   // bytes expected, less those that have come
  int8_t phase;  // of its two turns
  int8_t expects;
  int16_t made;  // kMade
};
static_assert(sizeof(Arrivals) == sizeof(uint64_t));

struct Message {
  int rank;  // whom it is for
  char* to;
  char* arrivals;
  std::vector<char> values;
};

struct Cluster {
  std::mutex mutex;
  std::vector<Message> messages;  // under way
  unsigned random = 1;
  std::condition_variable changed;
  int64_t changes = 0;
  std::vector<char*> anchors;  // of its blocks
  int64_t threads = 0, arrived = 0, generation = 0;

  // Wakes the blocks that wait.
  void change() {
    ++changes;
    changed.notify_all();
  }
  bool is_late() {
    random = random * 1664525u + 1013904223u;
    return late == 1 || (late == 2 && random >> 31 != 0);
  }
  void deliver(const Message& message) {
    std::memcpy(message.to, message.values.data(), message.values.size());
    auto& there = *reinterpret_cast<Arrivals*>(message.arrivals);
    there.due -= static_cast<int32_t>(message.values.size());
    settle(there);
  }
  // The last that was sent to a block and is under way; false if nothing is.
  bool deliver_to(int rank) {
    for (size_t i = messages.size(); i-- > 0;) {
      if (messages[i].rank == rank) {
        const Message message = std::move(messages[i]);
        messages.erase(messages.begin() + static_cast<std::ptrdiff_t>(i));
        deliver(message);
        return true;
      }
    }
    return false;
  }
  // Ends a turn of which everything has come.
  void settle(Arrivals& arrivals) {
    if (arrivals.expects != 0 && arrivals.due == 0) {
      arrivals.expects = 0;
      arrivals.phase ^= 1;
      change();
    }
  }
};
inline Cluster* cluster = nullptr;
inline thread_local int rank = 0;
inline thread_local char anchor = 0;

inline char* in_block(const void* address, int of) {
  if (cluster->anchors[of] == nullptr) {
    fail("a block is sent to that has ended");
  }
  return cluster->anchors[of] + (static_cast<const char*>(address) - &anchor);
}
inline Arrivals& arrivals_at(void* address) {
  auto& arrivals = *static_cast<Arrivals*>(address);
  if (arrivals.made != Arrivals::kMade) {
    fail("arrivals that were not made");
  }
  return arrivals;
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
    bool progressed = false, waits = false;
    int64_t changes = 0;
    if (cluster != nullptr) {
      const std::lock_guard lock(cluster->mutex);
      changes = cluster->changes;
    }
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      if (fiber.done ||
          (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.generation)) {
        continue;
      }
      if (fiber.waits_until && !fiber.waits_until()) {
        waits = true;
        continue;
      }
      progressed = true;
      current = t;
      threadIdx = dim3(t, 0, 0);
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (!progressed && !waits) {
      fail("a barrier or shuffle was not reached by all threads");
    }
    if (!progressed) {
      std::unique_lock lock(cluster->mutex);
      if (cluster->deliver_to(rank)) {
        continue;
      }
      if (!cluster->changed.wait_for(lock, std::chrono::seconds(60),
                                     [&] { return cluster->changes != changes; })) {
        fail("another block of the cluster does not come");
      }
    }
  }
}

}  // namespace simt

inline void __syncthreads() { simt::wait(simt::block_barrier); }
inline void __syncwarp() { simt::wait(simt::warp_barriers[simt::current / simt::kWarp]); }
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
T __shfl_sync(unsigned mask, T value, int lane) {
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
  std::memcpy(&other, &simt::lanes[warp * simt::kWarp + lane], sizeof(T));
  simt::wait(simt::warp_barriers[warp]);
  return other;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, simt::current % simt::kWarp ^ lane_mask);
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

// What cluster.cuh has blocks of a cluster do.
inline int cluster_rank() { return simt::rank; }
inline void cluster_barrier() {
  int64_t generation;
  {
    const std::lock_guard lock(simt::cluster->mutex);
    generation = simt::cluster->generation;
    if (++simt::cluster->arrived == simt::cluster->threads) {
      simt::cluster->arrived = 0;
      ++simt::cluster->generation;
      simt::cluster->change();
    }
  }
  simt::wait_until([=] {
    const std::lock_guard lock(simt::cluster->mutex);
    return simt::cluster->generation != generation;
  });
}
inline void init_arrivals(uint64_t* arrivals) {
  *reinterpret_cast<simt::Arrivals*>(arrivals) = {0, 0, 0, simt::Arrivals::kMade};
}
inline void expect_arrivals(uint64_t* arrivals, int bytes) {
  const std::lock_guard lock(simt::cluster->mutex);
  auto& own = simt::arrivals_at(arrivals);
  if (own.expects != 0) {
    simt::fail("arrivals are expected before those of the last turn have come");
  }
  own.expects = 1;
  own.due += bytes;
  simt::cluster->settle(own);
}
inline void await_arrivals(uint64_t* arrivals, int parity) {
  simt::wait_until([=] {
    const std::lock_guard lock(simt::cluster->mutex);
    return simt::arrivals_at(arrivals).phase != parity;
  });
}
template <int kCount>
void send(float* to, uint64_t* arrivals, int rank, const float (&values)[kCount]) {
  if (reinterpret_cast<uint64_t>(to) % sizeof(values) != 0) {
    simt::fail("a vector sent to an address that is not aligned");
  }
  const std::lock_guard lock(simt::cluster->mutex);
  char* const there = simt::in_block(arrivals, rank);
  simt::arrivals_at(there);
  simt::Message message{rank, simt::in_block(to, rank), there, {}};
  message.values.resize(sizeof(values));
  std::memcpy(message.values.data(), values, sizeof(values));
  if (simt::cluster->is_late()) {
    simt::cluster->messages.push_back(std::move(message));
    simt::cluster->change();  // whom it is for may be waiting
  } else {
    simt::cluster->deliver(message);
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
  const auto limit = simt::shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t bytes = config->dynamicSmemBytes;
  if (bytes > static_cast<size_t>(limit == simt::shared_limits.end() ? simt::kSharedWithoutAsking
                                                                     : limit->second)) {
    return cudaErrorInvalidValue;
  }
  const unsigned together = config->numAttrs == 0 ? 1 : config->attrs->val.clusterDim.x;
  const unsigned threads = config->blockDim.x;
  if (together == 0 || config->gridDim.x % together != 0) {
    return cudaErrorInvalidValue;
  }
  simt::largest_cluster = std::max(simt::largest_cluster, together);
  simt::body = [=] { kernel(arguments...); };
  const auto run = [&](unsigned block) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    simt::dynamic_shared.reset(static_cast<uint4*>(std::malloc(bytes)));
    std::memset(simt::dynamic_shared.get(), 0xff, bytes);  // NaN: a block finds nothing of use
    blockIdx = dim3(block, 0, 0);
    simt::run_block(static_cast<int>(threads));
  };
  const unsigned clusters = config->gridDim.x / together;
  for (unsigned c = 0; c < clusters; ++c) {
    const unsigned first = (simt::reverse_blocks ? clusters - 1 - c : c) * together;
    if (together == 1) {
      run(first);
      continue;
    }
    simt::Cluster cluster;
    cluster.threads = int64_t{threads} * together;
    cluster.anchors.resize(together);
    simt::cluster = &cluster;
    std::vector<std::thread> blocks;
    for (unsigned rank = 0; rank < together; ++rank) {
      blocks.emplace_back([&, rank] {
        simt::rank = static_cast<int>(rank);
        {
          const std::lock_guard lock(cluster.mutex);
          cluster.anchors[rank] = &simt::anchor;
        }
        run(first + rank);
        const std::lock_guard lock(cluster.mutex);
        if (cluster.deliver_to(static_cast<int>(rank))) {
          simt::fail("a block ends before what was sent to it has come");
        }
        cluster.anchors[rank] = nullptr;
      });
    }
    for (auto& block : blocks) {
      block.join();
    }
    simt::cluster = nullptr;
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::multiprocessors
           : attribute == cudaDevAttrClusterLaunch     ? simt::has_clusters
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
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {simt::ptx_version};
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel kernel,
                                           const cudaLaunchConfig_t* config) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 0, config->dynamicSmemBytes);
  const int together = static_cast<int>(config->attrs->val.clusterDim.x);
  *clusters = together > simt::most_cluster_blocks
                  ? 0
                  : std::max(1, simt::multiprocessors * blocks / together);
  return cudaSuccess;
}
