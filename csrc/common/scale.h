// gradient *= upstream, free of torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dnkd {

#ifdef DNKD_WITH_CUDA
// gradient: `count` elements of `dtype`; upstream: one value of the accumulate type (double for
// kFloat64, else float) on the device. Returns at once, on the device, where it is 1.
int scale_cuda(Dtype dtype, int64_t count, void* gradient, const void* upstream, void* stream);
#endif

}  // namespace dnkd
