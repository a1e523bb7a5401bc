// Blocks that share a row: those of a thread block cluster, which the devices from sm_90 on run at
// the same time, and which write into each other's shared memory.
#pragma once

#include "common/device.cuh"

namespace dnkd {

// More than that are not sure to find room.
constexpr int kMostClusterBlocks = 8;

// Whether this code is compiled for devices with clusters. On the host it is not asked.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// What the warps of a cluster's blocks tell each other, in the shared memory of each block: values
// of every warp, in two buffers used in turn, and a barrier of each that counts the bytes that
// arrive.
template <int kWarps>
struct alignas(16) ClusterExchange {
  static constexpr int kMost = 4;
  float values[2][kWarps][kMost];
  uint64_t arrivals[2];
};

// The test shim brings its own.
#ifndef DNKD_CLUSTERS
// Which block of its cluster this one is.
DNKD_INLINE int cluster_rank() {
  unsigned rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// Waits for all threads of the cluster, and for what they wrote.
DNKD_INLINE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// A barrier that one thread arrives at in every turn, with the bytes that are to come.
DNKD_INLINE void init_arrivals(uint64_t* arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(arrivals)))
               : "memory");
#endif
}
DNKD_INLINE void expect_arrivals(uint64_t* arrivals, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(arrivals))),
               "r"(bytes)
               : "memory");
#endif
}
DNKD_INLINE void await_arrivals(uint64_t* arrivals, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t"
      ".reg .pred arrived;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 arrived, [%0], %1;\n\t"
      "@!arrived bra again;\n\t"
      "}" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(arrivals))),
      "r"(parity)
      : "memory");
#endif
}
// Sends kCount floats to where the block `rank` of the cluster has what this one has at `to`; they
// arrive at its `arrivals`.
template <int kCount>
DNKD_INLINE void send(float* to, uint64_t* arrivals, int rank, const float (&values)[kCount]) {
  static_assert(kCount == 2 || kCount == 4);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned there, barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(barrier)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(arrivals))), "r"(rank));
  if constexpr (kCount == 2) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
            "r"(there),
        "f"(values[0]), "f"(values[1]), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(there),
        "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
        : "memory");
  }
#endif
}
#endif

// Makes the barriers. All threads of the cluster call it, before any sends.
template <typename Exchange>
DNKD_INLINE void begin_exchange(Exchange& exchange) {
  if (threadIdx.x == 0) {
    init_arrivals(&exchange.arrivals[0]);
    init_arrivals(&exchange.arrivals[1]);
  }
  cluster_barrier();
}

// As row_combine(), over the threads of all kBlocks blocks of a cluster, which all call it. `turn`
// counts the calls. Who writes into a buffer again has what all warps sent in the call between,
// behind their reads of the call before: the shuffles after those wait for what was read.
template <int kThreads, int kBlocks, int kCount, typename Exchange, typename Combine>
DNKD_INLINE void cluster_combine(float (&values)[kCount], Exchange& exchange, int& turn,
                                 float first, const Combine& combine) {
  constexpr int kWarps = kThreads / kWarpSize, kGroup = kLanesOf<kCount>;
  constexpr int kSent = kCount <= 2 ? 2 : 4;
  static_assert(kCount <= Exchange::kMost, "more values than the buffers hold");
  const int lane = threadIdx.x % kWarpSize, group = lane / kGroup;
  const int buffer = turn & 1;
  if (threadIdx.x == 0) {
    expect_arrivals(&exchange.arrivals[buffer],
                    kBlocks * kWarps * kSent * static_cast<int>(sizeof(float)));
  }
  gather_groups(values, warp_combine(values, first, combine));
  if (lane < kBlocks) {
    float sent[kSent];
#pragma unroll
    for (int v = 0; v < kSent; ++v) {
      sent[v] = v < kCount ? values[v] : 0;
    }
    const int warp = cluster_rank() * kWarps + threadIdx.x / kWarpSize;
    send(exchange.values[buffer][warp], &exchange.arrivals[buffer], lane, sent);
  }
  await_arrivals(&exchange.arrivals[buffer], (turn >> 1) & 1);
  float own = first;
#pragma unroll
  for (int w = 0; w < kBlocks * kWarps; w += kGroup) {
    if (kBlocks * kWarps % kGroup == 0 || w + lane % kGroup < kBlocks * kWarps) {
      own = combine(own, exchange.values[buffer][w + lane % kGroup][group]);
    }
  }
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) {
    own = combine(own, __shfl_xor_sync(kFullWarp, own, offset));
  }
  gather_groups(values, own);
  ++turn;
}

// The sums over all threads of a cluster; see cluster_combine().
template <int kThreads, int kBlocks, int kCount, typename Exchange>
DNKD_INLINE void cluster_sum(float (&values)[kCount], Exchange& exchange, int& turn) {
  cluster_combine<kThreads, kBlocks>(values, exchange, turn, 0.0f,
                                     [](float a, float b) { return a + b; });
}

// The largest instead. A NaN may get lost.
template <int kThreads, int kBlocks, int kCount, typename Exchange>
DNKD_INLINE void cluster_largest(float (&values)[kCount], Exchange& exchange, int& turn) {
  cluster_combine<kThreads, kBlocks>(values, exchange, turn, -__builtin_inff(),
                                     [](float a, float b) { return larger(a, b); });
}

// As launch_sharing(), in clusters of `cluster` blocks.
template <typename... Parameters, typename... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int cluster, int threads,
                    int shared_bytes, void* stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Clusters of a kernel that the current device holds at once; 0 where it has no clusters, or where
// the kernel was compiled for devices without them. Remembered for the last number of bytes.
template <auto kKernel>
int64_t resident_clusters(int cluster, int threads, int shared_bytes) {
  static std::atomic<int64_t> known[kMaxDevices];  // (bytes + 1) * 65536 + clusters
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    return 0;
  }
  const bool is_kept = device >= 0 && device < kMaxDevices;
  const int64_t key = (static_cast<int64_t>(shared_bytes) + 1) * 65536;
  if (is_kept) {
    const int64_t value = known[device].load(std::memory_order_relaxed);
    if (value / 65536 * 65536 == key) {
      return value - key;
    }
  }
  int count = 0, can_cluster = 0;
  cudaFuncAttributes attributes = {};
  bool is_known =
      succeeds(cudaDeviceGetAttribute(&can_cluster, cudaDevAttrClusterLaunch, device)) &&
      succeeds(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)));
  if (is_known && can_cluster != 0 && attributes.ptxVersion >= 90) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(cluster), 1, 1);
    config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    is_known = succeeds(cudaOccupancyMaxActiveClusters(&count, kKernel, &config));
    count = is_known ? count : 0;
  }
  if (is_kept && is_known) {
    known[device].store(key + count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace dnkd
