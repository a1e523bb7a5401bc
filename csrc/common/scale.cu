#include "common/device.cuh"
#include "common/scale.h"

namespace dnkd {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T* gradient, const typename Accumulate<T>::type* upstream, int64_t count,
                 int64_t vectors) {
  const auto up = *upstream;
  if (up == 1) {
    return;
  }
  constexpr int kVec = kVectorWidth<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t v = first; v < vectors; v += step) {
    const Pack<T, kVec> pack = load_pack<T, kVec>(gradient + v * kVec);
    typename Accumulate<T>::type scaled[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      scaled[i] = pack[i] * up;
    }
    store_pack(gradient + v * kVec, Pack<T, kVec>::of(scaled));
  }
  for (int64_t j = vectors * kVec + first; j < count; j += step) {
    gradient[j] = narrow<T>(widen(gradient[j]) * up);
  }
}

template <typename T>
int scale(int64_t count, void* gradient, const void* upstream, void* stream) {
  const int64_t needed = (count / kVectorWidth<T> + kThreads) / kThreads;
  constexpr auto kKernel = scale_kernel<T>;
  const int64_t resident = resident_blocks<kKernel>(kThreads);
  return launch(kKernel, needed < resident ? needed : resident, kThreads, stream,
                static_cast<T*>(gradient),
                static_cast<const typename Accumulate<T>::type*>(upstream), count,
                rows_are_aligned<T>(gradient, 0, kVectorWidth<T>) ? count / kVectorWidth<T> : 0);
}

}  // namespace

int scale_cuda(Dtype dtype, int64_t count, void* gradient, const void* upstream, void* stream) {
  if (count == 0) {
    return 0;
  }
  switch (dtype) {
    case Dtype::kFloat16:
      return scale<Half>(count, gradient, upstream, stream);
    case Dtype::kBFloat16:
      return scale<BFloat16>(count, gradient, upstream, stream);
    case Dtype::kFloat64:
      return scale<double>(count, gradient, upstream, stream);
    default:
      return scale<float>(count, gradient, upstream, stream);
  }
}

}  // namespace dnkd
