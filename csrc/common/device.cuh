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
// Shared memory whose size the launch gives. The test shim brings its own.
#ifndef DNKD_DYNAMIC_SHARED
#define DNKD_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

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
// The exponential of y, which comes in the units of Exponent: 2^y for a float, in one instruction
// where expf() takes eight. Its relative error is below 2^-22, beside what rounding y has cost; it
// is 0 below 2^-126.
DNKD_INLINE float exp_of_units(float y) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
#else
  const float power = exp2f(y);
  return power < 1.17549435e-38f ? 0.0f : power;
#endif
}
DNKD_INLINE double exp_of_units(double y) { return exp(y); }
DNKD_INLINE float logarithm(float value) { return logf(value); }
DNKD_INLINE double logarithm(double value) { return log(value); }
DNKD_INLINE float log_one_plus(float value) { return log1pf(value); }
DNKD_INLINE double log_one_plus(double value) { return log1p(value); }
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

// Two 16-bit elements in a 32-bit word, the first in its lower half.
template <typename T>
struct Pair;
template <>
struct Pair<Half> {
  using type = __half2;
  DNKD_INLINE static float low(__half2 pair) { return __low2float(pair); }
  DNKD_INLINE static float high(__half2 pair) { return __high2float(pair); }
  DNKD_INLINE static __half2 of(float low, float high) { return __floats2half2_rn(low, high); }
};
template <>
struct Pair<BFloat16> {
  using type = __nv_bfloat162;
  // One instruction each, where __high2float() takes two.
  DNKD_INLINE static float low(const __nv_bfloat162& pair) {
    return __uint_as_float(reinterpret_cast<const unsigned&>(pair) << 16);
  }
  DNKD_INLINE static float high(const __nv_bfloat162& pair) {
    return __uint_as_float(reinterpret_cast<const unsigned&>(pair) & 0xffff0000u);
  }
  DNKD_INLINE static __nv_bfloat162 of(float low, float high) {
    return __floats2bfloat162_rn(low, high);
  }
};

// -- vectors of elements -------------------------------------------------------------------------

// kVec elements as they lie in memory; [i] is the i-th, widened. Copying one is a single 16-byte
// (8-byte) access, or two where it is larger. 16-bit elements stay in pairs: as members of their
// own each would take a register.
template <typename T, int kVec>
constexpr int kPackAlignment = sizeof(T) * kVec >= 16 ? 16 : static_cast<int>(sizeof(T) * kVec);

template <typename T, int kVec, bool kInPairs = sizeof(T) == 2 && kVec % 2 == 0>
struct alignas(kPackAlignment<T, kVec>) Pack {
  using A = typename Accumulate<T>::type;
  static constexpr int kCount = kVec;
  T elements[kVec];
  DNKD_INLINE A operator[](int i) const { return widen(elements[i]); }
  DNKD_INLINE static Pack of(const A (&values)[kVec]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      pack.elements[i] = narrow<T>(values[i]);
    }
    return pack;
  }
};
template <typename T, int kVec>
struct alignas(kPackAlignment<T, kVec>) Pack<T, kVec, true> {
  static constexpr int kCount = kVec;
  typename Pair<T>::type pairs[kVec / 2];
  DNKD_INLINE float operator[](int i) const {
    return i % 2 == 0 ? Pair<T>::low(pairs[i / 2]) : Pair<T>::high(pairs[i / 2]);
  }
  DNKD_INLINE static Pack of(const float (&values)[kVec]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      pack.pairs[i / 2] = Pair<T>::of(values[i], values[i + 1]);
    }
    return pack;
  }
};

// The largest of all that was added; of a NaN and a number, the number.
template <typename T, bool kInPairs = sizeof(T) == 2>
struct Largest {
  using A = typename Accumulate<T>::type;
  A value = -A(__builtin_inff());
  DNKD_INLINE void add(A other) { value = larger(value, other); }
  template <int kVec>
  DNKD_INLINE void add(const Pack<T, kVec>& pack) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      add(pack[i]);
    }
  }
  DNKD_INLINE A result() const { return value; }
};
// Pairs are compared as they are.
template <typename T>
struct Largest<T, true> {
  float value = -__builtin_inff();
  typename Pair<T>::type pair = Pair<T>::of(-__builtin_inff(), -__builtin_inff());
  DNKD_INLINE void add(float other) { value = larger(value, other); }
  template <int kVec>
  DNKD_INLINE void add(const Pack<T, kVec>& pack) {
    if constexpr (kVec == 1) {
      add(pack[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        pair = __hmax2(pair, pack.pairs[i]);
      }
    }
  }
  DNKD_INLINE float result() const {
    return larger(value, larger(Pair<T>::low(pair), Pair<T>::high(pair)));
  }
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

// kOnce: of what is not needed again, so that it leaves the caches first.
template <typename T, int kVec, bool kOnce = false>
DNKD_INLINE Pack<T, kVec> load_pack(const T* from) {
  Pack<T, kVec> pack;
  if constexpr (kVec == 1) {
    pack.elements[0] = *from;
  } else {
    static_assert(sizeof(pack) % 8 == 0, "no access of this size");
    constexpr int kBytes = sizeof(pack) >= 16 ? 16 : 8;
    using Raw = typename RawOf<kBytes>::type;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack)) / kBytes; ++i) {
      const Raw* at = reinterpret_cast<const Raw*>(from) + i;
      reinterpret_cast<Raw*>(&pack)[i] = kOnce ? __ldcs(at) : *at;
    }
  }
  return pack;
}

// A pointer that the compiler keeps, instead of forming it anew in every turn of a loop.
template <typename T>
DNKD_INLINE T* kept_pointer(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// One store each: of an assignment nvcc 13 makes stores of single elements wherever it does not see
// the address to be aligned. The compiler does not know that they write to memory, so that loads
// may go before them: nothing that is stored so is read again by the same kernel, or written again
// but by store_element(), which like these is volatile and so keeps its place, of the same thread.
// kOnce: of what the caches need no more, so that it leaves them first.
template <bool kOnce>
DNKD_INLINE void store_global(uint4* to, uint4 value) {
#ifdef __CUDA_ARCH__
  if constexpr (kOnce) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w));
  } else {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w));
  }
#else
  *to = value;
#endif
}
template <bool kOnce>
DNKD_INLINE void store_global(uint2* to, uint2 value) {
  static_assert(!kOnce, "no store of this size is of what is not needed again");
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y));
#else
  *to = value;
#endif
}

// An element, behind all that the thread has stored before.
DNKD_INLINE void store_element(double* to, double value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "d"(value)
               : "memory");
#else
  *to = value;
#endif
}
DNKD_INLINE void store_element(float* to, float value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value)
               : "memory");
#else
  *to = value;
#endif
}
template <typename T>
DNKD_INLINE void store_element(T* to, T value) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDA_ARCH__
  asm volatile("st.global.u16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "h"(value.bits)
               : "memory");
#else
  *to = value;
#endif
}

// Into global memory.
template <bool kOnce = false, typename T, int kVec>
DNKD_INLINE void store_pack(T* to, const Pack<T, kVec>& pack) {
  if constexpr (kVec == 1) {
    *to = pack.elements[0];
  } else {
    static_assert(sizeof(pack) % 8 == 0, "no access of this size");
    constexpr int kBytes = sizeof(pack) >= 16 ? 16 : 8;
    using Raw = typename RawOf<kBytes>::type;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack)) / kBytes; ++i) {
      store_global<kOnce>(reinterpret_cast<Raw*>(to) + i, reinterpret_cast<const Raw*>(&pack)[i]);
    }
  }
}

// -- copies beside the computation ----------------------------------------------------------------

// Into shared memory. Each thread copies for itself, in groups that it waits for in their order.
// The test shim brings its own; before sm_80 a copy is an ordinary one, which is over when it is
// called.
#ifndef DNKD_ASYNC_COPIES
// An address in shared memory, which the compiler keeps.
using SharedAddress = unsigned;
DNKD_INLINE SharedAddress shared_address(const void* pointer) {
  SharedAddress address = static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
#ifdef __CUDA_ARCH__
  asm("" : "+r"(address));
#endif
  return address;
}
// 16 bytes.
DNKD_INLINE void copy_async(SharedAddress to, const void* from) {
#if !defined(__CUDA_ARCH__)
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  const uint4 raw = *static_cast<const uint4*>(from);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w)
               : "memory");
#endif
}
DNKD_INLINE void end_copy_group() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all but the last kPending groups.
template <int kPending>
DNKD_INLINE void wait_for_groups() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
#endif

// How the threads of a block keep packs of whole 16 bytes in shared memory: the first 16 bytes of
// all of them, then the next, so that neighbours meet no bank twice.
template <typename T, int kVec>
struct Staged {
  static constexpr int kAccesses = sizeof(Pack<T, kVec>) / 16;

  // Bytes of `threads` packs.
  static constexpr int bytes_of(int threads) { return threads * kAccesses * 16; }

  template <int kThreads>
  DNKD_INLINE static void fetch(SharedAddress packs, const T* from) {
    static_assert(sizeof(Pack<T, kVec>) % 16 == 0, "no whole accesses");
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      copy_async(packs + (i * kThreads + threadIdx.x) * 16,
                 reinterpret_cast<const char*>(from) + i * 16);
    }
  }
  template <int kThreads>
  DNKD_INLINE static Pack<T, kVec> load(const char* packs) {
    Pack<T, kVec> pack;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      reinterpret_cast<uint4*>(&pack)[i] =
          *reinterpret_cast<const uint4*>(packs + (i * kThreads + threadIdx.x) * 16);
    }
    return pack;
  }
};

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

template <typename A>
DNKD_INLINE A warp_largest(A value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = larger(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Up to four values are combined over a warp together: from step to step the lanes go on with half
// of them, until each lane has one, and a group of kLanesOf<kCount> lanes that of their number.
constexpr int kMostTogether = 4;
template <int kCount>
constexpr int kLanesOf = kWarpSize / (kCount <= 2 ? kCount : kMostTogether);

// Combines kCount values over a warp; a lane gets that of its group. `first` combines with nothing.
template <int kCount, typename A, typename Combine>
DNKD_INLINE A warp_combine(const A (&values)[kCount], A first, const Combine& combine) {
  static_assert(kCount <= kMostTogether, "a group for each value");
  const int lane = threadIdx.x % kWarpSize;
  A own = values[0];
  if constexpr (kCount > 2) {
    const A last = kCount > 3 ? values[kCount - 1] : first;
    const bool is_high = lane >= kWarpSize / 2, is_odd = lane & kWarpSize / 4;
    A even = is_high ? values[2] : values[0], odd = is_high ? last : values[1];
    const A even_of_others = is_high ? values[0] : values[2];
    const A odd_of_others = is_high ? values[1] : last;
    even = combine(even, __shfl_xor_sync(kFullWarp, even_of_others, kWarpSize / 2));
    odd = combine(odd, __shfl_xor_sync(kFullWarp, odd_of_others, kWarpSize / 2));
    own = is_odd ? odd : even;
    own = combine(own, __shfl_xor_sync(kFullWarp, is_odd ? even : odd, kWarpSize / 4));
  } else if constexpr (kCount == 2) {
    const bool is_high = lane >= kWarpSize / 2;
    own = is_high ? values[1] : values[0];
    own = combine(own, __shfl_xor_sync(kFullWarp, is_high ? values[0] : values[1], kWarpSize / 2));
  }
#pragma unroll
  for (int offset = kLanesOf<kCount> / 2; offset > 0; offset /= 2) {
    own = combine(own, __shfl_xor_sync(kFullWarp, own, offset));
  }
  return own;
}

// Gives every lane the values of all groups.
template <int kCount, typename A>
DNKD_INLINE void gather_groups(A (&values)[kCount], A own) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    values[v] = kCount == 1 ? own : __shfl_sync(kFullWarp, own, v * kLanesOf<kCount>);
  }
}

// Combines values[0] to values[kCount - 1] over the kThreads threads that share a row: a warp, or
// the whole block, which must then all call it. Every thread gets the results. `shared` holds two
// buffers of at least kCount values used in turn, so that one barrier per call is enough.
template <int kThreads, int kCount, int kMost, typename A, typename Combine>
DNKD_INLINE void row_combine(A (&values)[kCount], A (&shared)[2][kMost][kThreads / kWarpSize],
                             int& turn, A first, const Combine& combine) {
  static_assert(kCount <= kMost, "more values than the buffers hold");
  constexpr bool kTogether = kCount <= kMostTogether;
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kLanes = kTogether ? kLanesOf<kCount> : 1;  // of a group
  const int lane = threadIdx.x % kWarpSize, group = lane / kLanes;
  A own = first;
  if constexpr (kTogether) {
    own = warp_combine(values, first, combine);
  } else {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const A one[1] = {values[v]};
      values[v] = warp_combine(one, first, combine);
    }
  }
  if constexpr (kWarps > 1) {
    A(&buffer)[kMost][kWarps] = shared[turn];
    const int warp = threadIdx.x / kWarpSize;
    if constexpr (kTogether) {
      if (lane % kLanes == 0 && group < kCount) {
        buffer[group][warp] = own;
      }
    } else if (lane == 0) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        buffer[v][warp] = values[v];
      }
    }
    turn ^= 1;
    __syncthreads();
    if constexpr (!kTogether || kWarps <= 4) {  // few are read sooner than combined by shuffles
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        values[v] = first;
      }
#pragma unroll 4  // more at once take registers that the kernels do not have
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          values[v] = combine(values[v], buffer[v][w]);
        }
      }
      return;
    } else {
      own = first;
#pragma unroll
      for (int w = 0; w < kWarps; w += kLanes) {
        if (w + lane % kLanes < kWarps && group < kCount) {
          own = combine(own, buffer[group][w + lane % kLanes]);
        }
      }
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        own = combine(own, __shfl_xor_sync(kFullWarp, own, offset));
      }
    }
  }
  if constexpr (kTogether) {
    gather_groups(values, own);
  }
}

// The sums over the threads that share a row; see row_combine().
template <int kThreads, int kCount, int kMost, typename A>
DNKD_INLINE void row_sum(A (&values)[kCount], A (&shared)[2][kMost][kThreads / kWarpSize],
                         int& turn) {
  row_combine<kThreads>(values, shared, turn, A(0), [](A a, A b) { return a + b; });
}

// The largest instead. A NaN may get lost.
template <int kThreads, int kCount, int kMost, typename A>
DNKD_INLINE void row_largest(A (&values)[kCount], A (&shared)[2][kMost][kThreads / kWarpSize],
                             int& turn) {
  row_combine<kThreads>(values, shared, turn, -A(__builtin_inff()),
                        [](A a, A b) { return larger(a, b); });
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
// shared_bytes: of DNKD_DYNAMIC_SHARED, see dynamic_shared_limit().
template <typename... Parameters, typename... Arguments>
int launch_sharing(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                   void* stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
           Arguments... arguments) {
  return launch_sharing(kernel, blocks, threads, 0, stream, arguments...);
}

// Whether a query succeeded. An error that is not passed on must not be left to the next launch's
// check, either.
inline bool succeeds(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();
  }
  return error == cudaSuccess;
}

constexpr int kMaxDevices = 64;
constexpr int kMaxBlocksPerMultiprocessor = 32;

// `value` of the current device, asked for once per device and process; one of 0 or less is what
// could not be learned, and is asked for again.
template <typename Ask>
int remembered(std::atomic<int> (&known)[kMaxDevices], const Ask& ask) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) {
    return ask(device);
  }
  int value = known[device].load(std::memory_order_acquire);
  if (value == 0) {
    value = ask(device);
    if (value > 0) {
      known[device].store(value, std::memory_order_release);
    }
  }
  return value;
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  static std::atomic<int> known[kMaxDevices];
  return remembered(known, [](int device) {
    int count = 0;
    // An answer of 1 stays, too: scratch and grid go by the same number.
    return succeeds(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) ? count
                                                                                            : 1;
  });
}

// Blocks of a kernel that the current device holds at once, each with shared_bytes of dynamic
// shared memory. Remembered for the last number of bytes: a model has one or few widths.
template <auto kKernel>
int64_t resident_blocks(int threads, int shared_bytes = 0) {
  static std::atomic<int64_t> known[kMaxDevices];  // (bytes + 1) * 64 + blocks
  int device = 0;
  const bool is_kept = cudaGetDevice(&device) == cudaSuccess && device >= 0 && device < kMaxDevices;
  const int64_t key = (static_cast<int64_t>(shared_bytes) + 1) * 64;
  if (is_kept) {
    const int64_t value = known[device].load(std::memory_order_relaxed);
    if (value / 64 * 64 == key) {
      return multiprocessors() * (value - key);
    }
  }
  int count = 0;
  const bool is_known = succeeds(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kKernel, threads, shared_bytes));
  count = !is_known || count < 1                ? 1
          : count < kMaxBlocksPerMultiprocessor ? count
                                                : kMaxBlocksPerMultiprocessor;
  if (is_kept && is_known) {
    known[device].store(key + count, std::memory_order_relaxed);
  }
  return static_cast<int64_t>(multiprocessors()) * count;
}

// One block per `rows_per_block` rows, but no more than the device holds at once: each takes an
// equal share, and there is no second wave.
template <auto kKernel>
int64_t blocks_for(int64_t rows, int rows_per_block, int threads, int shared_bytes = 0) {
  const int64_t needed = (rows + rows_per_block - 1) / rows_per_block;
  const int64_t resident = resident_blocks<kKernel>(threads, shared_bytes);
  const int64_t blocks = needed < resident ? needed : resident;
  return blocks < 1 ? 1 : blocks;
}

// Dynamic shared memory that a launch of the kernel may ask for, in bytes: what leaves room for
// kBlocks blocks per multiprocessor, with kOtherShared bytes of each for what it declares and the
// driver takes. The kernel is permitted to use it.
constexpr int kOtherShared = 4 << 10;
constexpr int kSharedWithoutAsking = 48 << 10;
template <auto kKernel, int kBlocks = 2>
int dynamic_shared_limit() {
  static std::atomic<int> known[kMaxDevices];
  constexpr int kWithoutAsking = kSharedWithoutAsking - kOtherShared;
  const int limit = remembered(known, [](int device) {
    int most = 0, per_multiprocessor = 0;
    if (!succeeds(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) ||
        !succeeds(cudaDeviceGetAttribute(&per_multiprocessor,
                                         cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))) {
      return 0;
    }
    const int share = per_multiprocessor / kBlocks;
    const int wanted = (most < share ? most : share) - kOtherShared;
    if (wanted <= kWithoutAsking) {
      return wanted;
    }
    return succeeds(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, wanted))
               ? wanted
               : 0;
  });
  return limit > 0 ? limit : kWithoutAsking;
}

}  // namespace dnkd
