// What the CUDA kernels share: vector loads and stores, reductions, launches. Includes no torch
// header, and nothing that the test shim (tests/simt) does not provide.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/dtype.h"

#define DNKD_INLINE __device__ __forceinline__

namespace dnkd {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

DNKD_INLINE float square_root(float value) { return sqrtf(value); }
DNKD_INLINE double square_root(double value) { return sqrt(value); }
DNKD_INLINE float exponential(float value) { return expf(value); }
DNKD_INLINE double exponential(double value) { return exp(value); }
// Of a NaN and a number, the number.
DNKD_INLINE float larger(float a, float b) { return fmaxf(a, b); }
DNKD_INLINE double larger(double a, double b) { return fmax(a, b); }

// -- element types -------------------------------------------------------------------------------

DNKD_INLINE float widen(float value) { return value; }
DNKD_INLINE double widen(double value) { return value; }
DNKD_INLINE float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
DNKD_INLINE float widen(BFloat16 value) {
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
}

template <typename T>
DNKD_INLINE T narrow(typename Accumulate<T>::type value) {
  return value;
}
template <>
DNKD_INLINE Half narrow<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
DNKD_INLINE BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// -- vectors of elements -------------------------------------------------------------------------

// kVec elements as they lie in memory. Copying one is a single 16-byte (8-byte) access, or two
// where it is larger.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec >= 16 ? 16 : sizeof(T) * kVec) Pack {
  T elements[kVec];
};

template <int kBytes>
struct RawOf;
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};

template <typename T, int kVec>
DNKD_INLINE Pack<T, kVec> load_pack(const T* from) {
  Pack<T, kVec> pack;
  if constexpr (sizeof(pack) < 8 || kVec == 1) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      pack.elements[i] = from[i];
    }
  } else {
    constexpr int kBytes = sizeof(pack) >= 16 ? 16 : 8;
    using Raw = typename RawOf<kBytes>::type;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack)) / kBytes; ++i) {
      reinterpret_cast<Raw*>(&pack)[i] = reinterpret_cast<const Raw*>(from)[i];
    }
  }
  return pack;
}

template <typename T, int kVec>
DNKD_INLINE void store_pack(T* to, const Pack<T, kVec>& pack) {
  if constexpr (sizeof(pack) < 8 || kVec == 1) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      to[i] = pack.elements[i];
    }
  } else {
    constexpr int kBytes = sizeof(pack) >= 16 ? 16 : 8;
    using Raw = typename RawOf<kBytes>::type;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack)) / kBytes; ++i) {
      reinterpret_cast<Raw*>(to)[i] = reinterpret_cast<const Raw*>(&pack)[i];
    }
  }
}

// Elements of a 16-byte access.
template <typename T>
constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// Whether rows `stride` elements apart can be read as vectors of `width` elements.
template <typename T>
bool rows_are_aligned(const void* base, int64_t stride, int width) {
  const uint64_t bytes = sizeof(T) * width >= 16 ? 16 : sizeof(T) * width;
  return reinterpret_cast<uint64_t>(base) % bytes == 0 &&
         static_cast<uint64_t>(stride) * sizeof(T) % bytes == 0;
}

// -- reductions, always in the same order --------------------------------------------------------

template <typename A>
DNKD_INLINE A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// Sums kCount values over the kThreads threads that share a row: a warp, or the whole block, which
// must then all call it. Every thread gets the sums. `shared` holds two buffers used in turn, so
// that one barrier per call is enough.
template <int kThreads, int kCount, typename A>
DNKD_INLINE void row_sum(A (&values)[kCount], A (&shared)[2][kCount][kThreads / kWarpSize],
                         int& turn) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    values[v] = warp_sum(values[v]);
  }
  if constexpr (kThreads > kWarpSize) {
    constexpr int kWarps = kThreads / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        shared[turn][v][threadIdx.x / kWarpSize] = values[v];
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      A sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += shared[turn][v][w];
      }
      values[v] = sum;
    }
    turn ^= 1;
  }
}

// The largest instead of the sum. A NaN may get lost.
template <int kThreads, int kCount, typename A>
DNKD_INLINE void row_largest(A (&values)[kCount], A (&shared)[2][kCount][kThreads / kWarpSize],
                             int& turn) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      values[v] = larger(values[v], __shfl_xor_sync(kFullWarp, values[v], offset));
    }
  }
  if constexpr (kThreads > kWarpSize) {
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        shared[turn][v][threadIdx.x / kWarpSize] = values[v];
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int w = 0; w < kThreads / kWarpSize; ++w) {
        values[v] = larger(values[v], shared[turn][v][w]);
      }
    }
    turn ^= 1;
  }
}

// Sum over a block of kThreads threads, for every thread; all must call it.
template <int kThreads, typename A>
DNKD_INLINE A block_sum(A value) {
  __shared__ A partial[kThreads / kWarpSize];
  value = warp_sum(value);
  __syncthreads();  // an earlier call may still be read
  if (threadIdx.x % kWarpSize == 0) {
    partial[threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    sum += partial[w];
  }
  return sum;
}

// -- launches ------------------------------------------------------------------------------------

// Every kernel is launched here, so that the file also compiles as C++ against the test shim.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, arguments...));
}

constexpr int kMaxDevices = 64;
constexpr int kMaxBlocksPerMultiprocessor = 32;

// `value` of the current device, asked for once per device and process.
template <typename Ask>
int remembered(std::atomic<int> (&known)[kMaxDevices], const Ask& ask) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) {
    return ask(device);
  }
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    value = ask(device);
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  static std::atomic<int> known[kMaxDevices];
  return remembered(known, [](int device) {
    int count = 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess
               ? count
               : 1;
  });
}

// Blocks of a kernel that the current device holds at once.
template <auto kKernel>
int64_t resident_blocks(int threads) {
  static std::atomic<int> known[kMaxDevices];
  const int per_multiprocessor = remembered(known, [&](int) {
    int count = 0;
    const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kKernel, threads, 0);
    return error != cudaSuccess || count < 1     ? 1
           : count < kMaxBlocksPerMultiprocessor ? count
                                                 : kMaxBlocksPerMultiprocessor;
  });
  return static_cast<int64_t>(multiprocessors()) * per_multiprocessor;
}

}  // namespace dnkd
